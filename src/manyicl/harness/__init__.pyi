from .sharing import SharedContexts, share_contexts

__all__ = [
    "SharedContexts",
    "share_contexts",
]
