from .probing import probe_latents

__all__ = ["probe_latents"]
