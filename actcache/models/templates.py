"""Templates: the sentences around a class name, such as "a photo of a {}.", whose texts stand for the class."""

import os
from collections.abc import Sequence
from pathlib import Path

import open_clip

from actcache.errors import SettingsError

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of a {}.",),
    "simple": tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES),
    "openai": tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
}
"""Prompt templates by name: a single one, CLIP's best seven, and the 80 over which PatchSAE's paper averages."""


def read_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Templates from the name of a set, a text with `{}`, a file with one template per line, or a sequence.

    Raises:
        SettingsError: it is none of these, or a template does not contain exactly one `{}`.
    """
    if isinstance(templates, str):
        if templates in TEMPLATE_SETS:
            return TEMPLATE_SETS[templates]
        if os.path.isfile(templates):  # not Path's, which fails for a text that is longer than a name may be
            templates = [line.strip() for line in Path(templates).read_text().splitlines() if line.strip()]
        else:
            templates = [templates]
    for template in templates:
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            raise SettingsError(
                f"A template must contain one {{}} for the class name, got {template!r}. "
                f"Give such a text, a file of them, or one of {', '.join(TEMPLATE_SETS)}."
            )
    if not templates:
        raise SettingsError("There is no template. Give a text with {}, or a file with one template per line.")
    return tuple(templates)
