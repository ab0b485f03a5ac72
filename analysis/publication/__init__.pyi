from .publication import Publication, PublishedFile, publish

__all__ = ["Publication", "PublishedFile", "publish"]
