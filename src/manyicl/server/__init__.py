"""The service over HTTP: its own API, OpenAI's, access tokens, metrics and logs, and the page in a browser."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
