"""RA-SAE: a pickled module of overcomplete with a LayerNorm over its latents, read without the package or its matrix in
memory. The file has the structure of RA-SAE-DINOv2-32k; where PATCHSAE_PEERS_PYTHON names a python with overcomplete,
the package itself writes and computes it.
"""

import json
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from actcache import ActivationStore, CorruptError, PipelineError, SettingsError
from saetrain import SAE, Run, convert, encode
from saetrain.interop.formats import read_foreign
from saetrain.interop.module_file import load_module
from saetrain.interop.ra_sae import CLASSES

D, F, POINTS, THRESHOLD, DELTA = 32, 40, 50, 0.4, 0.5


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Classes without code under the names that overcomplete's have, as a pickle refers to them."""
    made: dict[str, type] = {}
    for module, name in (
        ("batchtopk_sae", "BatchTopKSAE"), ("modules", "MLPEncoder"),
        ("archetypal_dictionary", "RelaxedArchetypalDictionary"),
    ):  # fmt: skip
        full = f"overcomplete.sae.{module}"
        made[name] = type(name, (nn.Module,), {"__module__": full})
        fake = types.ModuleType(full)
        setattr(fake, name, made[name])
        for parent in ("overcomplete", "overcomplete.sae"):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, full, fake)
    return made


def build(package: dict[str, type], *, n_latents: int = F, points: int = POINTS) -> nn.Module:
    torch.manual_seed(0)
    sae, encoder, dictionary = (package[name]() for name in package)
    encoder.mlp_blocks, encoder.final_activation = nn.ModuleList(), nn.ReLU()
    encoder.final_block = nn.Sequential(nn.Linear(D, n_latents), nn.LayerNorm(n_latents))
    encoder.norm_layer, encoder.hidden_activation, encoder.input_size = nn.LayerNorm, nn.ReLU, D
    with torch.no_grad():
        encoder.final_block[1].weight.add_(0.3 * torch.randn(n_latents))
        encoder.final_block[1].bias.add_(0.3 * torch.randn(n_latents))
    dictionary.register_buffer("C", torch.randn(points, D))
    dictionary.W = nn.Parameter(torch.randn(n_latents, points))
    dictionary.Relax = nn.Parameter(torch.randn(n_latents, D) * torch.linspace(0.01, 1, n_latents)[:, None])
    dictionary.multiplier, dictionary.delta = nn.Parameter(torch.tensor(0.3)), DELTA
    dictionary._fused_dictionary = None
    sae.encoder, sae.dictionary, sae.running_threshold, sae.device = encoder, dictionary, None, torch.device("cpu")
    return nn.DataParallel(sae)


def publish(model: nn.Module, folder: Path, **more: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model, folder / "RA-SAE.pth")
    (folder / "config.json").write_text(json.dumps({"running_threshold": THRESHOLD, "backbone": "x", **more}))
    return folder


