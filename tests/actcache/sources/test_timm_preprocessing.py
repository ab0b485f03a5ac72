"""What is shown and masked of an image is what timm's transform gives the model, for every kind in its registry."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from actcache.errors import CorruptError
from actcache.models.preprocessing import make_preprocess, make_transform, read_timm
from actcache.preprocess import Preprocess
from actcache.sources import decode_image, resize_image, resize_mask

SIZES = [(40, 40), (57, 31), (31, 58), (200, 120), (33, 64), (500, 333)]


def kinds() -> list[dict[str, Any]]:
    """The distinct ways in which timm resizes and crops for its vision transformers, each at two small sizes."""
    found = {}
    for name in timm.list_models("*vit*", pretrained=True) + timm.list_models("*eva*", pretrained=True):
        fields = read_timm(timm.get_pretrained_cfg(name).to_dict())
        key = (fields["interpolation"], fields["crop_mode"], fields["crop_pct"])
        found[key] = {**fields, "mean": [0.0] * 3, "std": [1.0] * 3}
    found["border"] = {**fields, "crop_mode": "border", "crop_pct": 0.9, "std": [1.0] * 3}
    found["padded"] = {**fields, "crop_mode": "border", "crop_pct": 1.0, "std": [1.0] * 3}
    return [{**fields, "size": size} for fields in found.values() for size in ([32, 32], [24, 40])]


@pytest.mark.parametrize("fields", kinds(), ids=lambda f: f"{f['interpolation']} {f['crop_mode']} {f['crop_pct']}")
def test_pixels_are_timms_own(fields: dict[str, Any]) -> None:
    preprocess = make_preprocess(fields, "test")
    steps = {key: value for key, value in fields.items() if key not in ("library", "size")}
    own = timm.data.create_transform(input_size=(3, *fields["size"]), is_training=False, **steps)
    ours = make_transform(preprocess)
    for width, height in SIZES:
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        assert torch.equal(ours(image), own(image))
        shown = torch.from_numpy(np.asarray(resize_image(image, preprocess)).copy()).permute(2, 0, 1) / 255
        normal = (shown - torch.tensor(fields["mean"])[:, None, None]) / torch.tensor(fields["std"])[:, None, None]
        torch.testing.assert_close(normal, own(image), rtol=0, atol=1e-6)  # less than 1/255: the same bytes
    mask = np.zeros((100, 100), np.uint8)
    mask[:50, :50] = 7
    cut = resize_mask(mask, preprocess)
    assert cut.shape == tuple(fields["size"])
    assert set(np.unique(cut)) <= {0, 7}
    assert cut[8, 8] == 7
    assert cut[-8, -8] == 0


@pytest.mark.parametrize("size", [[32, 32], [24, 40]])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_a_strip_is_seen_by_the_transform_as_it_is_shown(crop_mode: str, size: list[int], tmp_path: Any) -> None:
    preprocess = make_preprocess(
        {"library": "timm", "size": size, "mean": [0.5] * 3, "std": [1.0] * 3, "interpolation": "bicubic",
         "crop_pct": 0.9, "crop_mode": crop_mode}, "test",
    )  # fmt: skip
    gradient = np.linspace(0, 255, 4000).astype(np.uint8)
    image = Image.fromarray(np.repeat(np.repeat(gradient[None, :, None], 100, 0), 3, 2))
    image.save(tmp_path / "strip.png")
    decoded = decode_image(tmp_path / "strip.png", preprocess=preprocess)
    assert decoded.size == preprocess.scale[::-1]
    seen = make_transform(preprocess)(decoded)
    shown = torch.from_numpy(np.asarray(resize_image(decoded, preprocess)).copy()).permute(2, 0, 1) / 255 - 0.5
    torch.testing.assert_close(seen, shown, rtol=0, atol=1e-6)
    whole = make_transform(preprocess)(image)  # 4,000 pixels are few enough for timm itself
    torch.testing.assert_close(seen, whole, rtol=0, atol=3 / 255)


def test_both_spellings_are_stored_and_read() -> None:
    old = Preprocess((224, 224)).to_json()
    assert list(old) == ["size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"]
    assert Preprocess.from_json(old) == Preprocess((224, 224))
    new = make_preprocess({**read_timm({"crop_pct": 0.9}), "size": [224, 224]}, "test")
    assert set(new.to_json()) == {"library", "size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
    assert Preprocess.from_json(new.to_json()) == new
    assert new.scale == (248, 248)


@pytest.mark.parametrize(
    "bad",
    [{"library": "timm"}, {"crop_pct": 0.9}, {"library": "timm", "crop_pct": 0.9},
     {"library": "timm", "crop_pct": 0, "crop_mode": "center"}, {"library": "torch"},
     {"library": "timm", "crop_pct": 0.9, "crop_mode": "random"}],
    ids=str,
)  # fmt: skip
def test_a_spelling_that_is_neither_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(CorruptError):
        Preprocess.from_json({"size": [224, 224], **bad})
