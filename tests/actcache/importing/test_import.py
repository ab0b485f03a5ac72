"""import_activations(): the values of the files, image by image, in a store like any other."""

import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file
from small_store import all_bytes

from actcache import (
    ActivationStore,
    CorruptError,
    HookPoint,
    IncompleteError,
    ModelError,
    NonFiniteError,
    PipelineError,
    SettingsError,
    extract,
    import_activations,
    repair,
    verify,
)

NAMED: dict[str, Any] = {"layers": [3], "model_name": "my-vit"}
DTYPES = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "bf2": torch.bfloat16}


def make_values(n_images: int, n_tokens: int, d_model: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n_images, n_tokens, d_model)).astype("f4")


def rows_of(store: ActivationStore) -> NDArray[np.int64]:
    """The place in the files of each stored image, where no table of images was given."""
    return np.array([int(uri) for uri in store.images["uri"].to_pylist()])


def save(path: Path, tensor: torch.Tensor, **named: torch.Tensor) -> Path:
    if path.suffix == ".npy":
        np.save(path, tensor.numpy())
    elif path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in (named or {"x": tensor}).items()}, path)
    else:
        torch.save(named or tensor, path)
    return path


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(), kind=st.sampled_from([".npy", ".pt", ".safetensors"]), rows=st.sampled_from(["images", "tokens"]),
    n_images=st.integers(1, 40), prefix=st.sampled_from([(), ("cls",), ("cls", "reg", "reg"), ("reg",)]),
    grid=st.sampled_from([(1, 1), (2, 3), (3, 3)]), layers=st.sampled_from([(3,), (1, 0), (0, 7, 4)]),
    stored=st.sampled_from(["float16", "float32"]), seed=st.integers(0, 3),
)  # fmt: skip
def test_every_value_is_that_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str, rows: str, n_images: int,
    prefix: tuple[str, ...], grid: tuple[int, int], layers: tuple[int, ...], stored: str, seed: int,
) -> None:  # fmt: skip
    """Images or tokens as rows, with and without an axis of layers, in one file or several, in every dtype."""
    folder = tmp_path_factory.mktemp("files") / "in"
    folder.mkdir()
    n_tokens = len(prefix) + grid[0] * grid[1]
    dtype = data.draw(st.sampled_from(["f2", "f4", "f8"] if kind == ".npy" else [*DTYPES]))
    x = torch.from_numpy(make_values(n_images, len(layers), n_tokens * 4)).to(DTYPES[dtype])
    x = x.reshape(n_images, len(layers), n_tokens, 4)
    whole = x.transpose(1, 2).reshape(n_images * n_tokens, len(layers), 4) if rows == "tokens" else x
    whole = whole[:, 0] if len(layers) == 1 and data.draw(st.booleans()) else whole
    cuts = sorted(data.draw(st.lists(st.integers(1, max(len(whole) - 1, 1)), max_size=2, unique=True)))
    parts = [part for part in torch.tensor_split(whole, cuts) if len(part)]
    for number, part in enumerate(parts):
        save(folder / f"part{number * 9}{kind}", part.clone())
    store = import_activations(
        folder, folder.parent / "x.acts", layers=layers, model_name="m", prefix=",".join(prefix) or "none",
        grid=f"{grid[0]}x{grid[1]}", dtype=stored, seed=seed, n_tokens=n_tokens if rows == "tokens" else None,
    )  # fmt: skip
    assert store.settings.prefix == prefix
    for number, layer in enumerate(layers):
        expected = x[:, number].to(torch.float64).numpy().astype(stored)[rows_of(store)]
        np.testing.assert_array_equal(store.read_stream(layer, check=True), expected)
    assert verify(store.path).ok


def dump(store: ActivationStore, layer: int) -> NDArray[Any]:
    """The whole stream in the order of the image source, as another program would have written it."""
    order = np.argsort(store.images["source_index"].to_numpy())
    return store.read_stream(layer)[order]


