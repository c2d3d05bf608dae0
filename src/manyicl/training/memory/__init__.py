"""How much memory a training step takes, measured without a GPU, and what is chosen by it."""
