"""find_source(): which files of a repository are an SAE, and hf:// in `convert`, from a server on loopback."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from foreign_files import CHECKPOINTS, D, F, plain_tensors, write_prisma
from hub_server import ROOT, HubServer, hub_environment, run_client

from actcache.hub import HubAddress, HubListing
from actcache.hub.listing import HubFile
from saetrain import CodeStore, Run
from saetrain.interop.sources import _find_candidates, find_source

IMPORTED = "artifact.json manifest.json sae.safetensors"
RUN = f"{IMPORTED} metrics.jsonl learned.bin"
LAYOUTS: dict[str, tuple[str, str, dict[str, str]]] = {
    "SAELens, Prisma's TinyCLIP": (
        "", "README.md cfg.json ctx.safetensors sae_weights.safetensors sparsity.safetensors",
        {"": "sae_weights.safetensors cfg.json sparsity.safetensors"},
    ),
    "SAELens with its training": (
        "", "cfg.json sae_weights.safetensors activation_scaler.json trainer_state.pt runner_cfg.json",
        {"": "sae_weights.safetensors cfg.json activation_scaler.json"},
    ),
    "saev 2025": ("", ".gitattributes README.md config.json sae.pt", {"": "sae.pt config.json"}),
    "saev DINOv3": (
        "", "README.md manifest.jsonl layer_10/x1/sae.pt layer_6/x2/sae.pt layer_6/x3/sae.pt",
        {"layer_6/x2": "sae.pt", "layer_6/x3": "sae.pt", "layer_10/x1": "sae.pt"},
    ),
    "one of saev DINOv3": ("layer_6/x2", "sae.pt", {"": "sae.pt"}),
    "Prisma": ("", "config.json n_images_2600058.pt", {"n_images_2600058.pt": "n_images_2600058.pt config.json"}),
    "Prisma twice": (
        "", "config.json n_images_100.pt n_images_20.pt",
        {"n_images_20.pt": "n_images_20.pt config.json", "n_images_100.pt": "n_images_100.pt config.json"},
    ),
    "Prisma sweep": ("", "config.json weights.pt optimizer.pt", {"": "weights.pt config.json"}),
    "ViSAEBench": (
        "", "batchtopk_16x_k64/sae.pt batchtopk_16x_k64/config.json batchtopk_8x_k64/sae.pt",
        {"batchtopk_8x_k64": "sae.pt", "batchtopk_16x_k64": "sae.pt config.json"},
    ),
    "ViSAEBench, data": ("a/b", "config.yaml sae.pt training_log.json", {"": "sae.pt config.yaml"}),
    "RA-SAE": (
        "", "RA-SAE-DINOv2-32k.pth README.md config.json ra_sae.py",
        {"RA-SAE-DINOv2-32k.pth": "RA-SAE-DINOv2-32k.pth config.json"},
    ),
    "CLIP-Scope": (
        "", "20_resid/1200013184.pt 20_resid/100002304.pt 20_resid-abc.jsonl config.json",
        {"20_resid/100002304.pt": "100002304.pt", "20_resid/1200013184.pt": "1200013184.pt"},
    ),
    "one layer of CLIP-Scope": (
        "20_resid", "1200013184.pt 100002304.pt",
        {"100002304.pt": "100002304.pt", "1200013184.pt": "1200013184.pt"},
    ),
    "dictionary_learning": (
        "saes/x", "trainer_0/ae.pt trainer_0/config.json trainer_0/checkpoints/state.bin",
        {"trainer_0": "ae.pt config.json"},
    ),
    "PatchSAE": ("", "base/out.pt base/log.txt", {"base/out.pt": "out.pt"}),
    "a published SAE": (
        "", "README.md manifest.jsonl l1/cfg.json l1/sae_weights.safetensors l1/patchsae.safetensors l1/config.json",
        {"l1": "patchsae.safetensors cfg.json config.json"},
    ),
    "a run": ("", f"{RUN} places.json checkpoints/step-00000100.safetensors notes/names.json", {"": RUN}),
    "an imported run": ("", f"{IMPORTED} log.txt", {"": IMPORTED}),
    "a sweep": ("", f"{' '.join(f'{r}/{f}' for r in 'ab' for f in RUN.split())}", {"a": RUN, "b": RUN}),
    "a run in both forms": ("", f"{RUN} cfg.json sae_weights.safetensors", {"": RUN}),
    "its own before others": ("", "sae.pt config.json old/sae.pt", {"": "sae.pt config.json"}),
    "no SAE": ("", "model.safetensors config.json pytorch_model.bin optimizer.pt tokenizer.json", {}),
}  # fmt: skip
"""Folder of the address, files below it -> the SAEs by the name that an address needs, and what is fetched of each."""


def listing(folder: str, names: str, named: str | None = None) -> HubListing:
    return HubListing(HubAddress("o/r", folder, "0" * 40), tuple(HubFile(name, 1) for name in names.split()), named)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_saes_of_every_public_layout_are_recognized_by_name(layout: str) -> None:
    folder, names, expected = LAYOUTS[layout]
    found = _find_candidates(listing(folder, names))
    assert {each.name: " ".join(each.files) for each in found} == expected
    assert [each.name for each in found] == list(expected)


def test_a_file_that_is_named_is_taken_with_its_settings() -> None:
    names = "config.json any-name_64.pt other.pt sae.pt"
    (found,) = _find_candidates(listing("x", names, "any-name_64.pt"))
    assert (found.files, found.file) == (("any-name_64.pt", "config.json"), "any-name_64.pt")
    (found,) = _find_candidates(listing("x", names, "sae.pt"))
    assert (found.files, found.file) == (("sae.pt", "config.json"), None)


def test_a_path_is_a_source_as_it_is(tmp_path: Path) -> None:
    assert find_source(tmp_path).path == tmp_path
    assert find_source(str(tmp_path)).origin == {}


def contents(folder: Path, prefix: str = "") -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {f"{prefix}{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files}


@pytest.mark.slow
def test_an_sae_of_the_hub_becomes_a_run_and_a_run_of_the_hub_is_one(tmp_path: Path, planted_store: Path) -> None:
    write, config, tensors = CHECKPOINTS["saelens 6 topk"]
    saelens = write(tmp_path / "foreign", config(), tensors())
    settings = {
        "architecture": "standard", "activation_fn_str": "relu", "d_in": D, "d_sae": F, "hook_point_layer": 0,
        "layer_subtype": "hook_resid_post", "normalize_activations": None,
    }  # fmt: skip
    prisma = write_prisma(tmp_path / "prisma", settings, plain_tensors())
    (prisma / "weights.pt").rename(prisma / "n_images_2600058.pt")
    with HubServer() as server:
        commit = server.put("lab/many", contents(saelens, "layer_1/") | contents(prisma, "layer_2/"))
        command = ["convert", "hf://lab/many/layer_1", str(tmp_path / "run"), "--store", str(planted_store)]
        done = subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), *command], env=hub_environment(server, tmp_path / "home"),
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert re.search(r"^Downloading [\d.]+ kB of hf://lab/many/layer_1\.$", done.stderr, re.MULTILINE)
        run = Run.open(tmp_path / "run")
        assert run.artifact.provenance["source"] == {
            "repo": "lab/many", "commit": commit,
            "files": {f"layer_1/{name}": hashlib.sha256(data).hexdigest() for name, data in contents(saelens).items()},
        }  # fmt: skip
        assert not [request for request in server.requests if "/resolve/" in request and "layer_2" in request]

        server.put("me/runs", contents(run.path, "l1/"))
        answer = run_client(server, tmp_path / "home", """
