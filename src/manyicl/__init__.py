"""Many-shot in-context fine-tuning: bring examples, not adapters."""
