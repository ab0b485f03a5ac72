from .answer import answer_question, write_answer
from .classes import query_class, query_firing, query_selection
from .cofiring import co_fire, query_co_firing, rank_partners, sample_partners
from .contact_sheet import draw_sheet
from .entries import open_entries, read_entries
from .groups import query_groups
from .images import query_image, query_images, sum_latents
from .latents import describe_places, find_counter_examples, query_counter_examples, query_latent, query_patches
from .places import At, choose_patches, parse_at
from .question import Question
from .where import choose_images

__all__ = [
    "At",
    "Question",
    "answer_question",
    "choose_images",
    "choose_patches",
    "co_fire",
    "describe_places",
    "draw_sheet",
    "find_counter_examples",
    "open_entries",
    "parse_at",
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
    "rank_partners",
    "read_entries",
    "sample_partners",
    "sum_latents",
    "write_answer",
]
