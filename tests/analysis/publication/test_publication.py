"""publish() into a local folder: what is written reads back as the run, says nothing of its owner, and stays whole."""

import dataclasses
import getpass
import hashlib
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from actcache import ActivationStore, CorruptError, PipelineError, SettingsError, StorageError, import_activations
from actcache.models import find_repository
from analysis import ConceptTable, publish, set_name
from analysis.publication import place
from analysis.publication.subject import _name, open_subject
from saetrain import Run, SAEConfig, TrainConfig, train
from saetrain.interop import compare, convert, name_tower, read_foreign
from saetrain.interop.formulas import saelens

GOLDEN = Path(__file__).parents[2] / "golden" / "pipeline"
OWNER = "alice-of-some-institute"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden pipeline in a folder with its owner's name, and concepts with names that mean harm."""
    path = Path(shutil.copytree(GOLDEN, tmp_path_factory.mktemp("golden") / OWNER / "pipeline"))
    concepts = ConceptTable.open(path / "a.concepts")
    set_name(concepts, 3, name="<script>alert(1)</script>", note="![x](http://e.vil/p.png) | `a` | http://e.vil")
    set_name(concepts, 4, name="a\x1b[31mb\u202ec", note="@everyone # heading --- <!-- patchsae: table ends -->")
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def front_matter(text: str) -> dict[str, Any]:
    _, block, _ = text.split("---\n", 2)
    fields = yaml.safe_load(block)
    assert isinstance(fields, dict)
    return fields


def rows_of(store: Path) -> torch.Tensor:
    values = ActivationStore.open(store).read()
    return torch.from_numpy(values.reshape(-1, values.shape[-1])).float()


def test_what_is_published_reads_back_as_the_run(golden: Path, tmp_path: Path) -> None:
    done = publish(golden / "run", tmp_path / "repo", license="mit")
    assert done.written
    folder = tmp_path / "repo" / done.folder
    run, x = Run.open(golden / "run"), rows_of(golden / "a.acts")
    published = read_foreign(folder).sae
    assert all(map(torch.equal, run.sae().state_dict().values(), published.state_dict().values()))
    assert all(map(torch.equal, run.sae().encode(x), published.encode(x)))
    parity = compare(run.sae(), saelens.load(folder), x, "activations")  # the folded weights, by SAELens's formulas
    assert parity.active_agreement == 1
    assert parity.max_reconstruction_difference < 1e-5

    lines = [json.loads(line) for line in (tmp_path / "repo" / "manifest.jsonl").read_text().splitlines()]
    files = files_of(tmp_path / "repo")
    assert {line["path"]: line["sha256"] for line in lines} == {
        path: hashlib.sha256(data).hexdigest() for path, data in files.items() if "/" in path
    }
    assert {file.path: file.bytes for file in done.files} == {path: len(data) for path, data in files.items()}
    (row,) = [line["sae"] for line in lines if "sae" in line]
    quality = run.quality["all"]
    assert (row["l0"], row["fvu"], row["license"]) == (quality["l0"], quality["fvu"], "mit")

    config = json.loads((folder / "config.json").read_bytes())
    settings = ActivationStore.open(golden / "a.acts").settings
    assert config["tower"]["model_id"] == settings.model_id == run.model_id
    assert config["tower"]["preprocess"] == settings.preprocess
    assert (
        config["tower"]["weights_sha256"]
        == hashlib.sha256((golden / "model" / "tiny.safetensors").read_bytes()).hexdigest()
    )
    assert config["training"]["rows"] == [settings.rows_id]
    assert config["training"]["n_images"] == 46  # of 48, the last 5 % are held out
    assert config["quality"] == run.quality
    assert set(config["formulas"]) >= {"fvu", "l0"}


