"""Prompt checkpoints whose names and numbers of blocks are hostile are refused in one line."""

from pathlib import Path

import pytest
import torch

from actcache import ModelError
from actcache.models import load_clip
from actcache.prompts import open_prompts

DEEP = "image_encoder.transformer.resblocks.{}.VPT_shallow"
NAMES = {
    "5,000 digits": DEEP.format("9" * 5000),
    "5 digits": DEEP.format("99999"),
    "digits of another script": DEEP.format("\u0661"),
    "compound prompts of 5,000 digits": f"prompt_learner.compound_prompts_text.{'1' * 5000}",
    "control characters": DEEP.format("1\x1b[2J\n"),
    "no text": 7,
    "a gap": DEEP.format(2),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_model_has_is_one_line(tmp_path: Path, tiny_model: dict[str, str], name: str) -> None:
    state = {"image_encoder.VPT": torch.zeros(2, 32), NAMES[name]: torch.zeros(2, 32)}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "model.pth.tar-1")
    with pytest.raises(ModelError) as caught:
        open_prompts(tmp_path / "model.pth.tar-1", load_clip(**tiny_model))
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 500
