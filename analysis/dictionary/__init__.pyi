from .inspection import PairedLatents, inspect_dictionaries, pair_latents

__all__ = ["PairedLatents", "inspect_dictionaries", "pair_latents"]
