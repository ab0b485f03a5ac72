from .comparison import compare
from .overlap import compare_counts, group_latents, improvement_rate, jaccard, rank_biased_overlap

__all__ = ["compare", "compare_counts", "group_latents", "improvement_rate", "jaccard", "rank_biased_overlap"]
