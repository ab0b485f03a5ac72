"""The variants of an SAE, one module each.

A new variant is a module here, named as the variant, that defines VARIANT, and a line in `saetrain.config.VARIANTS`.
"""

from importlib import import_module

from saetrain.model.variants.variant import Variant


def find_variant(name: str) -> Variant:
    variant: Variant = import_module(f"saetrain.model.variants.{name}").VARIANT
    return variant
