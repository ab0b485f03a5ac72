from .concepts import ConceptTable, analyze
from .join import find_images, map_shards
from .query import query_class, query_image, query_latent
from .reduction import Statistic, reduce_shards
from .report import write_report

__all__ = [
    "ConceptTable",
    "Statistic",
    "analyze",
    "find_images",
    "map_shards",
    "query_class",
    "query_image",
    "query_latent",
    "reduce_shards",
    "write_report",
]
