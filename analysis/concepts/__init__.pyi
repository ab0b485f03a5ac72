from .compute import analyze
from .config import AnalyzeConfig
from .statistics import strongest_first
from .table import EMBEDDINGS_FILE, NAMES_FILE, NOTES, OWN_FILE, ConceptTable, find_codes

__all__ = [
    "EMBEDDINGS_FILE",
    "NAMES_FILE",
    "NOTES",
    "OWN_FILE",
    "AnalyzeConfig",
    "ConceptTable",
    "analyze",
    "find_codes",
    "strongest_first",
]