def test_the_card_says_what_a_reader_needs(golden: Path, tmp_path: Path) -> None:
    done = publish(golden / "run", tmp_path / "repo", license="cc-by-4.0")
    card = (tmp_path / "repo" / done.folder / "README.md").read_text()
    root = (tmp_path / "repo" / "README.md").read_text()
    for text in (card, root):
        fields = front_matter(text)
        assert fields["license"] == "cc-by-4.0"
        assert fields["library_name"] == "saelens"
        assert "sparse-autoencoder" in fields["tags"]
    for word in ("blocks.1.hook_resid_post", "0.3133", "L0", "look photo.jpg --sae", "load_from_disk", "24 x 24",
                 "e927d3cf28d46789", "46 images", "FVU = "):  # fmt: skip
        assert word in card
    with Image.open(tmp_path / "repo" / done.folder / "picture.png") as picture:
        assert picture.size == (720, 280)
    bare = publish(golden / "run", tmp_path / "bare")
    card = (tmp_path / "bare" / bare.folder / "README.md").read_text()
    assert "license" not in front_matter(card)
    assert "License: none given" in card
    assert "none given" in (tmp_path / "bare" / "README.md").read_text()


def test_names_and_notes_mean_nothing_to_a_renderer(golden: Path, tmp_path: Path) -> None:
    done = publish(golden / "a.concepts", tmp_path / "repo")
    card = (tmp_path / "repo" / done.folder / "README.md").read_text()
    assert "<script" not in card
    assert "](http://e.vil" not in card
    assert "http://e.vil" not in card  # no link is made of it either
    assert "\x1b" not in card
    assert "\u202e" not in card
    assert "<!--" not in card
    table = [line for line in card.splitlines() if line.startswith(("| 3 |", "| 4 |"))]
    assert len(table) == 2
    for line in table:
        assert len(line.replace(r"\|", "").split("|")) == 7  # five cells
    names = json.loads((tmp_path / "repo" / done.folder / "names.json").read_bytes())
    assert names["3"]["name"] == "<script>alert(1)</script>"  # data stays as it is
    assert names["3"]["by"] == "person"
    assert names["19"]["name"] == "stripes"
    front_matter(card)


def test_concepts_bring_statistics_and_pictures_only_when_asked(golden: Path, tmp_path: Path) -> None:
    concepts = ConceptTable.open(golden / "a.concepts")
    done = publish(golden / "a.concepts", tmp_path / "plain")
    folder = tmp_path / "plain" / done.folder
    assert (folder / "concepts.parquet").read_bytes() == (golden / "a.concepts" / "concepts.parquet").read_bytes()
    assert "pictures" in done.left_out
    assert not [name for name in files_of(folder) if "gallery" in name or "image" in name]
    assert "No images are published" in (folder / "README.md").read_text()

    done = publish(golden / "a.concepts", tmp_path / "shown", gallery=True)
    folder = tmp_path / "shown" / done.folder
    shown = {name: data for name, data in files_of(folder).items() if name.endswith(".jpg")}
    assert shown
    assert all(data == (golden / "a.concepts" / name).read_bytes() for name, data in shown.items())
    assert pq.read_table(folder / "gallery.parquet").equals(concepts.gallery)
    assert "rights of their own" in (folder / "README.md").read_text()
    assert done.left_out == {}


@pytest.mark.parametrize("src", ["run", "a.concepts"])
def test_nothing_tells_whose_machine_it_was(golden: Path, tmp_path: Path, src: str) -> None:
    publish(golden / src, tmp_path / "a-secret-place", gallery=src != "run")
    secrets = [OWNER, "a-secret-place", "pipeline", str(tmp_path), "/home/", "/tmp/"]
    secrets += [word for word in (platform.node(), getpass.getuser()) if len(word) > 5]
    for name, data in files_of(tmp_path / "a-secret-place").items():
        for secret in secrets:
            assert secret.encode() not in data, (name, secret)