def test_an_imported_copy_equals_what_was_extracted(
    tiny_store: Path, tiny_images: Path, tiny_model: dict[str, str], tmp_path: Path
) -> None:
    """Row by row, with the same model, the same images and the same statistics."""
    theirs = ActivationStore.open(tiny_store)
    np.save(tmp_path / "x.npy", np.stack([dump(theirs, layer) for layer in (2, 0)], 1))
    ours = import_activations(
        tmp_path / "x.npy", tmp_path / "x.acts", images=tiny_images, layers=[2, 0], shard_images=16, **tiny_model
    )
    assert (ours.model_id, ours.rows_id, ours.store_id != theirs.store_id) == (theirs.model_id, theirs.rows_id, True)
    assert ours.images.equals(theirs.images)  # with the hashes of the image files
    assert replace(ours.settings, imported=None) == theirs.settings
    for layer in (0, 2):
        np.testing.assert_array_equal(ours.read_stream(layer), theirs.read_stream(layer))
        for kind in ("all", "cls", "patch"):
            mine, other = ours.statistics(layer, kind), theirs.statistics(layer, kind)  # type: ignore[arg-type]
            assert (mine.count, mine.absmax) == (other.count, other.absmax)
            np.testing.assert_allclose(mine.sum, other.sum, rtol=1e-12, atol=1e-9)
            np.testing.assert_allclose(mine.sum_squares, other.sum_squares, rtol=1e-12)


def test_the_rows_of_a_table_are_the_rows_of_the_files(tiny_images: Path, tmp_path: Path) -> None:
    """In the order in which the table has them, although a table is sorted when it is listed."""
    files = sorted(str(path) for path in tiny_images.rglob("*.png"))
    order = np.random.default_rng(1).permutation(len(files))
    labels = [f"class {i % 2}" for i in order]
    table = pa.table({"path": [files[i] for i in order], "label": labels, "number": order})
    pyarrow.csv.write_csv(table, tmp_path / "images.csv")
    x = make_values(len(files), 5, 4)
    np.save(tmp_path / "x.npy", x)
    store = import_activations(tmp_path / "x.npy", tmp_path / "x.acts", images=tmp_path / "images.csv", **NAMED)
    row = {int(number): place for place, number in enumerate(order)}
    places = [row[number] for number in store.images["number"].to_pylist()]
    np.testing.assert_array_equal(store.read_stream(), x.astype("f2")[places])
    assert store.images["label_name"].to_pylist() == [f"class {i % 2}" for i in store.images["number"].to_pylist()]


def test_a_table_without_its_images_gives_names_and_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{name}.png" for name in "cadb"]
    table = pa.table({"path": names, "label": ["x", "y", "x", "y"], "split": ["a", "b", "a", "b"]})
    pyarrow.csv.write_csv(table, tmp_path / "images.csv")
    x = make_values(4, 5, 4)
    np.save(tmp_path / "x.npy", x)
    store = import_activations(tmp_path / "x.npy", tmp_path / "x.acts", images=tmp_path / "images.csv", **NAMED)
    assert "images.csv lists no image that is there: only their names and columns are kept." in caplog.text
    columns = ("uri", "label_name", "split")
    known = [
        table.select([0, 1, 2]).slice(names.index(uri), 1).to_pylist()[0] for uri in store.images["uri"].to_pylist()
    ]
    assert [tuple(row[name] for name in columns) for row in store.images.to_pylist()] == [
        tuple(r.values()) for r in known
    ]
    rows = [names.index(uri) for uri in store.images["uri"].to_pylist()]
    np.testing.assert_array_equal(store.read_stream(), x.astype("f2")[rows])
    assert store.artifact.parent("images").path == "no images"
    (tmp_path / "a.png").write_bytes(b"any")  # now the others are missing
    with pytest.raises(PipelineError, match=r"images\.csv"):
        import_activations(tmp_path / "x.npy", tmp_path / "y.acts", images=tmp_path / "images.csv", **NAMED)


def test_what_is_not_said_is_guessed_and_recorded(tmp_path: Path) -> None:
    for n_tokens, prefix, grid in ((197, ("cls",), (14, 14)), (196, (), (14, 14)), (1, (), (1, 1)),
                                   (201, ("cls", *["reg"] * 4), (14, 14))):  # fmt: skip
        np.save(tmp_path / "x.npy", make_values(2, n_tokens, 3))
        store = import_activations(tmp_path / "x.npy", tmp_path / f"{n_tokens}.acts", **NAMED)
        assert (store.settings.prefix, store.layout.grid) == (prefix, grid)
        assert store.artifact.provenance["guessed"] == ["prefix", "grid"]
    store = import_activations(tmp_path / "x.npy", tmp_path / "x.acts", prefix="cls,reg:4", grid="14x14", **NAMED)
    assert "guessed" not in store.artifact.provenance
    np.save(tmp_path / "x.npy", make_values(2, 1, 3)[:, 0])
    assert import_activations(tmp_path / "x.npy", tmp_path / "y.acts", **NAMED).read(tokens="patch").shape == (2, 1, 3)


