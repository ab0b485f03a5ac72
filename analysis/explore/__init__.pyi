from .serving import explore_concepts, is_loopback

__all__ = ["explore_concepts", "is_loopback"]