from saetrain.interop.sources import find_source
prisma, run = find_source("hf://lab/many/layer_2"), find_source("hf://me/runs/l1")
answer = [refusal(find_source, "hf://lab/many"), prisma.path.name, sorted(prisma.origin["files"]),
          sorted(run.origin["files"]), [path.is_symlink() for path in run.path.iterdir()]]
""")  # fmt: skip
        message = (
            "hf://lab/many holds 2 SAEs. Name one of them, as in hf://lab/many/layer_1: layer_1, "
            "layer_2/n_images_2600058.pt."
        )
        names = [f"l1/{name}" for name in IMPORTED.split()]
        files = ["layer_2/config.json", "layer_2/n_images_2600058.pt"]
        assert answer == [["HubError", message], "n_images_2600058.pt", files, names, [False] * 3]
    answer = run_client(None, tmp_path / "home", """
from saetrain import Run, convert
from saetrain.interop.sources import find_source
folder, store = Path(sys.argv[1]), sys.argv[2]
imported = convert("hf://lab/many/layer_2", folder / "prisma", store=store)
exported = convert("hf://me/runs/l1", folder / "out", to="saelens", store=store)
answer = [Run.open(imported.path).artifact.provenance["source"]["commit"], exported.format, imported.format,
          Run.open(find_source("hf://me/runs/l1").path).run_id]
