"""Images: the plan is a function of names, sizes, seed and limit; every kind of file becomes upright RGB."""

import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from actcache import HookPoint, ImageFolder, ImageSourceError, SettingsError
from actcache.preprocess import Preprocess
from actcache.sources import decode_image, resize_image
from actcache.sources.images import decode_mask


def test_listing_takes_images_and_their_class_folders(tmp_path: Path) -> None:
    for name in ("b/2.JPEG", "b/deep/3.png", "a/1.webp", ".hidden/4.png", "a/.5.png", "a/readme.txt", "a/6.jpg.bak"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12")
    table = ImageFolder(tmp_path).plan().table
    rows = {row["uri"]: row for row in table.to_pylist()}
    assert set(rows) == {"a/1.webp", "b/2.JPEG", "b/deep/3.png"}
    assert [rows[uri]["label"] for uri in sorted(rows)] == [0, 1, 1]
    assert rows["b/deep/3.png"]["label_name"] == "b"
    assert sorted(row["source_index"] for row in rows.values()) == [0, 1, 2]
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "x.png").write_bytes(b"1")
    assert ImageFolder(flat).plan().table.to_pylist()[0]["label"] == -1


def test_the_order_is_a_seeded_permutation_and_limit_its_prefix(tiny_images: Path) -> None:
    source = ImageFolder(tiny_images)
    whole = source.plan().table["uri"].to_pylist()
    assert sorted(whole) != whole
    assert len(set(whole)) == 75
    assert source.plan().table["uri"].to_pylist() == whole
    assert source.plan(limit=10).table["uri"].to_pylist() == whole[:10]
    assert source.plan(seed=1).table["uri"].to_pylist() != whole


def test_a_limit_or_a_seed_that_means_nothing_is_refused(tiny_images: Path) -> None:
    for limit in (0, -3):
        with pytest.raises(SettingsError, match=f"--limit must be at least 1, got {limit}"):
            ImageFolder(tiny_images).plan(limit=limit)
    with pytest.raises(SettingsError, match="--seed"):
        ImageFolder(tiny_images).plan(seed=-1)
    assert ImageFolder(tiny_images).plan(limit=1000).n_images == 75


def test_links_are_followed_but_not_in_circles(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    elsewhere = make_images(tmp_path / "elsewhere", 4, n_classes=1)
    images = make_images(tmp_path / "images", 6)
    (images / "linked").symlink_to(elsewhere / "class0")
    (images / "class0" / "loop").symlink_to("..")
    assert ImageFolder(images).plan().n_images == 10
    (images / "class0" / "gone.png").symlink_to("nowhere")
    with pytest.raises(ImageSourceError, match=r"class0/gone\.png cannot be read"):
        ImageFolder(images).plan()


def test_a_name_that_is_not_text_is_refused(tmp_path: Path) -> None:
    try:
        with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
            file.write(b"1")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(ImageSourceError, match="not a UTF-8 file name"):
        ImageFolder(tmp_path).plan()


@pytest.mark.parametrize("kind", ["absent", "file", "empty"])
def test_a_source_without_images_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "images"
    if kind == "file":
        path.write_text("x")
    elif kind == "empty":
        path.mkdir()
        (path / "readme.txt").write_text("x")
    with pytest.raises(ImageSourceError, match="holds no images" if kind == "empty" else "not a directory"):
        ImageFolder(path).plan()


def test_rows_id_names_images_and_order_not_the_place(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    images = make_images(tmp_path / "a", 6)
    first = ImageFolder(images).plan().rows_id
    assert ImageFolder(shutil.copytree(images, tmp_path / "b")).plan().rows_id == first
    assert ImageFolder(images).plan(seed=1).rows_id != first
    assert ImageFolder(images).plan(limit=5).rows_id != first
    (images / "class0" / "0000.png").write_bytes((images / "class0" / "0000.png").read_bytes() + b"x")
    assert ImageFolder(images).plan().rows_id != first


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "LA", "P", "1", "I;16"])
def test_every_mode_becomes_rgb_without_a_warning(tmp_path: Path, mode: str) -> None:
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 6, 3), dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.arange(48, dtype=np.uint16).reshape(8, 6) * 1365)
    elif mode == "P":
        image = rgb.quantize(8)
        image.info["transparency"] = bytes(range(8))
    else:
        image = rgb.convert(mode)
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(path)
    decoded = decode_image(path)
    assert decoded.mode == "RGB"
    assert decoded.size == (6, 8)
    if mode in ("L", "RGBA"):
        np.testing.assert_array_equal(np.array(decoded), np.array(image.convert("RGB")))


def test_sixteen_bit_gray_keeps_its_upper_byte(tmp_path: Path) -> None:
    gray = np.arange(48, dtype=np.uint16).reshape(8, 6) * 1365  # up to 64,155
    Image.fromarray(gray).save(tmp_path / "x.png")
    np.testing.assert_array_equal(np.array(decode_image(tmp_path / "x.png")), (gray // 256)[..., None].repeat(3, 2))


def test_a_palettes_colors_are_looked_up(tmp_path: Path) -> None:
    indices = np.arange(48, dtype=np.uint8).reshape(8, 6) % 3
    colors = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30]], dtype=np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putpalette(colors.tobytes())
    image.save(tmp_path / "x.png", transparency=b"\x00\x80\xff")
    np.testing.assert_array_equal(np.array(decode_image(tmp_path / "x.png")), colors[indices])


