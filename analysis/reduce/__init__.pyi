from .cluster import open_scheduler
from .pairs import (
    UNIT,
    Block,
    Pairs,
    Piece,
    cut_blocks,
    find_pairs,
    image_scores,
    join_columns,
    last_bits,
    split_rows,
    sum_images,
    tokens_per_image,
)
from .reduction import RangeCounter, Statistic, cut_latents, reduce_latents, reduce_shards
from .tasks import compute, fold_pieces, map_shards, open_codes

__all__ = [
    "UNIT",
    "Block",
    "Pairs",
    "Piece",
    "RangeCounter",
    "Statistic",
    "compute",
    "cut_blocks",
    "cut_latents",
    "find_pairs",
    "fold_pieces",
    "image_scores",
    "join_columns",
    "last_bits",
    "map_shards",
    "open_codes",
    "open_scheduler",
    "reduce_latents",
    "reduce_shards",
    "split_rows",
    "sum_images",
    "tokens_per_image",
]
