"""publish() to the hub: the real client against a server on loopback, in processes of their own."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import Handler, HubServer, hub_environment, run_client
from safetensors.torch import load_file

from actcache import ActivationStore
from saetrain import Run

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[2] / "golden" / "pipeline"
PUBLISH = """
from analysis import publish
def attempt(src, dst, **options):
    try:
        done = publish(Path(sys.argv[1]) / src, dst, **options)
    except PipelineError as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"folder": done.folder, "address": done.address, "commit": done.commit, "written": done.written,
            "states": {file.path: file.state for file in done.files}, "behind": done.left_behind}
yes = lambda plan: True
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def manifest_of(files: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    return {line["path"]: line for line in map(json.loads, files["manifest.jsonl"].splitlines())}


def test_saes_are_added_to_a_repository_and_read_back(server: HubServer, tmp_path: Path) -> None:
    server.put("me/saes", {"README.md": b"---\nlicense: mit\n---\n\n# My words\n"})
    code = (
        PUBLISH
        + """
answer = [attempt("run", "hf://me/saes", confirm=yes, license="mit"),
          attempt("runs/variantrelu", "hf://me/saes/relu/small", confirm=yes),
          attempt("run", "hf://me/saes", confirm=None, license="mit"),
          attempt("runs/variantgated", "hf://me/saes/relu", confirm=yes),
          attempt("runs/variantgated", "hf://me/saes/relu/small", confirm=yes),
          attempt("a.concepts", "hf://me/saes", confirm=yes, license="mit", gallery=True, overwrite=True),
          attempt("run", "hf://me/saes", confirm=yes, license="mit", overwrite=True)]
"""
    )
    first, second, again, around, other, shown, hidden = run_client(
        server, tmp_path, code, str(GOLDEN), HF_TOKEN="hf_x"
    )
    commits = [each["commit"] for each in (first, second, shown, hidden)]
    assert len(set(commits)) == 4
    files = server.repos["me/saes"][commits[1]]
    listed = manifest_of(files)
    assert {path: line["sha256"] for path, line in listed.items()} == {
        path: hashlib.sha256(data).hexdigest() for path, data in files.items() if "/" in path
    }
    assert {line["sae"]["variant"] for line in listed.values() if "sae" in line} == {"topk", "relu"}
    readme = files["README.md"].decode()
    assert readme.startswith("---\nlicense: mit\n---\n\n# My words\n")
    assert len([line for line in readme.splitlines() if line.startswith("| [")]) == 2
    assert second["folder"] == "relu/small"
    before = server.repos["me/saes"][commits[0]]
    assert {path: files[path] for path in before if path.startswith(first["folder"])} == {
        path: data for path, data in before.items() if path.startswith(first["folder"])
    }
    assert (again["written"], again["commit"]) == (False, commits[1])  # it is compared, and nothing is asked
    assert set(again["states"].values()) == {"unchanged"}
    assert "one inside the other" in around["text"]
    assert "--overwrite" in other["text"]
    assert "another SAE" in other["text"]
    assert set(hidden["behind"]) > {f"{first['folder']}/gallery.parquet"}  # the hub keeps what was published before
    assert not [path for path in manifest_of(server.repos["me/saes"][commits[3]]) if "gallery" in path]
    second_commit = [i for i, request in enumerate(server.requests) if "/commit/" in request][1]
    sent = [request for request in server.requests[:second_commit] if request.startswith("PUT /large/")]
    assert len(sent) == len(set(sent)) == 6  # what the repository has is not sent again


def test_nothing_is_uploaded_that_was_not_confirmed_and_a_broken_upload_goes_on(
    server: HubServer, tmp_path: Path
) -> None:
    mark = tmp_path / "asked"

    def break_off(handler: Handler) -> None:
        """The server dies after it has taken the large files."""
        if mark.exists():
            handler.close_connection = True
            handler.connection.close()
        else:
            handler.commit("models", "me/first", "main")

    def tamper(handler: Handler) -> None:
        handler.commit("models", "me/second", "main")
        files = handler.hub.repos["me/second"]["main"]
        name = next(name for name in files if name.endswith("cfg.json"))
        files[name] = files[name].replace(b"topk", b"tapk")

    def check_parent(handler: Handler) -> None:
        """Somebody else makes a commit between the listing and ours; the hub compares the parent that we name."""
        handler.hub.put("me/third", {"mine.txt": b"mine"})
        named = json.loads(handler.body.splitlines()[0])["value"]["parentCommit"]
        if named != handler.hub.commit_of("me/third", "main"):
            handler.refuse(412, "", "the branch has moved")

    server.put("me/third", {"README.md": b"# Third"})
    server.special = [
        (r"POST /api/models/me/first/commit/", break_off),
        (r"POST /api/models/me/second/commit/", tamper),
        (r"POST /api/models/me/third/commit/", check_parent),
    ]
    code = (
        PUBLISH
        + """
import json
asked = lambda plan: Path(sys.argv[2]).write_text(json.dumps([file.path for file in plan.files])) < 0
answer = [attempt("run", "hf://me/first"), attempt("run", "hf://me/first", confirm=asked),
          attempt("run", "hf://me/first", dry_run=True)]
answer.append(attempt("run", "hf://me/first", confirm=yes))
Path(sys.argv[2]).rename(sys.argv[2] + "-then")
answer += [attempt("run", "hf://me/first", confirm=yes), attempt("run", "hf://me/second", confirm=yes),
           attempt("run", "hf://me/third", confirm=yes)]
"""
    )
    none, no, dry, broken, done, tampered, raced = run_client(
        server, tmp_path / "home", code, str(GOLDEN), str(mark), HF_TOKEN="hf_x"
    )
    asked = json.loads((tmp_path / "asked-then").read_text())
    assert none["error"] == no["error"] == "SettingsError"
    assert "not confirmed" in no["text"]
    assert "README.md" in asked
    assert (dry["written"], dry["commit"]) == (False, None)
    first_write = next(i for i, request in enumerate(server.requests) if request.startswith(("PUT", "POST")))
    assert "create" in server.requests[first_write]  # of the attempt that was confirmed
    assert broken["error"] in ("HubError", "CorruptError")
    assert "\n" not in broken["text"]
    assert done["written"]
    assert tampered["error"] == "CorruptError"
    assert "cfg.json differ" in tampered["text"]
    assert "another commit was made at the same time" in raced["text"]
    assert len({id(files) for files in server.repos["me/first"].values()}) == 2  # the first commit, and that of the SAE
    sent = [request for request in server.requests if request.startswith("PUT /large/")]
    assert len(sent) >= len(set(sent)) == 3


CLI = """
import os
import cli
from typer.testing import CliRunner
os.chdir(sys.argv[1])
def run(words, typed=""):
    done = CliRunner().invoke(cli.app, words.split(), input=typed)
    return [done.exit_code, done.stdout, done.stderr]
answer = [run("publish run hf://me/saes", "no\\n"), run("--json publish run hf://me/saes", "yes\\n")]
address = json.loads(answer[1][1])["address"]
answer += [run(f"convert {address} theirs --store a.acts"), run("--json publish theirs again")]
answer += [run("publish run hf://me/saes --yes")]
"""


def test_the_command_asks_and_others_use_what_was_published(server: HubServer, tmp_path: Path) -> None:
    golden = Path(shutil.copytree(GOLDEN, tmp_path / "golden"))
    refused, done, converted, again, same = run_client(server, tmp_path / "home", CLI, str(golden), HF_TOKEN="hf_x")
    assert refused[0] == 1
    assert refused[1] == ""
    assert "patchsae.safetensors" in refused[2]  # what it would be is shown before the question
    assert "Type yes" in refused[2]
    assert "Nothing was uploaded" in refused[2].splitlines()[-1]
    assert len([request for request in server.requests if "/commit/" in request]) == 1
    assert done[0] == 0, done[2]
    assert json.loads(done[1])["commit"] == server.commit_of("me/saes", "main")
    assert f"Was there already: {json.loads(done[1])['address']}\n" in same[2]
    assert converted[0] == 0, converted[2]
    mine, theirs = (load_file(golden / name / "sae.safetensors") for name in ("run", "theirs"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    folder = golden / json.loads(again[1])["address"]  # who publishes it further says where it is from
    training = json.loads((folder / "config.json").read_bytes())["training"]
    assert training["imported"] == "published"
    assert training["source"] == f"hf://me/saes@{server.commit_of('me/saes', 'main')}"
    assert training["source"] in (folder / "README.md").read_text()


LOAD = """
import sys
import numpy as np, torch
from sae_lens import SAE
x, answers = torch.from_numpy(np.load(sys.argv[1])), {}
for i, folder in enumerate(sys.argv[3:]):
    sae = SAE.from_pretrained("me/saes", folder)
    sae = sae[0] if isinstance(sae, tuple) else sae
    with torch.no_grad():
        codes = sae.encode(x)
        answers |= {f"codes{i}": codes.numpy(), f"decoded{i}": sae.decode(codes).numpy()}
np.savez(sys.argv[2], **answers)
"""
RUNS = ("run", *(f"runs/variant{each}" for each in ("batchtopk", "relu", "jumprelu", "gated")))


def test_sae_lens_loads_what_was_published(server: HubServer, tmp_path: Path) -> None:
    python = os.environ.get("PATCHSAE_PEERS_PYTHON")
    if not python:
        pytest.skip("PATCHSAE_PEERS_PYTHON does not name a python with sae-lens and dictionary-learning")
    code = f"{PUBLISH}\nanswer = [attempt(name, 'hf://me/saes', confirm=yes)['folder'] for name in {RUNS}]"
    folders = run_client(server, tmp_path / "home", code, str(GOLDEN), HF_TOKEN="hf_x")
    values = ActivationStore.open(GOLDEN / "a.acts").read()
    x = torch.from_numpy(values.reshape(-1, values.shape[-1])).float()
    np.save(tmp_path / "x.npy", x.numpy())
    environment = hub_environment(server, tmp_path / "peer")
    del environment["PYTHONPATH"]
    command = [python, "-c", LOAD, str(tmp_path / "x.npy"), str(tmp_path / "y.npz"), *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "y.npz") as theirs:
        for i, name in enumerate(RUNS):
            sae = Run.open(GOLDEN / name).sae()
            rows, latents, codes = sae.encode(x)
            dense = torch.zeros(len(x), sae.config.n_latents).index_put_((rows, latents), codes)
            decoded = sae.decode(rows, latents, codes, len(x))
            np.testing.assert_allclose(theirs[f"codes{i}"], dense.numpy(), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(theirs[f"decoded{i}"], decoded.numpy(), rtol=1e-4, atol=1e-4)