def plain(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    sae = model.module
    block, d = sae.encoder.final_block, sae.dictionary
    z = layer_norm(linear(x, block[0].weight, block[0].bias), (F,), block[1].weight, block[1].bias).relu()
    w = d.W.relu()
    length = d.Relax.norm(dim=1, keepdim=True)
    rows = w / w.sum(1, keepdim=True) @ d.C + d.Relax * torch.where(length > DELTA, DELTA / length, 1)
    codes = z * (z >= THRESHOLD)
    return codes.detach(), (codes @ rows * d.multiplier.exp()).detach()


def dense(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    rows, latents, values = sae.encode(x)
    codes = torch.zeros(len(x), F).index_put_((rows, latents), values)
    assert sae.norms is not None
    return codes / sae.norms, sae.decode(rows, latents, values, len(x))


def rows_of(store: Path) -> Tensor:
    values = ActivationStore.open(store).read(images=range(8, 40))
    return torch.from_numpy(values.reshape(-1, values.shape[-1])).float()


@pytest.mark.parametrize("given", ["folder", "file"])
def test_it_computes_what_the_module_does(
    tmp_path: Path, package: dict[str, type], planted_store: Path, given: str
) -> None:
    model, x = build(package), rows_of(planted_store)
    folder = publish(model, tmp_path / "in")
    path = folder if given == "folder" else folder / "RA-SAE.pth"
    made = convert(path, tmp_path / "run", store=planted_store)
    assert made.format == "ra_sae"
    assert made.parity.max_reconstruction_difference < 1e-4
    run = Run.open(tmp_path / "run")
    wanted = plain(model, x)
    assert 0.01 < float((wanted[0] > 0).float().mean()) < 0.9
    for ours, theirs in zip(dense(run.sae(), x), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert encode(run, planted_store, tmp_path / "codes").n_entries > 0


def test_a_dictionary_that_was_fused_for_evaluation_is_the_one_that_counts(
    tmp_path: Path, package: dict[str, type]
) -> None:
    model = build(package)
    fused = torch.randn(F, D)
    model.module.dictionary._fused_dictionary = fused
    training = read_foreign(publish(model, tmp_path / "training"))
    evaluating = read_foreign(publish(model.eval(), tmp_path / "evaluating"))
    x = torch.randn(30, D, generator=torch.Generator().manual_seed(3))
    codes, decoded = evaluating.forward(x)
    torch.testing.assert_close(decoded, codes @ fused)
    torch.testing.assert_close(dense(evaluating.sae, x)[1], decoded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(training.forward(x), plain(model, x), rtol=1e-4, atol=1e-4)


def test_blocks_of_rows_are_joined_in_their_order(
    tmp_path: Path, package: dict[str, type], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = build(package), torch.randn(20, D)
    folder = publish(model, tmp_path / "in")
    monkeypatch.setattr("saetrain.interop.module_file.BLOCK_BYTES", 7 * 4 * POINTS)
    assert len(list(load_module(folder / "RA-SAE.pth", CLASSES).get("module").get("dictionary").get("W").rows())) == 6
    foreign = read_foreign(folder)
    for made in (dense(foreign.sae, x), foreign.forward(x)):
        torch.testing.assert_close(made, plain(model, x), rtol=1e-4, atol=1e-4)


MEASURE = """
import resource, sys, torch
from pathlib import Path
from saetrain.interop.formats import read_foreign
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
foreign = read_foreign(Path(sys.argv[1]))
foreign.forward(torch.zeros(1, 32))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_large_matrix_is_never_in_memory(tmp_path: Path, package: dict[str, type]) -> None:
    """W has 256 MB, of which both sides of the parity report hold 32 MiB at a time."""
    size = 8000
    folder = publish(build(package, n_latents=size, points=size), tmp_path / "in")
    assert (folder / "RA-SAE.pth").stat().st_size > 4 * size**2
    command = [sys.executable, "-c", MEASURE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) * 1024 < size**2 * 2  # half of it


class Malice:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_no_code_of_a_module_is_run(tmp_path: Path, package: dict[str, type], planted_store: Path) -> None:
    witness = tmp_path / "witness"
    for number, bad in enumerate(
        (Malice(os.system, f"touch {witness}"), Malice(eval, "1"), Malice(Path.touch, witness), nn.GELU(), {"a": eval})
    ):
        model = build(package)
        model.module.extra = bad
        with pytest.raises(CorruptError, match="is not on the list") as caught:
            convert(publish(model, tmp_path / str(number)), tmp_path / "run", store=planted_store)
        assert "\n" not in str(caught.value)
    assert not witness.exists()
    assert not (tmp_path / "run").exists()


def test_what_is_damaged_or_another_sae_is_refused_in_one_line(
    tmp_path: Path, package: dict[str, type], planted_store: Path
) -> None:
    def change(edit: Callable[[Any], object]) -> Callable[[Path], object]:
        def write(folder: Path) -> None:
            model = build(package)
            edit(model.module)
            publish(model, folder)

        return write

    def cut(folder: Path) -> None:
        data = (publish(build(package), folder) / "RA-SAE.pth").read_bytes()
        (folder / "RA-SAE.pth").write_bytes(data[: len(data) // 2])

    def flip(folder: Path) -> None:
        file = publish(build(package), folder) / "RA-SAE.pth"
        with zipfile.ZipFile(file) as archive:
            place = max(archive.infolist(), key=lambda entry: entry.file_size).header_offset + 2000
        data = bytearray(file.read_bytes())
        data[place] ^= 1
        file.write_bytes(data)

    def pack(folder: Path) -> None:
        file = publish(build(package), folder) / "RA-SAE.pth"
        with zipfile.ZipFile(file) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)

    def set_block(index: int, part: nn.Module) -> Callable[[Any], object]:
        return lambda sae: sae.encoder.final_block.__setitem__(index, part)

    transposed = nn.Parameter(torch.randn(POINTS, F).T)
    cases: dict[str, tuple[type[PipelineError], Callable[[Path], object]]] = {
        "did not finish": (CorruptError, cut),
        "cannot be read": (CorruptError, flip),
        "is not stored as numbers": (CorruptError, pack),
        "must have a number running_threshold": (
            CorruptError, lambda p: publish(build(package), p, running_threshold="high"),
        ),
        "which is not supported": (SettingsError, change(set_block(1, nn.LayerNorm(F, eps=1e-3)))),
        "of hidden layers, Linear": (SettingsError, change(lambda sae: sae.encoder.mlp_blocks.append(nn.Linear(D, D)))),
        "has no tensor W": (CorruptError, change(lambda sae: delattr(sae.dictionary, "W"))),
        "row after row": (CorruptError, change(lambda sae: setattr(sae.dictionary, "W", transposed))),
        "expected": (CorruptError, change(lambda sae: setattr(sae.dictionary, "Relax", nn.Parameter(torch.ones(3))))),
        "not finite": (CorruptError, change(lambda sae: sae.dictionary.C.fill_(float("nan")))),
        "no tensor of shape": (CorruptError, change(lambda sae: sae.dictionary.register_buffer("C", torch.ones(0, D)))),
        "delta must be": (CorruptError, change(lambda sae: setattr(sae.dictionary, "delta", "far"))),
        "has no part encoder": (CorruptError, change(lambda sae: delattr(sae, "encoder"))),
    }  # fmt: skip
    for number, (reason, (kind, write)) in enumerate(cases.items()):
        write(tmp_path / str(number))
        with pytest.raises(kind, match=reason) as caught:
            convert(tmp_path / str(number), tmp_path / "run", store=planted_store)
        assert "\n" not in str(caught.value), reason
        assert not (tmp_path / "run").exists()
    publish(build(package), tmp_path / "two")
    torch.save(build(package), tmp_path / "two" / "other.pth")
    with pytest.raises(SettingsError, match="has several checkpoints"):
        convert(tmp_path / "two", tmp_path / "run", store=planted_store)


OVERCOMPLETE = """
import json, sys, numpy as np, torch
from overcomplete.sae import BatchTopKSAE, RelaxedArchetypalDictionary
x, out = torch.from_numpy(np.load(sys.argv[1])), sys.argv[2]
torch.manual_seed(0)
sae = BatchTopKSAE(32, 40, top_k=5 * len(x), encoder_module="mlp_ln_1", device="cpu")
sae.dictionary = RelaxedArchetypalDictionary(32, 40, torch.randn(50, 32), delta=0.5)
with torch.no_grad():
    for parameter in sae.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
torch.save(torch.nn.DataParallel(sae), out + "/ra.pth")
json.dump({"running_threshold": 0.4}, open(out + "/config.json", "w"))
sae.running_threshold = 0.4
sae.eval()
with torch.no_grad():
    _, codes, decoded = sae(x)
np.savez(out + "/y.npz", codes=codes, decoded=decoded)
"""


def test_overcomplete_itself_computes_the_same(tmp_path: Path, planted_store: Path) -> None:
    import numpy as np

    python = os.environ.get("PATCHSAE_PEERS_PYTHON")
    if not python or subprocess.run([python, "-c", "import overcomplete"], capture_output=True, check=False).returncode:
        pytest.skip("PATCHSAE_PEERS_PYTHON does not name a python with overcomplete")
    x = rows_of(planted_store)
    np.save(tmp_path / "x.npy", x.numpy())
    command = [python, "-c", OVERCOMPLETE, str(tmp_path / "x.npy"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    convert(tmp_path, tmp_path / "run", store=planted_store)
    codes, decoded = dense(Run.open(tmp_path / "run").sae(), x)
    with np.load(tmp_path / "y.npz") as theirs:
        np.testing.assert_allclose(codes.numpy(), theirs["codes"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(decoded.numpy(), theirs["decoded"], rtol=1e-4, atol=1e-4)
