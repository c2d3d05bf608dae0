"""Many-shot in-context fine-tuning: bring examples, not adapters."""

import lazy_loader

# The names are in __init__.pyi; a module is imported when one of its names is first used: torch takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
