"""docs/reference/format.md is enough: artifacts written from the page alone, with zarr, pyarrow, safetensors and json.

Nothing of ours takes part in the writing. What is written is `whole` to verify, and every verb takes it.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from numpy.typing import NDArray
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

import cli

N, GRID, D, F, K = 40, (2, 3), 8, 24, 3
N_TOKENS = 1 + GRID[0] * GRID[1]
SHARD, CHUNK = 32, 16
HOOK = "blocks.2.hook_resid_post"
PREPROCESS = {
    "size": [16, 24], "mode": "RGB", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic",
    "resize_mode": "squash", "fill_color": 0,
}  # fmt: skip


def ask(command: str) -> Result:
    return CliRunner().invoke(cli.app, ["--quiet", "--json", *command.split()])


# ---------------------------------------------------------------------------------------------------------------------
# What every artifact has


def hash_of(fields: Any) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def spell(fields: dict[str, Any]) -> str:
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def digest_of(file: Path, sizes: list[int] | None = None) -> dict[str, Any]:
    data, pieces, start = file.read_bytes(), [], 0
    for size in sizes if sizes is not None else [len(data)] if data else []:
        pieces.append([size, google_crc32c.value(data[start : start + size])])
        start += size
    return {"bytes": len(data), "pieces": pieces}


def write_artifact(
    folder: Path, kind: str, settings: dict[str, Any], parents: dict[str, tuple[str, str]], **provenance: Any
) -> str:
    schema = 2 if settings.get("prefix", ["cls"]) != ["cls"] else 1
    ids = {name: id for name, (id, _) in parents.items()}
    identity = hash_of({"kind": kind, "schema": schema, "settings": settings, "parents": ids})
    fields = {
        "kind": kind, "schema": schema, "id": identity, "settings": settings,
        "parents": {name: {"id": id, "path": path} for name, (id, path) in parents.items()}, "provenance": provenance,
    }  # fmt: skip
    (folder / "artifact.json").write_text(spell(fields))
    return identity


def write_record(folder: Path, shard: int, files: dict[str, Any], **more: Any) -> None:
    fields = {"shard": shard, "files": files, **more}
    (folder / "commits").mkdir(exist_ok=True)
    (folder / "commits" / f"{shard:06d}.json").write_text(spell({**fields, "digest": hash_of(fields)}))


def seal(folder: Path, **summary: Any) -> None:
    recorded = {
        name for record in (folder / "commits").glob("*.json") for name in json.loads(record.read_text())["files"]
    }
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    files = {name: digest_of(folder / name) for name in names if name not in recorded}
    fields = {"files": files, **summary}
    (folder / "manifest.json").write_text(spell({**fields, "digest": hash_of(fields)}))


def write_images(folder: Path) -> None:
    columns = {
        "source_index": pa.array(range(N), pa.int64()),
        "uri": [f"class{i % 2}/{i:03d}.png" for i in range(N)],
        "label": pa.array([i % 2 for i in range(N)], pa.int32()),
        "label_name": [f"class{i % 2}" for i in range(N)],
        "bytes": pa.array([-1] * N, pa.int64()),
    }
    pq.write_table(pa.table(columns), folder / "images.parquet")


# ---------------------------------------------------------------------------------------------------------------------
# x.acts, a run, x.codes


def write_store(folder: Path, prefix: tuple[str, ...] = ("cls",)) -> NDArray[np.float16]:
    """An activation store of random values [N, tokens, D], which it returns in the order of the stream."""
    folder.mkdir()
    write_images(folder)
    settings = {
        "model_id": "0123456789abcdef", "rows_id": hash_of("my images"), "hook_points": [HOOK], "dtype": "float16",
        "precision": "float32", "codec": "raw", "n_images": N, "grid": list(GRID), "patch_size": [8, 8], "d_model": D,
        "n_extra": 0, "chunk_images": CHUNK, "shard_images": SHARD, "seed": 0, "limit": None, "preprocess": PREPROCESS,
        **({} if prefix == ("cls",) else {"prefix": list(prefix)}),
    }  # fmt: skip
    identity = write_artifact(folder, "acts", settings, {"images": (settings["rows_id"], "../images")})
    attributes = {"actcache": {**settings, "store_id": identity, "complete": True}}
    root = zarr.open_group(folder / "activations.zarr", mode="w", zarr_format=3, attributes=attributes)
    group = root.create_group(HOOK)
    n_cls, first_patch = prefix.count("cls"), len(prefix)
    n_registers = first_patch - n_cls
    shapes = {
        "patches": ((GRID[0] * GRID[1], D), (GRID[1], D)), "cls": ((D,), (D,)),
        "registers": ((n_registers, D), (n_registers, D)),
    }  # fmt: skip
    names = {
        "patches": ("image", "patch", "channel"), "cls": ("image", "channel"),
        "registers": ("image", "register", "channel"),
    }  # fmt: skip
    n_tokens = first_patch + GRID[0] * GRID[1]
    values = np.random.default_rng(0).normal(size=(N, n_tokens, D)).astype("<f2")
    parts = {"patches": values[:, first_patch:]}
    if n_cls:
        parts["cls"] = values[:, 0]
    if n_registers:
        parts["registers"] = values[:, n_cls:first_patch]
    for array in parts:
        rest, chunk = shapes[array]
        group.create_array(
            array, shape=(N, *rest), dtype="<f2", chunks=(CHUNK, *chunk), shards=(SHARD, *rest), compressors=None,
            fill_value=0, dimension_names=names[array],
        )  # fmt: skip
    total: dict[str, dict[str, Any]] = {}
    for shard, first in enumerate(range(0, N, SHARD)):
        last = min(first + SHARD, N)
        files, statistics = {}, {}
        for array, part in parts.items():
            file = folder / "activations.zarr" / HOOK / array / "c" / str(shard) / ("0" if array == "cls" else "0/0")
            sizes = write_raw_shard(file, part[first:last], GRID[0] if array == "patches" else 1)
            files[str(file.relative_to(folder))] = digest_of(file, sizes)
            if array == "registers":
                continue
            rows = part[first:last].reshape(-1, D).astype(np.float64)
            kind = "patch" if array == "patches" else "cls"
            statistics[kind] = {
                "count": len(rows), "sum": rows.sum(0).tolist(), "sum_squares": (rows**2).sum(0).tolist(),
                "absmax": float(abs(rows).max()),
            }  # fmt: skip
            add(total, kind, statistics[kind])
        write_record(folder, shard, files, images=[first, last], failed={}, statistics={HOOK: statistics})
    seal(folder, failed={}, statistics={HOOK: total})
    return values


def write_raw_shard(file: Path, values: NDArray[np.float16], n_rows: int) -> list[int]:
    """The chunks of patch row 0, of row 1 ..., then the index. Returns the sizes of the pieces of the digest."""
    file.parent.mkdir(parents=True)
    n_blocks = -(-len(values) // CHUNK)
    padded = np.zeros((n_blocks * CHUNK, *values.shape[1:]), "<f2")
    padded[: len(values)] = values
    blocks = padded.reshape(n_blocks, CHUNK, n_rows, -1).transpose(2, 0, 1, 3)
    data, size = np.ascontiguousarray(blocks).tobytes(), blocks[0, 0].nbytes
    index = np.full((SHARD // CHUNK, n_rows, 2), 2**64 - 1, "<u8")
    for block in range(n_blocks):
        for row in range(n_rows):
            index[block, row] = (row * n_blocks + block) * size, size
    tail = index.tobytes() + int(google_crc32c.value(index.tobytes())).to_bytes(4, "little")
    file.write_bytes(data + tail)
    return [size] * (n_blocks * n_rows) + [len(tail)]


def add(total: dict[str, dict[str, Any]], kind: str, more: dict[str, Any]) -> None:
    old = total.setdefault(kind, {"count": 0, "sum": [0.0] * D, "sum_squares": [0.0] * D, "absmax": 0.0})
    old["count"] += more["count"]
    for name in ("sum", "sum_squares"):
        old[name] = [a + b for a, b in zip(old[name], more[name], strict=True)]
    old["absmax"] = max(old["absmax"], more["absmax"])


def write_run(folder: Path, store: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(1)
    decoder = rng.normal(size=(F, D)).astype(np.float32)
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    zeros = {name: np.zeros(n, np.float32) for name, n in (("b_enc", F), ("b_dec", D), ("mean", D))}
    tensors = {"encoder": decoder, "decoder": decoder, **zeros, "scale": np.array(1, np.float32)}
    save_file(tensors, folder / "sae.safetensors")
    settings = {
        "model_id": "0123456789abcdef", "hook_point": HOOK, "d_model": D,
        "sae": {"variant": "topk", "n_latents": F, "k": K, "l1": 0.001, "normalize": "center"},
        "train": {"n_steps": 1, "batch_size": 16, "lr": 0.001, "tokens": "all"},
    }  # fmt: skip
    store_id = json.loads((store / "artifact.json").read_text())["id"]
    write_artifact(folder, "run", settings, {"store": (store_id, f"../{store.name}")})
    kind = {"fvu": 0.5, "l0": 3.0, "cosine": 0.7}
    seal(folder, quality={"all": kind, "cls": kind, "patch": kind, "silent": 0.0, "dense": 0.0, "n_tokens": 14})


def write_codes(folder: Path, store: Path, values: NDArray[np.float16]) -> None:
    """Codes of some latents: the positive ones among three fixed sums of channels, so any numbers will do."""
    folder.mkdir()
    write_images(folder)
    rng = np.random.default_rng(2)
    dense = np.maximum(values.reshape(N * N_TOKENS, D).astype(np.float32) @ rng.normal(size=(D, F)), 0)
    dense[dense < np.sort(dense, axis=1)[:, [-K]]] = 0
    dense = dense.astype(np.float16)
    source = json.loads((store / "artifact.json").read_text())
    dtypes = {
        "indptr": "<i8", "latent": "<u2", "value": "<f2", "latent_indptr": "<i8", "row": "<u4", "latent_value": "<f2",
    }  # fmt: skip
    settings = {
        "rows_id": source["settings"]["rows_id"], "hook_point": HOOK, "tokens": "all", "n_images": N,
        "n_tokens": N_TOKENS, "grid": list(GRID), "n_latents": F, "shard_sizes": [SHARD, N - SHARD], "dtypes": dtypes,
        "preprocess": PREPROCESS,
    }  # fmt: skip
    parents = {
        "store": (source["id"], f"../{store.name}"), "run": ("fedcba9876543210", "../elsewhere"),
        "images": (source["settings"]["rows_id"], "../images"),
    }  # fmt: skip
    write_artifact(folder, "codes", settings, parents)
    root = zarr.open_group(folder / "codes.zarr", mode="w", zarr_format=3)
    n_entries = 0
    for shard, first in enumerate(range(0, N, SHARD)):
        part = dense[first * N_TOKENS : min(first + SHARD, N) * N_TOKENS]
        row, latent = np.nonzero(part)
        order = np.lexsort((row, latent))
        arrays = {
            "indptr": np.concatenate([[0], np.cumsum((part > 0).sum(1))]), "latent": latent, "value": part[row, latent],
            "latent_indptr": np.concatenate([[0], np.cumsum((part > 0).sum(0))]),
            "row": row[order] + first * N_TOKENS, "latent_value": part[row[order], latent[order]],
        }  # fmt: skip
        group = root.create_group(str(shard))
        for name, array in arrays.items():
            made = group.create_array(
                name, shape=array.shape, dtype=dtypes[name], chunks=(max(len(array), 1),), compressors=None
            )
            made[:] = array.astype(dtypes[name])
        files = sorted(file for file in (folder / "codes.zarr" / str(shard)).rglob("*") if file.is_file())
        digests = {str(file.relative_to(folder)): digest_of(file) for file in files}
        write_record(folder, shard, digests, n_entries=len(row))
        n_entries += len(row)
    seal(folder, n_entries=n_entries, failed={})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page")
    values = write_store(path / "x.acts")
    write_run(path / "run", path / "x.acts")
    write_codes(path / "x.codes", path / "x.acts", values)
    np.save(path / "values.npy", values)
    return path


COMMANDS: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "verify acts": ("verify {0}/x.acts", lambda answer: answer["ok"] is True),
    "verify run": ("verify {0}/run", lambda answer: answer["ok"] is True),
    "verify codes": ("verify {0}/x.codes", lambda answer: answer["ok"] is True),
    "info acts": ("info {0}/x.acts", lambda answer: answer["complete"] is True),
    "info codes": ("info {0}/x.codes", lambda answer: answer["n_entries"] == N * N_TOKENS * K),
    "query latent": ("query {0}/x.codes --latent 3", lambda answer: len(answer["rows"]) > 0),
    "query image": ("query {0}/x.codes --image 5", lambda answer: len(answer["rows"]) > 0),
    "query class": ("query {0}/x.codes --class class1", lambda answer: len(answer["rows"]) > 0),
    "rules": ("rules {0}/x.codes --n-patches 1", lambda answer: answer["n_judged"] > 0),
    "probe": (
        "probe {0}/x.codes --label label_name --k 1 --n-random 1 --on-seen use",
        lambda answer: answer["n_judged"] > 0,
    ),
    "analyze": ("analyze {0}/x.codes {0}/x.concepts", lambda answer: answer["n_tokens"] == N * N_TOKENS),
    "report": ("report {0}/x.concepts {0}/page.html", lambda answer: answer["bytes"] > 1000),
    "train": (
        "train {0}/x.acts {0}/trained --n-latents 16 --k 2 --n-steps 5 --batch-size 16",
        lambda answer: answer["quality"]["all"]["fvu"] > 0,
    ),
    "encode by that": ("encode {0}/trained {0}/x.acts {0}/trained.codes", lambda answer: answer["n_entries"] > 0),
    "encode": ("encode {0}/run {0}/x.acts {0}/y.codes", lambda answer: answer["n_entries"] > 0),
    "analyze what it encoded": ("analyze {0}/y.codes {0}/y.concepts", lambda answer: answer["n_alive"] > 0),
    "inspect": ("inspect {0}/run {0}/trained --store {0}/x.acts --n-tokens 8", lambda answer: len(answer["runs"]) == 2),
    "convert": ("convert {0}/run {0}/saelens --store {0}/x.acts", lambda answer: answer["format"] == "saelens"),
    "publish": ("publish {0}/run {0}/repository", lambda answer: answer["written"]),
}


def test_every_verb_takes_what_the_page_describes(folder: Path) -> None:
    for name, (command, right) in COMMANDS.items():
        done = ask(command.format(folder))
        assert done.exit_code == 0, (name, done.output, done.exception)
        assert right(json.loads(done.stdout)), (name, done.stdout)


@pytest.mark.parametrize("prefix", [(), ("reg", "reg"), ("cls", "reg", "dist")], ids=str)
def test_stores_with_other_special_tokens_are_taken_as_the_page_describes_them(
    tmp_path: Path, prefix: tuple[str, ...]
) -> None:
    from actcache import ActivationStore

    values = write_store(tmp_path / "x.acts", prefix)
    n_cls, first = prefix.count("cls"), len(prefix)
    store = ActivationStore.open(tmp_path / "x.acts")
    np.testing.assert_array_equal(store.read_stream(check=True), values)
    np.testing.assert_array_equal(store.read_registers(check=True), values[:, n_cls:first])
    np.testing.assert_array_equal(store.read(tokens="patch", check=True), values[:, first:])
    kept = [*range(n_cls), *range(first, values.shape[1])]
    np.testing.assert_array_equal(store.read(check=True), values[:, kept])
    kind = "all" if n_cls else "patch"
    write = "--n-latents 16 --k 2 --n-steps 5 --batch-size 16"
    asked = {
        f"verify {tmp_path}/x.acts": lambda answer: answer["ok"] is True,
        f"train {tmp_path}/x.acts {tmp_path}/run {write}": lambda answer: answer["quality"][kind]["fvu"] > 0,
        f"encode {tmp_path}/run {tmp_path}/x.acts {tmp_path}/x.codes": lambda answer: answer["n_entries"] > 0,
        f"analyze {tmp_path}/x.codes {tmp_path}/x.concepts": lambda answer: answer["n_tokens"] == N * len(kept),
        f"report {tmp_path}/x.concepts {tmp_path}/page.html": lambda answer: answer["bytes"] > 1000,
    }
    for command, right in asked.items():
        done = ask(command)
        assert done.exit_code == 0, (command, done.output, done.exception)
        assert right(json.loads(done.stdout)), (command, done.stdout)
    assert json.loads((tmp_path / "x.codes" / "artifact.json").read_text())["settings"]["tokens"] == kind


def test_the_values_are_those_that_were_written(folder: Path) -> None:
    from actcache import ActivationStore

    values = np.load(folder / "values.npy")
    np.testing.assert_array_equal(ActivationStore.open(folder / "x.acts").read(check=True), values)
    group = zarr.open_group(folder / "x.acts" / "activations.zarr", mode="r")
    np.testing.assert_array_equal(np.asarray(group[f"{HOOK}/patches"][:]), values[:, 1:])  # type: ignore[index]
