"""Every architecture of open_clip: taken apart with the bits of the model's own forward, or refused with the reason."""

import open_clip
import pytest
import torch
from every_tower import check_all
from open_clip.model import _build_vision_tower
from small_towers import make_open_clip, timm_families

from actcache.errors import ModelError
from actcache.models.refusals import ACCEPTED, REFUSED, check_tower

CONFIGS = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
LACKING = {
    name
    for name, config in CONFIGS.items()
    if config["vision_cfg"].get("timm_model_name", "test_vit") not in timm_families()
}
"""open_clip also lists architectures for which an older timm has no trunk."""


def is_plain(config: dict[str, dict[str, object]]) -> bool:
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        return timm_families()[str(vision["timm_model_name"])] in ACCEPTED
    return not isinstance(vision["layers"], list)


NAMES = [name for name, config in CONFIGS.items() if name not in LACKING and is_plain(config)]
OTHERS = [name for name in CONFIGS if name not in {*NAMES, *LACKING}]
N_PARTS = 4


@pytest.mark.parametrize("part", range(N_PARTS))
def test_every_vit_is_taken_apart_bit_for_bit(part: int) -> None:
    check_all(NAMES[part::N_PARTS], make_open_clip)


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_architecture_is_refused_with_a_reason(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        visual = _build_vision_tower(config["embed_dim"], config["vision_cfg"])
    with pytest.raises(ModelError, match=r"cannot be used: it .*Choose a plain ViT") as raised:
        check_tower(visual)
    assert any(reason in str(raised.value) for reason in REFUSED.values())
