"""look: images through a tower and an SAE by the real command, against codes of a store and against plain formulas."""

import base64
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

import cli
from actcache import HookPoint, ImageSourceError, SettingsError
from actcache.models import load_clip
from actcache.preprocess import Preprocess
from actcache.sources import resize_image
from analysis import Look, heat_maps, look, publish, query_image
from analysis.config import TowerOptions
from analysis.views.tower import _describe_hint
from saetrain import CodeStore
from saetrain.interop import name_tower

GOLDEN = Path(__file__).parents[2] / "golden" / "pipeline"
F, LAYER = 40, 1
MODEL = "--precision float32 --device cpu"


def ask(*words: object) -> Any:
    return CliRunner().invoke(cli.app, [*map(str, words), "--precision", "float32", "--device", "cpu"])


def name_all(checkpoint: Path, model: dict[str, str]) -> list[str]:
    """The flags that name an SAE and its tower."""
    return ["--sae", str(checkpoint), *(f"--{name}={value}" for name, value in model.items()), "--preprocess=default"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photo.png: 60 x 30, a white patch of the model's in the upper left corner of its center, gray elsewhere; and
    four images of the model's size, each with one white corner.
    """
    folder = tmp_path_factory.mktemp("pictures")
    wide = np.full((30, 60, 3), 90, np.uint8)
    wide[:10, 15:25] = 255
    Image.fromarray(wide).save(folder / "photo.png")
    for row, column in ((0, 0), (0, 2), (2, 0), (2, 2)):
        corner = np.full((24, 24, 3), 90, np.uint8)
        corner[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 255
        Image.fromarray(corner).save(folder / f"corner{row}{column}.png")
    return folder


def plain_stream(model: dict[str, str], file: Path, layer: int) -> torch.Tensor:
    """[T, D]: the output of a block, by a hook on open_clip's own module."""
    clip = load_clip(**model, preprocess_as="default")
    kept: list[torch.Tensor] = []
    block = clip.module.visual.transformer.resblocks[layer]
    handle = block.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad(), Image.open(file) as image:
        clip.module.encode_image(clip.transform(image)[None])
    handle.remove()
    return kept[0][0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: dict[str, str], pictures: Path) -> Path:
    """saev's SAE whose latent 7 reads how white a patch is at block 1: the direction from gray to white patches."""
    from foreign_files import plain_tensors, saev_config, write_saev

    tensors = plain_tensors(unit=True)
    stream = plain_stream(tiny_model, pictures / "corner00.png", LAYER)
    direction = stream[1] - stream[2:].mean(0)
    direction /= direction.norm()
    tensors["W_enc"][:, 7] = direction
    tensors["b_enc"][7] = -float((stream[2:] @ direction).max())
    return write_saev(tmp_path_factory.mktemp("sae") / "layer_1", saev_config("Relu"), tensors)


def plain_codes(checkpoint: Path, stream: torch.Tensor) -> NDArray[Any]:
    """[T, F]: relu(x W_enc + b_enc), from the file itself, in the units of decoder rows of norm 1."""
    data = (checkpoint / "sae.pt").read_bytes()
    weights = torch.load(io.BytesIO(data[data.index(b"\n") + 1 :]), weights_only=True)
    codes = (stream.double() @ weights["W_enc"].double() + weights["b_enc"].double()).relu()
    return np.asarray(codes)


# ---------------------------------------------------------------------------------------------------------------------
# A run of ours


def test_a_run_sees_what_its_codes_say(tiny_run: Path, tiny_codes: Path, tiny_images: Path) -> None:
    codes = CodeStore.open(tiny_codes)
    for position in (0, 40):
        uri = codes.images["uri"][position].as_py()
        done = ask("--json", "look", tiny_images / uri, "--sae", tiny_run, "--n-top", 5)
        assert done.exit_code == 0, done.output
        answer = json.loads(done.stdout)
        assert answer["hook_point"] == "blocks.2.hook_resid_post"
        assert answer["notes"] == []
        rows = answer["images"][0]["rows"]
        wanted = query_image(codes, position, n_top=5).to_pylist()
        assert [row["latent"] for row in rows] == [row["latent"] for row in wanted]
        for row, other in zip(rows, wanted, strict=True):  # the codes were made from float16, and are stored so
            assert row["score"] == pytest.approx(other["score"], rel=0.01, abs=1e-3)
            assert row["peak"] == pytest.approx(other["peak"], rel=0.01, abs=1e-3)
            heat = heat_maps(codes, row["latent"], np.array([position]))[0]
            assert row["share"] == pytest.approx(np.count_nonzero(heat) / heat.size)
            if row["at"] != "CLS":
                assert heat[row["row"], row["column"]] == heat.max()


def test_in_python_the_whole_map_is_the_stored_one(tiny_run: Path, tiny_codes: Path, tiny_images: Path) -> None:
    codes, positions = CodeStore.open(tiny_codes), [3, 17, 60, 61, 62, 63, 64, 65, 66]  # more than one batch
    uris = [codes.images["uri"][i].as_py() for i in positions]
    seen = look([tiny_images / uri for uri in uris], tiny_run, precision="float32", device="cpu")
    assert isinstance(seen, Look)
    assert [view.image for view in seen] == [str(tiny_images / uri) for uri in uris]
    for latent in (0, 19, 63):
        stored = heat_maps(codes, latent, np.array(positions))
        np.testing.assert_allclose([view.heat_map(latent) for view in seen], stored, rtol=0.01, atol=2e-3)
    html = seen._repr_html_()
    assert html.count("<figure") == len(seen) + sum(seen.table(view).num_rows for view in seen)
    assert "<script" not in html


def test_names_of_the_concepts_beside_the_run_are_shown(tmp_path: Path) -> None:
    golden = Path(__file__).parents[2] / "golden" / "pipeline"
    for name in ("a.acts", "run", "a.codes", "a.concepts", "model", "images"):
        shutil.copytree(golden / name, tmp_path / name)
    words = ("look", tmp_path / "images/class0/00.png", "--sae", tmp_path / "run", "--latent", 19, "--latent", 3)
    named = CliRunner().invoke(cli.app, ["name", f"{tmp_path}/a.concepts", "--set", "19=pale <i>stripes</i>"])
    assert named.exit_code == 0, named.output
    page = tmp_path / "x.html"
    rows = json.loads(ask("--json", *words, "--out", page).stdout)["images"][0]["rows"]
    assert (rows[0]["latent"], rows[0]["name"]) == (19, "pale <i>stripes</i>")
    assert "pale &lt;i&gt;stripes" in page.read_text()
    assert "<i>stripes" not in page.read_text()
    (tmp_path / "a.concepts").rename(tmp_path / "elsewhere")
    assert "name" not in json.loads(ask("--json", *words).stdout)["images"][0]["rows"][0]
    again = ask("--json", *words, "--concepts", tmp_path / "elsewhere")
    assert json.loads(again.stdout)["images"][0]["rows"][0]["name"] == "pale <i>stripes</i>"


def test_a_run_finds_its_tower_or_says_what_to_name(
    tmp_path: Path, tiny_run: Path, tiny_store: Path, tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    run, image = Path(shutil.copytree(tiny_run, tmp_path / "deep" / "er" / "run")), next(tiny_images.glob("*/*.png"))
    (run / "places.json").unlink()
    lost = ask("look", image, "--sae", run)
    assert lost.exit_code == 1
    assert "does not name its model. Name them with --model and --pretrained" in lost.stderr
    found = ask("--json", "look", image, "--sae", run, "--store", tiny_store)
    assert found.exit_code == 0, found.output
    named = ask("--json", "look", image, "--sae", run, "--model", tiny_model["model"], "--pretrained",
                tiny_model["pretrained"], "--preprocess", "default")  # fmt: skip
    assert named.exit_code == 0, named.output
    assert json.loads(named.stdout)["images"] == json.loads(found.stdout)["images"]
    other = ask("look", image, "--sae", run, "--model", tiny_model["model"], "--pretrained", "random:5")
    assert other.exit_code == 1
    assert "is not the model that" in other.stderr
    assert other.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint of another package


def test_the_white_corner_lies_where_it_should(
    pictures: Path, checkpoint: Path, tiny_model: dict[str, str], tmp_path: Path
) -> None:
    words = name_all(checkpoint, tiny_model)
    for file, place in {"corner00": (0, 0), "corner02": (0, 2), "corner20": (2, 0), "corner22": (2, 2),
                        "photo": (0, 0)}.items():  # fmt: skip
        image, sheet = pictures / f"{file}.png", tmp_path / f"{file}.png"
        done = ask("--json", "look", image, *words, "--latent", 7, "--out", sheet)
        assert done.exit_code == 0, done.output
        row = json.loads(done.stdout)["images"][0]["rows"][0]
        assert (row["row"], row["column"]) == place
        codes = plain_codes(checkpoint, plain_stream(tiny_model, image, LAYER))
        assert row["peak"] == pytest.approx(codes[1:, 7].max(), rel=1e-4)
        assert row["score"] == pytest.approx(codes[:, 7].mean(), rel=1e-4)
        view = look(image, checkpoint, **tiny_model, preprocess="default", precision="float32", device="cpu")[0]
        np.testing.assert_allclose(view.heat_map(7), codes[1:, 7].reshape(3, 3), rtol=1e-3, atol=1e-5)
        with Image.open(image) as opened:
            expected = resize_image(opened.convert("RGB"), Preprocess(size=(24, 24)))
        assert (np.asarray(view.picture) == np.asarray(expected)).all()  # the map lies over what the model saw
        with Image.open(sheet) as drawn:
            second = np.asarray(drawn, float)[12 : 12 + 224, 12 + 224 + 8 :][:, :224].mean(2)
        cells = second[: 3 * 74, : 3 * 74].reshape(3, 74, 3, 74)[:, 10:-10, :, 10:-10].mean((1, 3))
        assert np.unravel_index(cells.argmax(), (3, 3)) == place
        others = np.delete(cells.ravel(), cells.argmax())
        assert cells.max() > 200
        assert others.max() < 80  # the gray ones are darkened


def test_a_patch_a_region_and_several_images(pictures: Path, checkpoint: Path, tiny_model: dict[str, str]) -> None:
    files = [pictures / "corner02.png", pictures / "corner20.png"]
    how: dict[str, Any] = {**tiny_model, "preprocess": "default", "precision": "float32", "device": "cpu"}
    words = name_all(checkpoint, tiny_model)
    done = ask("--json", "look", *files, *words, "--at", "0:2,2", "--n-top", F)
    assert done.exit_code == 0, done.output
    answers = json.loads(done.stdout)["images"]
    assert [answer["image"] for answer in answers] == list(map(str, files))
    for file, answer in zip(files, answers, strict=True):
        codes = plain_codes(checkpoint, plain_stream(tiny_model, file, LAYER))[[3, 6]]  # patches (0, 2) and (1, 2)
        shown = {row["latent"]: row for row in answer["rows"]}
        assert set(shown) == set(np.flatnonzero(codes.max(0)))
        for latent, row in shown.items():
            assert row["score"] == pytest.approx(codes[:, latent].mean(), rel=1e-3)
            assert row["peak"] == pytest.approx(codes[:, latent].max(), rel=1e-3)
        scores = [row["score"] for row in answer["rows"]]
        assert scores == sorted(scores, reverse=True)
    one = look(files[0], checkpoint, **how).views[0].strongest(3, at=(0, 2))
    assert set(one["at"].to_pylist()) == {"0,2"}
    outside = ask("look", files[0], *words, "--at", "3,0")
    assert (outside.exit_code, outside.stderr.count("\n")) == (1, 1)
    assert "0..2" in outside.stderr
    both = ask("look", files[0], *words, "--at", "0,0", "--latent", "3")
    assert "--latent does not go with --at" in both.stderr


def test_what_is_not_known_is_asked_for(
    pictures: Path, checkpoint: Path, tiny_model: dict[str, str], tmp_path: Path
) -> None:
    from foreign_files import plain_tensors, saev_config, write_saev

    image, model = pictures / "photo.png", [f"--{name}={value}" for name, value in tiny_model.items()]
    unknown = ask("look", image, "--sae", checkpoint)
    assert "does not say which model it reads" in unknown.stderr
    guessed = ask("--json", "look", image, "--sae", checkpoint, *model, "--preprocess", "default")
    assert json.loads(guessed.stdout)["notes"] == [
        "Its settings do not name the layer. That it reads blocks.1.hook_resid_post is guessed."
    ]
    other = ask("--json", "look", image, "--sae", checkpoint, *model, "--preprocess", "default", "--layer", 0)
    notes = json.loads(other.stdout)["notes"]
    assert notes == ["It names blocks.1.hook_resid_post; you asked for blocks.0.hook_resid_post."]
    nameless = write_saev(tmp_path / "sae", saev_config("Relu"), plain_tensors())
    assert "which layer" in ask("look", image, "--sae", nameless, *model, "--preprocess", "default").stderr
    far = ask("look", image, "--sae", nameless, *model, "--preprocess", "default", "--layer", 9)
    assert "blocks 0..2" in far.stderr
    assert "There is no latent 40" in ask("look", image, "--sae", checkpoint, *model, "--preprocess", "default",
                                          "--latent", F).stderr  # fmt: skip


def test_an_input_that_needs_constants_is_refused_with_the_flags(
    pictures: Path, tiny_model: dict[str, str], tmp_path: Path
) -> None:
    from foreign_files import plain_tensors

    buffer = io.BytesIO()
    torch.save(plain_tensors(), buffer)
    folder = tmp_path / "layer_1"
    folder.mkdir()
    (folder / "sae.pt").write_bytes(b'{"d_vit": 32, "exp_factor": 1}\n' + buffer.getvalue())  # saev's first release
    words = ["look", pictures / "photo.png", "--sae", folder, "--preprocess", "default"]
    words += [f"--{name}={value}" for name, value in tiny_model.items()]
    refused = ask(*words)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "--input-mean and --input-scale" in refused.stderr
    assert "convert --store" in refused.stderr
    assert ask(*words, "--input-mean", "0", "--input-scale", "1").exit_code == 0


def test_an_sae_of_image_embeddings_is_refused(pictures: Path, tiny_model: dict[str, str], tmp_path: Path) -> None:
    from foreign_files import CHECKPOINTS

    write, config, tensors = CHECKPOINTS["discover_then_name"]
    folder = write(tmp_path / "sae", config(), tensors())
    done = ask("look", pictures / "photo.png", *name_all(folder, tiny_model), "--layer", 1)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "reads the embedding of a whole image" in done.stderr


def test_a_broken_image_is_one_line_and_nothing_is_written(
    pictures: Path, checkpoint: Path, tiny_model: dict[str, str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes((pictures / "photo.png").read_bytes()[:60])
    words = name_all(checkpoint, tiny_model)
    done = ask("look", pictures / "photo.png", broken, *words, "--out", tmp_path / "x.png")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert f"{broken} cannot be read" in done.stderr
    assert not (tmp_path / "x.png").exists()
    assert "does not exist" in ask("look", tmp_path / "nowhere.png", *words).stderr
    assert "must end in" in ask("look", pictures / "photo.png", *words, "--out", tmp_path / "x.gif").output
    with pytest.raises(ImageSourceError):
        look(broken, checkpoint, **tiny_model, preprocess="default")
    with pytest.raises(SettingsError, match="1 to 200 images"):
        look([], checkpoint)


def test_a_page_shows_every_heat_map_and_needs_no_network(
    pictures: Path, checkpoint: Path, tiny_model: dict[str, str], tmp_path: Path
) -> None:
    page = tmp_path / "x.html"
    seen = look(sorted(pictures.glob("corner*.png")), checkpoint, latents=[7, 3], at=None, **tiny_model,
                preprocess="default", precision="float32", device="cpu")  # fmt: skip
    text = seen.draw(page).read_text()
    assert not re.search(r'(?:src|href)="https?:', text)
    maps = re.findall(r'class="heat"[^>]* alt="heat map of latent (\d+)" src="data:image/png;base64,([^"]+)"', text)
    assert [int(latent) for latent, _ in maps] == [7, 3] * 4
    alphas = []
    for latent, data in maps:
        if latent == "7":
            (tmp_path / "heat.png").write_bytes(base64.b64decode(data))
            with Image.open(tmp_path / "heat.png") as heat:
                alphas.append(np.asarray(heat.getchannel("A")))
    assert [np.unravel_index(alpha.argmin(), (3, 3)) for alpha in alphas] == [(0, 0), (0, 2), (2, 0), (2, 2)]
    assert min(alpha.min() for alpha in alphas) == 0  # one scale: only the strongest of the four is transparent
    assert len(json.loads(text.split('id="pictures">')[1].split("</script>")[0])) == 4  # each picture once


def test_a_published_sae_of_a_tower_in_files_is_held_to_it(pictures: Path, tmp_path: Path) -> None:
    folder = Path(publish(GOLDEN / "run", tmp_path / "repo").address)
    several = ask("look", pictures / "photo.png", "--sae", tmp_path / "repo")
    assert f"its folders do ({folder.name!r})" in several.stderr
    asked = ask("look", pictures / "photo.png", "--sae", folder)
    assert "was read from 'tiny.json' and 'tiny.safetensors', which it does not hold" in asked.stderr
    card = (folder / "README.md").read_text()
    command = next(line for line in card.splitlines() if line.startswith("patchsae look"))
    flags = shlex.split(command)[5:]
    assert flags == ["--model", "tiny.json", "--pretrained", "tiny.safetensors"]
    model = GOLDEN / "model"
    own = {"--model": str(model / "tiny.json"), "--pretrained": str(model / "tiny.safetensors")}
    found = ask("look", pictures / "photo.png", "--sae", folder, *(word for flag in own.items() for word in flag))
    assert found.exit_code == 0
    assert "trained on" not in found.stdout
    shown = shlex.join([word for flag in own.items() for word in flag])
    assert f"--out look.html {shown} --precision float32 --device cpu" in found.stderr
    other = look(pictures / "photo.png", folder, model=own["--model"], pretrained="random:0")
    assert other.notes == (
        "This is not the tower that it was trained on: architecture, weights or preprocessing differ.",
    )


def test_other_weights_than_the_settings_name_are_noted(tmp_path: Path) -> None:
    from foreign_files import D, F, plain_tensors, write_prisma

    named = {"model_name": "open-clip:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "hook_point_layer": 1, "d_in": D,
             "d_sae": F, "architecture": "standard", "normalize_activations": None}  # fmt: skip
    hint = name_tower("prisma", write_prisma(tmp_path / "sae", named, plain_tensors()))
    assert hint is not None
    for options, differs in (
        (TowerOptions(), False), (TowerOptions(pretrained="random:0"), True),
        (TowerOptions(model=hint.model, pretrained=hint.pretrained), False), (TowerOptions(model="ViT-B-32"), True),
    ):  # fmt: skip
        assert any("you named another model" in note for note in _describe_hint(hint, options, "x")) is differs


def test_a_model_of_another_kind_is_named_in_the_answer(pictures: Path, tmp_path: Path) -> None:
    from foreign_files import write

    asked = ask("look", pictures / "photo.png", "--sae", write("saelens 5 relu", tmp_path / "sae"))
    assert "It names the model 'gpt2-small', by which no weights are known here." in asked.stderr


# ---------------------------------------------------------------------------------------------------------------------
# From the hub


@pytest.mark.slow
def test_from_the_hub_alone_the_sae_names_its_tower(pictures: Path, tiny_model: dict[str, str], tmp_path: Path) -> None:
    from foreign_files import CHECKPOINTS
    from hub_server import HubServer, hub_environment

    write, config, tensors = CHECKPOINTS["prisma relu"]
    named = {"model_name": "open-clip:lab/tiny", "hook_point_layer": LAYER, "layer_subtype": "hook_resid_post"}
    folder = write(tmp_path / "sae", config() | named, tensors())
    model = {"model_cfg": json.loads(Path(tiny_model["model"]).read_text()), "preprocess_cfg": {"size": 24}}
    root = Path(__file__).parents[3]
    with HubServer() as server:
        server.put("lab/sae", {f"l1/{file.name}": file.read_bytes() for file in folder.iterdir()})
        weights = Path(tiny_model["pretrained"]).read_bytes()
        files = {"open_clip_config.json": json.dumps(model).encode(), "open_clip_model.safetensors": weights}
        server.put("lab/tiny", files)
        command = [sys.executable, "-W", "error", str(root / "cli.py"), "--json", "look", str(pictures / "photo.png"),
                   "--sae", "hf://lab/sae/l1", *MODEL.split()]  # fmt: skip
        done = subprocess.run(command, env=hub_environment(server, tmp_path / "home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["sae"], answer["hook_point"]) == ("hf://lab/sae/l1", str(HookPoint(LAYER)))
    assert answer["model"].startswith("hf-hub:lab/tiny")
    local = ask("--json", "look", pictures / "photo.png", "--sae", folder, "--preprocess", "default",
                *(f"--{name}={value}" for name, value in tiny_model.items()))  # fmt: skip
    rows = json.loads(local.stdout)["images"][0]["rows"]
    assert [row["latent"] for row in answer["images"][0]["rows"]] == [row["latent"] for row in rows]
    assert answer["images"][0]["rows"][0]["peak"] == pytest.approx(rows[0]["peak"], rel=1e-4)
