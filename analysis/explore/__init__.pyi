from .serving import explore_concepts, is_loopback
from .site import Site, write_site

__all__ = ["Site", "explore_concepts", "is_loopback", "write_site"]
