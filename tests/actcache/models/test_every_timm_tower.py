"""Every name of timm: taken apart with the bits of the model's own forward, or refused with the reason."""

import re

import pytest
import timm
import torch
from every_tower import check_all
from small_towers import make_timm, timm_families

from actcache.errors import ModelError
from actcache.models.refusals import ACCEPTED, REFUSED, check_family, check_tower

FAMILIES = timm_families()
NAMES = [name for name, family in FAMILIES.items() if family in ACCEPTED]
N_PARTS = 12


@pytest.mark.parametrize("part", range(N_PARTS))
def test_every_vit_is_taken_apart_bit_for_bit(part: int) -> None:
    check_all(NAMES[part::N_PARTS], make_timm)


def test_every_other_name_is_refused_with_a_reason() -> None:
    assert set(FAMILIES) == set(timm.list_models())
    for name, family in FAMILIES.items():
        if family not in ACCEPTED:
            with pytest.raises(ModelError, match=rf"{name} cannot be used: it \w.*Choose a plain ViT"):
                check_family(name, family)


@pytest.mark.parametrize("family", sorted(set(FAMILIES.values()) - set(ACCEPTED)))
def test_a_model_of_a_refused_family_is_refused_by_its_class(family: str) -> None:
    name = min((name for name in FAMILIES if FAMILIES[name] == family), key=len)
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
    except NotImplementedError:  # RegNet of an older timm computes its widths on the device
        model = timm.create_model(name, pretrained=False)
    with pytest.raises(ModelError, match=f"^{type(model).__name__} cannot be used: it ") as raised:
        check_tower(model)
    assert any(reason in str(raised.value) for reason in REFUSED.values())
    assert re.search(r"\. Choose a plain ViT", str(raised.value))
