"""The text that the packaged seed model was pretrained on, generated."""
