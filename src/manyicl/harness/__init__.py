"""lm-evaluation-harness asks our engine: `python -m manyicl.harness --model manyicl --model_args pretrained=MODEL`."""

import lazy_loader

# The names are in __init__.pyi; a module is imported when one of its names is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