def test_arrays_are_chosen_by_the_name_of_the_hook_point(tmp_path: Path) -> None:
    x = {f"blocks.{layer}.hook_mlp_out": torch.randn(3, 4, 5) for layer in (1, 2)}
    for suffix in (".pt", ".safetensors"):
        path = save(tmp_path / f"x{suffix}", torch.empty(0), **x, other=torch.randn(7, 1))
        store = import_activations(path, tmp_path / f"x{suffix}.acts", layers=[2, 1], site="mlp_out", model_name="m")
        for layer in (1, 2):
            expected = x[f"blocks.{layer}.hook_mlp_out"].half().numpy()[rows_of(store)]
            np.testing.assert_array_equal(store.read(HookPoint(layer, "mlp_out")), expected)
        alone = tmp_path / f"alone{suffix}"
        save(alone, torch.empty(0), **{"blocks.2.hook_mlp_out": x["blocks.2.hook_mlp_out"]})
        with pytest.raises(SettingsError, match=r"called blocks\.2\.hook_mlp_out, but .* say blocks\.1\.hook_mlp_out"):
            import_activations(alone, tmp_path / "no.acts", layers=[1], site="mlp_out", model_name="m")
        assert not (tmp_path / "no.acts").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Safe to run twice


def test_an_interrupted_import_resumes_with_the_same_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", make_values(70, 5, 8))
    whole = import_activations(tmp_path / "x.npy", tmp_path / "whole.acts", shard_images=16, **NAMED)

    def stop(done: int, total: int) -> None:
        if done >= 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_activations(tmp_path / "x.npy", tmp_path / "x.acts", shard_images=16, on_progress=stop, **NAMED)
    with pytest.raises(IncompleteError, match=r"2 of 5 shards are missing\. .* the same `import` command again"):
        ActivationStore.open(tmp_path / "x.acts")
    assert not list((tmp_path / "x.acts").rglob("*.tmp"))
    seen: list[tuple[int, int]] = []
    import_activations(
        tmp_path / "x.npy", tmp_path / "x.acts", shard_images=16, on_progress=lambda *at: seen.append(at), **NAMED
    )
    assert (seen[0], seen[-1]) == ((48, 70), (70, 70))
    assert all_bytes(tmp_path / "x.acts") == all_bytes(whole.path)