def test_a_dry_run_writes_nothing_and_the_same_again_changes_nothing(golden: Path, tmp_path: Path) -> None:
    planned = publish(golden / "run", tmp_path / "repo", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    done = publish(golden / "run", tmp_path / "repo")
    assert done == dataclasses.replace(planned, written=True)
    assert {file.state for file in done.files} == {"new"}
    before = files_of(tmp_path)
    again = publish(golden / "run", tmp_path / "repo")
    assert not again.written
    assert {file.state for file in again.files} == {"unchanged"}
    assert files_of(tmp_path) == before
    elsewhere = publish(golden / "run", tmp_path / "other")
    assert [file.sha256 for file in elsewhere.files] == [file.sha256 for file in done.files]


def test_a_second_sae_is_added_and_what_people_wrote_stays(golden: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    first = publish(golden / "run", repo)
    readme = (repo / "README.md").read_text()
    (repo / "README.md").write_text(readme.replace("# Sparse", "Words of mine.\n\n# Sparse") + "\nThe end is mine.\n")
    inside = files_of(repo / first.folder)
    second = publish(golden / "runs" / "variantrelu", repo, license="mit")
    assert second.folder != first.folder
    assert files_of(repo / first.folder) == inside
    readme = (repo / "README.md").read_text()
    assert "Words of mine." in readme
    assert readme.endswith("The end is mine.\n")
    rows = [line for line in readme.splitlines() if line.startswith("| [")]
    assert len(rows) == 2
    lines = [json.loads(line) for line in (repo / "manifest.jsonl").read_text().splitlines()]
    assert {line["path"].split("/")[0] for line in lines} == {first.folder, second.folder}
    assert {line["path"] for line in lines} == set(files_of(repo)) - {"README.md", "manifest.jsonl"}


def test_another_version_replaces_it_only_when_asked(golden: Path, tmp_path: Path) -> None:
    publish(golden / "a.concepts", tmp_path / "repo", gallery=True)
    before = files_of(tmp_path)
    with pytest.raises(SettingsError, match=r"an earlier publication of this SAE.*--overwrite"):
        publish(golden / "run", tmp_path / "repo")
    assert files_of(tmp_path) == before
    done = publish(golden / "run", tmp_path / "repo", overwrite=True)
    inside = files_of(tmp_path / "repo" / done.folder)
    assert not [name for name in inside if "gallery" in name]
    assert "gallery" not in (tmp_path / "repo" / "manifest.jsonl").read_text()


def put_file(repo: Path) -> Path:
    repo.write_text("mine")
    return repo


def put_photos(repo: Path) -> Path:
    repo.mkdir()
    (repo / "photo.jpg").write_text("mine")
    return repo


def put_torn_manifest(repo: Path) -> Path:
    repo.mkdir()
    (repo / "manifest.jsonl").write_text('{"path": "a/b", "bytes": -1, "sha256": ""}\n')
    return repo


def put_damaged_marks(repo: Path) -> Path:
    repo.mkdir()
    (repo / "manifest.jsonl").write_text("")
    (repo / "README.md").write_text("<!-- patchsae: table ends -->\n<!-- patchsae: table begins -->\n")
    return repo


REFUSALS: dict[str, tuple[str, Callable[[Path, Path], object], dict[str, Any], str]] = {
    "a file": ("run", lambda golden, repo: put_file(repo), {}, "is a file"),
    "photos": ("run", lambda golden, repo: put_photos(repo), {}, "holds other things"),
    "inside the run": ("run", lambda golden, repo: golden / "run" / "x", {}, "lies inside the artifact"),
    "the run itself": ("run", lambda golden, repo: golden / "run", {}, "is the run"),
    "around the run": ("run", lambda golden, repo: golden, {}, "contains"),
    "s3": ("run", lambda golden, repo: "s3://bucket/x", {}, "neither hf://"),
    "a commit": ("run", lambda golden, repo: f"hf://a/b@{'0' * 40}", {}, "names a commit"),
    "data sets": ("run", lambda golden, repo: "hf://datasets/a/b", {}, "data sets"),
    "no repository": ("run", lambda golden, repo: "hf://a", {}, "Expected hf://OWNER/REPO"),
    "a store": ("a.acts", lambda golden, repo: repo, {}, "neither a run nor a concept table"),
    "an interrupted run": ("interrupted-run", lambda golden, repo: repo, {}, "not complete"),
    "a gallery of a run": ("run", lambda golden, repo: repo, {"gallery": True}, "--gallery belongs to concepts"),
    "codes of a run": ("run", lambda golden, repo: repo, {"codes": "x"}, "--codes and --run belong to concepts"),
    "a license": ("run", lambda golden, repo: repo, {"license": "mit\nx: y"}, "--license"),
    "another store": ("run", lambda golden, repo: repo, {"store": GOLDEN / "b.acts"}, "was made from store"),
    "a torn manifest": ("run", lambda golden, repo: put_torn_manifest(repo), {}, "manifest.jsonl, line 1"),
    "damaged marks": ("run", lambda golden, repo: put_damaged_marks(repo), {}, "should have one line"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_is_one_line_and_changes_nothing(golden: Path, tmp_path: Path, case: str) -> None:
    src, make, more, message = REFUSALS[case]
    dst: Any = make(golden, tmp_path / "repo")
    before, inside = files_of(tmp_path), files_of(golden / "run")
    with pytest.raises(PipelineError) as refused:
        publish(golden / src, dst, **more)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert files_of(tmp_path) == before
    assert files_of(golden / "run") == inside


def test_without_the_store_what_is_missing_is_said(golden: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(golden, tmp_path / "moved"))
    (moved / "a.acts").rename(tmp_path / "elsewhere.acts")
    for place_file in moved.glob("*/places.json"):
        place_file.unlink()
    done = publish(moved / "run", tmp_path / "repo")
    card = (tmp_path / "repo" / done.folder / "README.md").read_text()
    (reason,) = done.left_out.values()
    assert "--store" in reason
    assert "What is not here" in card
    assert "preprocess" not in json.loads((tmp_path / "repo" / done.folder / "config.json").read_bytes())["tower"]
    read_foreign(tmp_path / "repo" / done.folder)
    by_codes = publish(moved / "a.concepts", tmp_path / "codes")  # codes know the preprocessing, too
    tower = json.loads((tmp_path / "codes" / by_codes.folder / "config.json").read_bytes())["tower"]
    assert tower["preprocess"]["size"] == [24, 24]
    assert (tower["model_file"], tower["weights_file"]) == ("tiny.json", "tiny.safetensors")
    named = publish(moved / "run", tmp_path / "named", store=tmp_path / "elsewhere.acts")
    assert named.left_out == {}


def test_of_a_model_that_has_a_name_only_nothing_is_made_up(tiny_images: Path, tmp_path: Path) -> None:
    images = len([file for file in tiny_images.rglob("*") if file.is_file()])
    values = np.random.default_rng(0).normal(size=(images, 10, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    options = {"layers": [1], "model_name": "my-vit", "images": str(tiny_images)}
    store = import_activations(tmp_path / "x.npy", tmp_path / "x.acts", **options)
    settings = {"sae": SAEConfig(n_latents=16, k=2), "config": TrainConfig(n_steps=3, batch_size=32)}
    train(store, tmp_path / "run", device="cpu", **settings)
    done = publish(tmp_path / "run", tmp_path / "repo")
    assert done.left_out == {
        "the tower's weights and its preprocessing": "the activations were imported with the name of their model only"
    }
    tower = json.loads((Path(done.address) / "config.json").read_bytes())["tower"]
    assert tower == {
        "model_id": store.settings.model_id, "only_name": "my-vit", "grid": [3, 3], "prefix": ["cls"],
    }  # fmt: skip
    card = (Path(done.address) / "README.md").read_text()
    assert "--model MODEL --pretrained WEIGHTS" in card
    assert "| name given to the model | `my-vit` |" in card
    hint = name_tower("published", Path(done.address))
    assert hint is not None
    assert (hint.model, hint.model_id, str(hint.hook_point)) == (
        None,
        store.settings.model_id,
        "blocks.1.hook_resid_post",
    )
    assert convert(done.address, tmp_path / "again", store=store.path).parity.holds


def test_a_write_that_fails_leaves_what_was_there_and_the_same_call_goes_on(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "repo"
    publish(golden / "run", repo)
    before = files_of(repo)

    def fail(path: Path, data: bytes) -> None:
        raise StorageError(f"{path} cannot be written: No space left on device.")

    with monkeypatch.context() as patch:
        patch.setattr(place, "write_atomic", fail)
        with pytest.raises(StorageError, match="No space left"):
            publish(golden / "runs" / "variantrelu", repo)
    assert {name: data for name, data in files_of(repo).items() if name in before} == before
    done = publish(golden / "runs" / "variantrelu", repo)
    assert done.written
    assert done.folder in (repo / "manifest.jsonl").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["repo"]


def test_what_reads_back_differently_is_not_called_published(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = place.write_new

    def flip(path: Path, data: bytes) -> None:
        write(path, data[:-1] + bytes([data[-1] ^ 1]) if path.name == "patchsae.safetensors" else data)

    monkeypatch.setattr(place, "write_new", flip)
    with pytest.raises(CorruptError, match=r"read back, .*patchsae\.safetensors differ"):
        publish(golden / "run", tmp_path / "repo")


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ({"model": "ViT-B-16", "pretrained": "openai"}, {"model": "ViT-B-16", "pretrained": "openai"}),
        (
            {"model": "timm:vit_base_patch14_dinov2.lvd142m", "pretrained": "timm:vit_base_patch14_dinov2.lvd142m"},
            {"model": "timm:vit_base_patch14_dinov2.lvd142m", "pretrained": "timm:vit_base_patch14_dinov2.lvd142m"},
        ),
        (
            {"model": "hf-hub:laion/CLIP", "pretrained": "hf-hub:laion/CLIP"},
            {"model": "hf-hub:laion/CLIP", "pretrained": "hf-hub:laion/CLIP"},
        ),
        ({"model": "ViT-B-16", "pretrained": "random:0"}, {"model": "ViT-B-16", "pretrained": "random:0"}),
        (
            {"model": "../../bob/clip.json", "pretrained": "../../bob/w.pt"},
            {"model_file": "clip.json", "weights_file": "w.pt"},
        ),
        (
            {"model": "local-dir:../bob/clip", "pretrained": "timm:local-dir:../bob/clip"},
            {"model_file": "clip", "weights_file": "clip"},
        ),
        ({"model": "/home/bob/x", "pretrained": "/home/bob/y"}, {"model_file": "x", "weights_file": "y"}),
    ],
)  # fmt: skip
def test_names_of_models_stay_and_files_lose_their_folders(
    golden: Path, recorded: dict[str, str], expected: dict[str, str]
) -> None:
    artifact = ActivationStore.open(golden / "a.acts").artifact
    artifact = dataclasses.replace(artifact, provenance={**artifact.provenance, "paths": recorded})
    assert {**_name(artifact, "model"), **_name(artifact, "pretrained")} == expected


@pytest.mark.parametrize(
    ("model", "pretrained", "repository"),
    [
        ("ViT-B-16-quickgelu", "openai", "timm/vit_base_patch16_clip_224.openai"),
        ("timm:vit_base_patch14_dinov2.lvd142m", None, "timm/vit_base_patch14_dinov2.lvd142m"),
        ("timm:vit_base_patch14_dinov2", "lvd142m", "timm/vit_base_patch14_dinov2.lvd142m"),
        ("timm:no_such_model", None, None), ("hf-hub:laion/CLIP", "hf-hub:laion/CLIP", "laion/CLIP"),
        ("ViT-B-16", "random:0", None), (None, None, None), ("ViT-B-16", "no-such-tag", None),
    ],
)  # fmt: skip
def test_the_base_model_is_what_the_libraries_say(
    model: str | None, pretrained: str | None, repository: str | None
) -> None:
    assert find_repository(model, pretrained) == repository


def test_the_folder_is_named_after_the_sae(golden: Path) -> None:
    run = Run.open(golden / "run")
    assert open_subject(golden / "run").folder == f"layer-1-resid-post-topk-k4-64-{run.run_id[:8]}"
