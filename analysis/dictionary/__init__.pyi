from .inspection import Inspection, Matching, inspect_dictionaries, match_latents

__all__ = ["Inspection", "Matching", "inspect_dictionaries", "match_latents"]
