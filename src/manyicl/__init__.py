"""Many-shot in-context fine-tuning: bring examples, not adapters."""

import logging

import lazy_loader

# Importing peft imports bitsandbytes, which on a CPU with bfloat16 units warns that a kernel of the hub is missing. It
# then uses its own, so there is nothing that a reader of the terminal could do.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# The names are in __init__.pyi; a module is imported when one of its names is first used: torch takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
