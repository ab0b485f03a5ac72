from .concepts import ConceptTable, analyze
from .fidelity import evaluate_fidelity
from .join import find_images, map_shards, open_scheduler
from .query import query_class, query_image, query_latent
from .recovery import Labeled, Recovered, recover_concepts
from .reduction import Statistic, reduce_shards
from .report import write_report
from .tour import Quickstart, quickstart

__all__ = [
    "ConceptTable",
    "Labeled",
    "Quickstart",
    "Recovered",
    "Statistic",
    "analyze",
    "evaluate_fidelity",
    "find_images",
    "map_shards",
    "open_scheduler",
    "query_class",
    "query_image",
    "query_latent",
    "quickstart",
    "recover_concepts",
    "reduce_shards",
    "write_report",
]
