from .inspection import inspect_dictionaries, match_latents

__all__ = ["inspect_dictionaries", "match_latents"]
