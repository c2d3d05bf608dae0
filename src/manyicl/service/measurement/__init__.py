"""How well a model answers a task, found out from the examples of the task alone."""
