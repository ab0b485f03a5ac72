from .compute import analyze
from .config import AnalyzeConfig
from .facts import SHOWN_QUANTILES, ClassShare, Kind, choose_bins, class_shares, finite, token_kinds, top_labels
from .files import choose_gallery
from .nearest import unit_decoder
from .statistics import strongest_first
from .table import EMBEDDINGS_FILE, NAMES_FILE, NOTES, OWN_FILE, ConceptTable, find_codes

__all__ = [
    "EMBEDDINGS_FILE",
    "NAMES_FILE",
    "NOTES",
    "OWN_FILE",
    "SHOWN_QUANTILES",
    "AnalyzeConfig",
    "ClassShare",
    "ConceptTable",
    "Kind",
    "analyze",
    "choose_bins",
    "choose_gallery",
    "class_shares",
    "find_codes",
    "finite",
    "strongest_first",
    "token_kinds",
    "top_labels",
    "unit_decoder",
]