def test_a_thin_image_is_cut_like_any_other() -> None:
    preprocess = Preprocess(size=(24, 24))
    assert resize_image(Image.new("RGB", (1, 2000)), preprocess).size == (24, 24)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to show
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    decoded = np.array(decode_image(tmp_path / "x.png"))
    np.testing.assert_array_equal(decoded, np.rot90(pixels, -1))


def test_webp_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (5, 4), (10, 200, 30)).save(tmp_path / "x.webp", lossless=True)
    assert np.array(decode_image(tmp_path / "x.webp"))[0, 0].tolist() == [10, 200, 30]


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "missing"])
def test_an_unreadable_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.jpg"
    if kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif kind != "missing":
        path.write_text("not an image" if kind == "text" else "")
    with pytest.raises(ImageSourceError, match=r"^bad\.jpg cannot be read: ") as caught:
        decode_image(path)
    assert str(tmp_path) not in str(caught.value)
    if kind != "missing":
        with pytest.raises(ImageSourceError, match=r"^a/bad\.jpg cannot be read: ") as caught:
            decode_image(path.read_bytes(), name="a/bad.jpg")
        assert "BytesIO" not in str(caught.value)


def test_bytes_are_decoded_as_their_file_is(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 6, 3), dtype=np.uint8)).save(tmp_path / "x.jpg")
    from_bytes = decode_image((tmp_path / "x.jpg").read_bytes())
    np.testing.assert_array_equal(np.array(from_bytes), np.array(decode_image(tmp_path / "x.jpg")))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("palette", [False, True])
def test_masks_keep_their_numbers(tmp_path: Path, bits: int, palette: bool) -> None:
    if palette and bits == 16:
        pytest.skip("a palette has at most 256 colors")
    top = min(1 << bits, 256)
    values = np.arange(12, dtype=np.uint16).reshape(3, 4) * 37 % top
    data = encode_png(values, bits, palette)
    mask = decode_mask(data)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, values)
    (tmp_path / "m.png").write_bytes(data)
    np.testing.assert_array_equal(decode_mask(tmp_path / "m.png"), values)


def encode_png(values: NDArray[np.uint16], bits: int, palette: bool) -> bytes:
    """A PNG [H, W] written from its specification, since PIL does not write 2 and 4 bits of gray."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = values.shape
    planes = (values[..., None] >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(planes.reshape(height, -1).astype(np.uint8), axis=1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, 3 if palette else 0, 0, 0, 0)
    colors = chunk(b"PLTE", bytes(range(255, -1, -1))[: 1 << bits] * 3) if palette else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + colors
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def test_what_is_no_mask_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (3, 3)).save(tmp_path / "color.png")
    Image.new("L", (3, 3)).save(tmp_path / "gray.jpg")
    Image.fromarray(np.full((3, 3), 300, dtype=np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("x")
    cases = {
        "color.png": "palette or gray PNG, but this is PNG RGB",
        "gray.jpg": "but this is JPEG L",
        "deep.png": "numbers up to 255, but this one has 300",
        "text.png": "it is not an image",
        "gone.png": "No such file",
    }
    for name, reason in cases.items():
        with pytest.raises(ImageSourceError, match=f"^{name} cannot be read: .*{reason}"):
            decode_mask(tmp_path / name)


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (97, 411), (64, 64), (33, 48)])
def test_resizing_is_what_the_models_own_transform_does(size: tuple[int, int]) -> None:
    import open_clip

    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    for mode in ("shortest", "squash", "longest"):
        config = open_clip.transform.PreprocessCfg(size=48, resize_mode=mode)
        steps = open_clip.transform.image_transform_v2(config, is_train=False).transforms
        expected = image
        for step in steps:
            after = step(expected)
            if not isinstance(after, Image.Image):  # from here on, tensors
                break
            expected = after
        ours = resize_image(image, Preprocess.from_json(vars(config)))
        assert ours.size == expected.size == (48, 48)
        np.testing.assert_array_equal(np.array(ours), np.array(expected), err_msg=mode)


@given(st.integers(0, 99))
def test_hook_points_round_trip(layer: int) -> None:
    hook = HookPoint(layer)
    assert str(hook) == f"blocks.{layer}.hook_resid_post"
    assert HookPoint.parse(str(hook)) == hook


def test_other_hook_points_are_refused() -> None:
    for text in ("blocks.x.hook_resid_post", "blocks.1.hook_resid_pre", "resblocks.1", ""):
        with pytest.raises(SettingsError):
            HookPoint.parse(text)
    with pytest.raises(SettingsError, match="--layer must be at least 0"):
        HookPoint(-1)
