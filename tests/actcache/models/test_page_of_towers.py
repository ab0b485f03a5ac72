"""docs/reference/towers.md says which towers are refused, and the kinds of special tokens of those that are taken."""

import re
from pathlib import Path

import pytest
from small_towers import make_open_clip, make_timm, timm_families

from actcache.hook_point import SITES
from actcache.models import PROMPTS_REFUSED, take_apart
from actcache.models.blocks import find_sites
from actcache.models.refusals import REFUSED
from actcache.prompts.methods import METHODS

PAGE = (Path(__file__).parents[3] / "docs" / "reference" / "towers.md").read_text()


def rows_of(section: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in PAGE.split(f"## {section}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_the_page_lists_every_refusal_with_its_reason() -> None:
    shown = {family: reason for reason, names in rows_of("What is refused") for family in re.findall(r"`(\w+)`", names)}
    assert shown == REFUSED


EXAMPLES = {
    "CLIP, CLIPA": "ViT-L-14-CLIPA",
    "SigLIP": "ViT-B-16-SigLIP2",
    "ViT, CLIP, DeiT": "vit_base_patch16_224",
    "distilled DeiT": "deit_small_distilled_patch16_224",
    "DINOv2 with registers": "vit_base_patch14_reg4_dinov2",
    "ViTs with registers alone": "naflexvit_base_patch16_gap",
    "EVA": "eva02_large_patch14_clip_224",
    "BEiT": "beitv2_base_patch16_224",
    "ViTs with relative positions": "vit_relpos_base_patch16_224",
    "ViTs with a ResNet": "vit_base_r50_s16_224",
    "ViTs with parallel branches": "vit_base_patch16_xp_224",
}


@pytest.mark.parametrize("start", EXAMPLES)
def test_the_page_is_right_about_an_example_of_every_row(start: str) -> None:
    rows = [row for row in rows_of("What is taken") if row[0].startswith(start)]
    assert len(rows) == 1
    _, prefix, sites, prompts = rows[0]
    name = EXAMPLES[start]
    body = take_apart((make_timm if name in timm_families() else make_open_clip)(name).eval())
    kinds = set(re.findall(r"cls|dist|reg", prefix))
    assert set(body.prefix) <= kinds or prefix == "by name"
    assert set(body.prefix) == kinds or "none" in prefix or prefix == "by name"
    assert find_sites(body.blocks) == (SITES if sites == "all" else (sites,))
    assert body.takes_prompts == (prompts == "yes")


def test_every_row_has_an_example() -> None:
    assert len(rows_of("What is taken")) == len(EXAMPLES)


def test_the_page_says_which_prompts_are_refused_and_why() -> None:
    shown = {reason: set(methods.split(", ")) for reason, methods, _ in rows_of("Prompts")}
    images = {method for method, kind in METHODS.items() if kind.adapts_images}
    texts = {method for method, kind in METHODS.items() if kind.text is not None}
    assert shown == {reason: images if key == "pairs" else texts for key, reason in PROMPTS_REFUSED.items()}