""", str(tmp_path / "made"), str(planted_store), HF_HUB_OFFLINE="1")  # fmt: skip
    assert answer == [commit, "saelens", "prisma", run.run_id]


def test_many_saes_are_counted_and_the_first_are_listed(tmp_path: Path) -> None:
    with HubServer() as server:
        server.put("lab/many", {f"layer_{n}/{name}": b"{}" for n in range(64) for name in ("sae.pt", "config.json")})
        server.put("lab/none", {"README.md": b"", "model.safetensors": b""})
        many, none = run_client(server, tmp_path, """
from saetrain.interop.sources import find_source
answer = [refusal(find_source, f"hf://lab/{name}@main") for name in ("many", "none")]
""")  # fmt: skip
        assert "holds 64 SAEs. Name one of them, as in hf://lab/many/layer_0: layer_0, layer_1, layer_2," in many[1]
        assert many[1].endswith("layer_18, layer_19 and 44 more.")
        assert "holds no SAE" in none[1]
        assert "README.md, model.safetensors" in none[1]
        assert not [request for request in server.requests if "/resolve/" in request]


CLI = """
import contextlib, io, cli
from typer.main import get_command
program = get_command(cli.app)
answer = []
for command in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            program.main(command, prog_name="patchsae")
        except SystemExit as end:
            code = end.code
    answer.append([code, out.getvalue(), err.getvalue()])
"""


@pytest.mark.slow
def test_a_verb_that_takes_a_run_takes_one_of_the_hub(tmp_path: Path, planted_run: Run, planted_store: Path) -> None:
    store, codes = str(planted_store), tmp_path / "x.codes"
    with HubServer() as server:
        server.put("me/runs", contents(planted_run.path, "l1/") | {"l2/sae.pt": b"{}"})
        commands = [
            ["encode", "hf://me/runs/l1", store, str(codes)],
            ["encode", "hf://me/runs/l2", store, str(tmp_path / "y.codes")],
            ["encode", str(planted_run.path), "hf://me/runs/l1", str(tmp_path / "y.codes")],
            ["encode", "hf://me", store, str(tmp_path / "y.codes")],
            ["info", "hf://me/runs/l1"],
        ]
        done, *refused = run_client(server, tmp_path / "home", CLI, json.dumps(commands))
    assert done[0] == 0, done
    assert "of hf://me/runs/l1." in done[2]
    assert CodeStore.open(codes).artifact.parent("run").id == planted_run.run_id
    assert [code for code, _, _ in refused] == [1] * 4
    assert [err.splitlines()[-1] for _, _, err in refused] == [
        "error: hf://me/runs/l2 is an SAE, but not a run. Make a run of it first: patchsae convert hf://me/runs/l2 RUN "
        "--store STORE.",
        "error: hf://me/runs/l1 is on the Hugging Face hub. Expected an activation store here; give its path.",
        "error: hf://me names no repository of the Hugging Face hub: there is none. Expected hf://OWNER/REPO, "
        "hf://OWNER/REPO/FOLDER or either with @REVISION (a branch, tag or commit).",
        "error: hf://me/runs/l1 is on the Hugging Face hub. Expected an artifact here; give its path.",
    ]
    assert not (tmp_path / "y.codes").exists()