def test_the_same_call_twice_is_safe(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", make_values(20, 5, 8))
    first = import_activations(tmp_path / "x.npy", tmp_path / "x.acts", **NAMED)
    before = all_bytes(first.path)
    assert import_activations(tmp_path / "x.npy", tmp_path / "x.acts", **NAMED).store_id == first.store_id
    np.save(tmp_path / "x.npy", make_values(20, 5, 8, seed=1))  # other values, under the same name and of the same size
    with pytest.raises(SettingsError, match=r"imported\.source: \w+ there, \w+ asked for.*--overwrite"):
        import_activations(tmp_path / "x.npy", tmp_path / "x.acts", **NAMED)
    assert all_bytes(first.path) == before
    other = import_activations(tmp_path / "x.npy", tmp_path / "x.acts", overwrite=True, **NAMED)
    assert other.rows_id != first.rows_id  # nobody knows whether these are the same images


def test_a_store_that_only_lacks_its_seal_is_sealed(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", make_values(20, 5, 8))
    store = import_activations(tmp_path / "x.npy", tmp_path / "x.acts", **NAMED)
    before = all_bytes(store.path)
    (store.path / "manifest.json").unlink()
    import_activations(tmp_path / "x.npy", tmp_path / "x.acts", **NAMED)
    assert all_bytes(store.path) == before


def test_layers_in_another_order_are_other_activations(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", make_values(20, 2, 5 * 8).reshape(20, 2, 5, 8))
    import_activations(tmp_path / "x.npy", tmp_path / "x.acts", layers=[3, 4], model_name="m")
    with pytest.raises(SettingsError, match=r"imported\.layers: \[3, 4\] there, \[4, 3\] asked for"):
        import_activations(tmp_path / "x.npy", tmp_path / "x.acts", layers=[4, 3], model_name="m")


def test_memory_holds_one_block(tmp_path: Path) -> None:
    x = make_values(1500, 50, 64)
    np.save(tmp_path / "x.npy", x)
    import_activations(tmp_path / "x.npy", tmp_path / "warm.acts", **NAMED)
    peaks: list[int] = []  # up to the seal, which reads every file in pieces of 16 MiB

    def measure(done: int, total: int) -> None:
        peaks.append(tracemalloc.get_traced_memory()[1])

    tracemalloc.start()
    import_activations(tmp_path / "x.npy", tmp_path / "x.acts", seed=1, on_progress=measure, **NAMED)
    tracemalloc.stop()
    assert len(peaks) == 25
    assert max(peaks) < x.nbytes / 3  # a block of 64 images takes 0.8 MB, the file 19 MB


def test_damage_is_found_and_the_remedy_is_to_import_again(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", make_values(20, 5, 8))
    store = import_activations(tmp_path / "x.npy", tmp_path / "x.acts", **NAMED)
    shard = next(store.path.rglob("patches/c/0/0/0"))
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    found = verify(store.path)
    assert [problem.shard for problem in found.problems] == [0]
    assert found.remedies == ("run the same `patchsae import` command again with --overwrite",)
    with pytest.raises(SettingsError, match=r"was imported, so its shards cannot be extracted again\. Run the same"):
        repair(store.path)


def test_two_files_without_images_are_not_of_the_same_images(tmp_path: Path) -> None:
    stores = []
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", make_values(20, 5, 8, seed=number))
        stores.append(import_activations(tmp_path / f"{number}.npy", tmp_path / f"{number}.acts", **NAMED))
    first, second = stores
    again = import_activations(tmp_path / "0.npy", tmp_path / "again.acts", dtype="float32", seed=1, **NAMED)
    assert set(again.images["content_hash"].to_pylist()) == set(first.images["content_hash"].to_pylist())
    assert first.model_id == second.model_id
    assert first.rows_id != second.rows_id
    assert not set(first.images["content_hash"].to_pylist()) & set(second.images["content_hash"].to_pylist())


def test_a_model_of_which_only_the_name_is_known_cannot_be_run(tmp_path: Path, tiny_model: dict[str, str]) -> None:
    from actcache.prompts import open_towers

    np.save(tmp_path / "x.npy", make_values(20, 5, 8))
    store = import_activations(tmp_path / "x.npy", tmp_path / "x.acts", **NAMED)
    for named in ({}, tiny_model):
        with pytest.raises(SettingsError, match=r"name of their model only \(my-vit\).*`import --model --pretrained`"):
            open_towers(store.artifact, device="cpu", **named)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def _pickled(folder: Path) -> Path:
    x = np.empty(3, dtype=object)
    x[:] = _Evil(folder / "ran")
    np.save(folder / "x.npy", x, allow_pickle=True)
    return folder / "x.npy"


def _code(folder: Path) -> Path:
    torch.save({"x": torch.zeros(3, 5, 2), "y": _Evil(folder / "ran")}, folder / "x.pt")
    return folder / "x.pt"


def _old_code(folder: Path) -> Path:
    (folder / "x.pt").write_bytes(pickle.dumps(_Evil(folder / "ran")))
    return folder / "x.pt"


def _legacy(folder: Path) -> Path:
    torch.save(torch.zeros(3, 5, 2), folder / "x.pt", _use_new_zipfile_serialization=False)
    return folder / "x.pt"


def _cut(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = save(folder / f"x{suffix}", torch.randn(30, 5, 20))
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        return path

    return make


def _saved(x: Any, suffix: str = ".npy") -> Callable[[Path], Path]:
    return lambda folder: save(folder / f"x{suffix}", torch.as_tensor(x))


def _several(*shapes: tuple[int, ...], suffixes: tuple[str, ...] = (".npy", ".npy", ".npy")) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for number, shape in enumerate(shapes):
            save(folder / f"{number}{suffixes[number]}", torch.randn(shape))
        return folder

    return make


def _text(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text("no activations")
        return folder / name

    return make


BAD: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "missing": (lambda folder: folder / "x.npy", {}, "x.npy does not exist. Expected a file of activations"),
    "empty folder": (lambda folder: folder, {}, "holds no activations. Expected .npy, .pt"),
    "another kind": (_text("x.csv"), {}, "x.csv is not a file of activations. Expected .npy, .pt"),
    "text as npy": (_text("x.npy"), {}, "x.npy cannot be read .*Copy or write it again"),
    "text as pt": (_text("x.pt"), {}, "x.pt "),
    "text as safetensors": (_text("x.safetensors"), {}, "x.safetensors cannot be read .*Copy or write it again"),
    "pickle in npy": (_pickled, {}, "holds Python objects, which could run code"),
    "code in pt": (_code, {}, "holds more than tensors, which could run code"),
    "code in an old pt": (_old_code, {}, "x.pt "),
    "legacy pt": (_legacy, {}, "since version 1.6.*torch.save"),
    "cut npy": (_cut(".npy"), {}, "x.npy cannot be read"),
    "cut pt": (_cut(".pt"), {}, "x.pt cannot be read"),
    "cut safetensors": (_cut(".safetensors"), {}, "x.safetensors cannot be read"),
    "integers": (_saved(np.zeros((3, 5, 2), "i8")), {}, "holds int64. Expected float16, bfloat16, float32 or float64"),
    "integer tensor": (_saved(np.zeros((3, 5, 2), "i4"), ".pt"), {}, "holds int32. Expected float16"),
    "complex": (_saved(np.zeros((3, 5, 2), "c8")), {}, "holds complex64. Expected float16"),
    "no images": (_saved(np.zeros((0, 5, 2))), {}, r"is empty: its shape is \[0, 5, 2\]"),
    "one axis": (_saved(np.zeros(5)), {}, r"has the shape \[5\]. Expected \[images, tokens, channels\]"),
    "five axes": (_saved(np.zeros((2, 2, 2, 2, 2))), {}, r"has the shape \[2, 2, 2, 2, 2\]"),
    "two widths": (_several((3, 5, 2), (3, 5, 4)), {}, r"0.npy has the shape \[3, 5, 2\], but 1.npy has \[3, 5, 4\]"),
    "two kinds": (_several((3, 5, 2), (3, 5, 2), suffixes=(".npy", ".pt")), {}, r"several kinds \(.npy, .pt\)"),
    "no layer": (_saved(np.zeros((3, 5, 2))), {"layers": []}, "does not say which layer it holds. Name it"),
    "too many layers": (_saved(np.zeros((3, 5, 2))), {"layers": [1, 2]}, "holds one layer, but 2 were named"),
    "too few layers": (_saved(np.zeros((3, 4, 5, 2))), {}, "axis of layers holds 4, but 1 were named with --layer"),
    "a layer twice": (_saved(np.zeros((3, 5, 2))), {"layers": [1, 1]}, "names a layer twice"),
    "no model": (_saved(np.zeros((3, 5, 2))), {"model_name": None}, "Which model made the activations"),
    "strange number of tokens": (_saved(np.zeros((3, 4, 4))), {"prefix": "cls"}, "4 tokens here, which is not --pre"),
    "no square": (_saved(np.zeros((3, 8, 4))), {}, "has 8 tokens here, which is not usual special tokens and a square"),
    "wrong grid": (_saved(np.zeros((3, 7, 4))), {"grid": "2x2"}, "not usual special tokens and --grid 2x2"),
    "malformed grid": (_saved(np.zeros((3, 7, 4))), {"grid": "2by2"}, "--grid must be rows x columns"),
    "malformed prefix": (_saved(np.zeros((3, 7, 4))), {"prefix": "reg,cls"}, "--prefix may hold cls once"),
    "no kind of token": (_saved(np.zeros((3, 7, 4))), {"prefix": "cls,bos"}, "--prefix must be none, cls"),
    "no whole image": (_saved(np.zeros((9, 4))), {"n_tokens": 5}, "9 tokens, which are no whole number of images"),
    "tokens as images": (_saved(np.zeros((3, 5, 4, 2))), {"n_tokens": 5}, r"layers, channels\] with --n-tokens"),
    "nobody's images": (_saved(np.zeros((3, 5, 2))), {"label": "kind"}, "--label is about images. Name them with --im"),
    "two models": (_saved(np.zeros((3, 5, 2))), {"model": "ViT-B-32"}, "--model and --model-name exclude each other"),
    "no precision": (_saved(np.zeros((3, 5, 2))), {"precision": "auto"}, "--precision must be float32 or bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    make, options, message = BAD[case]
    (tmp_path / "in").mkdir()
    acts = make(tmp_path / "in")
    with pytest.raises(PipelineError, match=message) as raised:
        import_activations(acts, tmp_path / "x.acts", **{**NAMED, **options})
    assert len(str(raised.value).splitlines()) == 1
    assert str(raised.value).endswith((".", ". "))
    assert not (tmp_path / "in" / "ran").exists()  # no code of a file was run
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_images_and_a_model_have_to_fit(tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str]) -> None:
    np.save(tmp_path / "x.npy", make_values(76, 10, 32))
    with pytest.raises(SettingsError, match=r"are of 76 images, but .*images has 75"):
        import_activations(tmp_path / "x.npy", tmp_path / "x.acts", images=tiny_images, **NAMED)
    for shape, layer, message in (
        ((3, 9, 32), 0, "have 9 tokens an image, but tiny.json has 10"),
        ((3, 10, 31), 0, "have 31 channels a token, but tiny.json has 32"),
        ((3, 10, 32), 3, r"has no layer 3: its blocks are 0..2"),
    ):
        np.save(tmp_path / "x.npy", make_values(*shape))
        with pytest.raises((ModelError, SettingsError), match=message):
            import_activations(tmp_path / "x.npy", tmp_path / "x.acts", layers=[layer], **tiny_model)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "is NaN or infinite for image"), (np.inf, "is NaN or infinite"), (1e5, "is too large for float16")],
)
def test_a_value_that_cannot_be_stored_names_its_image(value: float, message: str, tmp_path: Path) -> None:
    x = make_values(40, 5, 8)
    x[17, 2, 3] = value
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(NonFiniteError, match=rf"{message}.*number 17, from 0"):
        import_activations(tmp_path / "x.npy", tmp_path / "x.acts", shard_images=16, **NAMED)
    assert not list((tmp_path / "x.acts").rglob("*.tmp"))
    if value == 1e5:
        store = import_activations(tmp_path / "x.npy", tmp_path / "y.acts", dtype="float32", **NAMED)
        assert float(store.statistics(3).absmax) == 1e5


def test_a_store_does_not_lie_among_the_files_it_is_made_from(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "x.npy", make_values(3, 5, 8))
    with pytest.raises(SettingsError, match=r"lies inside .*in, which it is made from"):
        import_activations(tmp_path / "in", tmp_path / "in" / "x.acts", **NAMED)
    import_activations(tmp_path / "in", tmp_path / "x.acts", **NAMED)
    np.save(tmp_path / "x.acts" / "y.npy", make_values(3, 5, 8))  # it would be deleted with the store
    with pytest.raises(SettingsError, match=r"x\.acts contains .*y\.npy, which it is made from"):
        import_activations(tmp_path / "x.acts" / "y.npy", tmp_path / "x.acts", overwrite=True, **NAMED)
    with pytest.raises(SettingsError, match="is an artifact already"):
        import_activations(tmp_path / "x.acts", tmp_path / "y.acts", **NAMED)


def test_damaged_settings_name_the_field(tiny_store: Path) -> None:
    from actcache.store import StoreSettings

    fields = ActivationStore.open(tiny_store).settings.to_json()
    for imported in (
        "npy",
        {"format": "npy"},
        {"format": 1, "source": "x"},
        {"format": "npy", "source": "x", "layers": 3},
    ):
        with pytest.raises(CorruptError, match="imported"):
            StoreSettings.from_json({**fields, "imported": imported})


def test_extraction_is_not_affected(tiny_images: Path, tiny_model: dict[str, str], tmp_path: Path) -> None:
    store = extract(tiny_images, tmp_path / "x.acts", **tiny_model, layers=[0])  # type: ignore[arg-type]
    assert "imported" not in store.artifact.settings
    assert store.artifact.imported is None
