from .adaptation_report import write_adaptation_page
from .answer import parse_at, parse_latents, write_answer
from .attribution import delete_latents
from .coactivation import CoFiring, co_fire, query_co_firing, sample_partners
from .comparison import compare
from .concepts import ConceptTable, analyze
from .contrast import query_groups
from .dictionary import Inspection, Matching, inspect_dictionaries, match_latents
from .embeddings import embed_images
from .entries import open_entries, read_entries
from .fidelity import evaluate_fidelity
from .heat import heat_maps, latent_masks
from .intervention import mask_latents
from .join import find_images, map_shards, open_scheduler
from .localization import Localization, localize, score_latents
from .masks import PixelMasks, read_masks
from .names import add_names, read_name_table, read_names, read_own_names, set_name
from .naming import name_latents
from .overlap import compare_counts, group_latents, improvement_rate, jaccard, rank_biased_overlap
from .query import (
    find_image,
    query_counter_examples,
    query_image,
    query_images,
    query_latent,
    query_patches,
)
from .recovery import Labeled, Recovered, recover_concepts
from .reduction import Statistic, reduce_shards
from .report import write_report
from .rule_learning import learn_rules
from .selection import choose_images, query_class, query_firing, query_selection
from .sheet import draw_sheet
from .steering import measure_steerability, set_latents
from .study import Judge
from .tour import Quickstart, quickstart

__all__ = [
    "CoFiring",
    "ConceptTable",
    "Inspection",
    "Judge",
    "Labeled",
    "Localization",
    "Matching",
    "PixelMasks",
    "Quickstart",
    "Recovered",
    "Statistic",
    "add_names",
    "analyze",
    "choose_images",
    "co_fire",
    "compare",
    "compare_counts",
    "delete_latents",
    "draw_sheet",
    "embed_images",
    "evaluate_fidelity",
    "find_image",
    "find_images",
    "group_latents",
    "heat_maps",
    "improvement_rate",
    "inspect_dictionaries",
    "jaccard",
    "latent_masks",
    "learn_rules",
    "localize",
    "map_shards",
    "mask_latents",
    "match_latents",
    "measure_steerability",
    "name_latents",
    "open_entries",
    "open_scheduler",
    "parse_at",
    "parse_latents",
    "query_class",
    "query_co_firing",
    "query_counter_examples",
    "query_firing",
    "query_groups",
    "query_image",
    "query_images",
    "query_latent",
    "query_patches",
    "query_selection",
    "quickstart",
    "rank_biased_overlap",
    "read_entries",
    "read_masks",
    "read_name_table",
    "read_names",
    "read_own_names",
    "recover_concepts",
    "reduce_shards",
    "sample_partners",
    "score_latents",
    "set_latents",
    "set_name",
    "write_adaptation_page",
    "write_answer",
    "write_report",
]
