"""convert(): checkpoints of other packages compute the same as ours, both ways, and hostile ones are refused.

What the packages themselves compute is compared in test_real_packages.py.
"""

import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from warm_process import WarmProcess

from actcache import ActivationStore, CorruptError, PipelineError, SettingsError, verify
from saetrain import SAE, Run, SAEConfig, TrainConfig, convert, encode, train
from saetrain.interop.conversion import PARITY_FILE
from saetrain.interop.foreign import fold

SAES = {
    "topk": SAEConfig("topk", 48, 3),
    "batchtopk": SAEConfig("batchtopk", 48, 3),
    "relu": SAEConfig("relu", 48, l1=0.002),
    "jumprelu": SAEConfig("jumprelu", 48, 3),
    "gated": SAEConfig("gated", 48, 3),
}
HOLDS = {
    "saelens": set(SAES), "dictionary_learning": set(SAES), "sparsify": {"topk"}, "patchsae": {"relu"},
    "saev": {"relu", "topk", "batchtopk"}, "prisma": {"relu", "topk", "gated"},
}  # fmt: skip
PAIRS = [(to, variant) for to, variants in HOLDS.items() for variant in sorted(variants)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, planted_store: Path) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    config = TrainConfig(n_steps=60, batch_size=256, lr=3e-3, pool_tokens=2000, precision="float32")
    return {name: train(planted_store, folder / name, sae=sae, config=config) for name, sae in SAES.items()}


def dense(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes in the units of the package that they came from, reconstruction)."""
    rows, latents, values = sae.encode(x)
    codes = torch.zeros(len(x), sae.config.n_latents).index_put_((rows, latents), values)
    return codes if sae.norms is None else codes / sae.norms, sae.decode(rows, latents, values, len(x), like=x)


def planted_rows(planted_store: Path) -> Tensor:
    values = ActivationStore.open(planted_store).read(images=range(8, 40))
    return torch.from_numpy(values.reshape(-1, values.shape[-1])).float()


@pytest.mark.parametrize("variant", SAES)
def test_folding_the_normalization_changes_nothing(
    random_sae: Callable[..., SAE], runs: dict[str, Run], planted_store: Path, variant: str
) -> None:
    sae, x = runs[variant].sae(), planted_rows(planted_store)
    folded = fold(sae)
    plain = SAE(sae.config, sae.d_model).requires_grad_(False)
    plain.load_state_dict({**plain.state_dict(), **folded})
    for ours, theirs in zip(dense(sae, x), dense(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("to", "variant"), PAIRS)
def test_there_and_back_it_is_the_same_function(
    tmp_path: Path, runs: dict[str, Run], planted_store: Path, to: str, variant: str
) -> None:
    made = convert(runs[variant].path, tmp_path / "out", to=to, store=planted_store)
    assert made.format == to
    assert made.parity.rows == "activations"
    assert made.parity.holds
    assert made.parity.fvu_ours == pytest.approx(made.parity.fvu_foreign, rel=1e-3)
    report = json.loads((tmp_path / "out" / PARITY_FILE).read_bytes())
    assert report["parity"]["n_rows"] == made.parity.n_rows > 1000
    again = convert(runs[variant].path, tmp_path / "out", to=to)  # the same command is safe
    assert again == made

    back = convert(tmp_path / "out", tmp_path / "back", store=planted_store)
    assert back.format == to
    run, x = Run.open(tmp_path / "back"), planted_rows(planted_store)
    for ours, theirs in zip(dense(runs[variant].sae(), x), dense(run.sae(), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert run.fvu == pytest.approx(runs[variant].fvu, rel=1e-2)
    assert verify(run.path).ok
    assert convert(tmp_path / "out", tmp_path / "back", store=planted_store).path == run.path
    assert encode(run, planted_store, tmp_path / "codes").n_entries > 0


@pytest.mark.parametrize(("to", "variant"), [(to, v) for to in HOLDS for v in SAES if v not in HOLDS[to]])
def test_what_a_format_cannot_hold_is_refused(tmp_path: Path, runs: dict[str, Run], to: str, variant: str) -> None:
    with pytest.raises(SettingsError, match=f"{to} cannot hold a {variant} SAE"):
        convert(runs[variant].path, tmp_path / "out", to=to)
    assert not list(tmp_path.iterdir())


def test_without_a_store_rows_are_random_and_said_to_be(tmp_path: Path, runs: dict[str, Run]) -> None:
    assert convert(runs["topk"].path, tmp_path / "out").parity.rows == "random"


def test_what_is_there_is_not_overwritten_unasked(tmp_path: Path, runs: dict[str, Run]) -> None:
    convert(runs["topk"].path, tmp_path / "out")
    with pytest.raises(SettingsError, match="--overwrite"):
        convert(runs["relu"].path, tmp_path / "out")
    assert convert(runs["relu"].path, tmp_path / "out", overwrite=True).parity.holds
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("photos", "file"):
        with pytest.raises(SettingsError, match="not an exported SAE"):
            convert(runs["topk"].path, tmp_path / name, overwrite=True)
    assert (tmp_path / "photos" / "mine").exists()


# ---------------------------------------------------------------------------------------------------------------------
# SAELens' training checkpoints and options, by the formulas of its documentation


def foreign_tensors(d: int = 32, f: int = 40, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(d, f, generator=g) / 4, "b_enc": torch.randn(f, generator=g) / 4,
        "W_dec": torch.randn(f, d, generator=g), "b_dec": torch.randn(d, generator=g),
    }  # fmt: skip


def saelens_folder(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps({"d_in": 32, "d_sae": 40, **config}))
    return path


CASES: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "topk, rescaled": ({"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True}, {}),
    "topk, not centered": ({"architecture": "topk", "k": 5, "apply_b_dec_to_input": False}, {}),
    "batchtopk, rescaled": (
        {"architecture": "batchtopk", "k": 5.0, "rescale_acts_by_decoder_norm": True},
        {"topk_threshold": torch.tensor(2.0, dtype=torch.float64)},
    ),
    "matryoshka": (
        {"architecture": "matryoshka_batchtopk", "k": 5, "matryoshka_widths": [10, 40]},
        {"topk_threshold": torch.tensor(0.7)},
    ),
    "jumprelu, log threshold": ({"architecture": "jumprelu"}, {"log_threshold": torch.linspace(-2, 1, 40)}),
    "standard, not centered": ({"architecture": "standard", "apply_b_dec_to_input": False}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_saelens_options_are_read_as_they_are_meant(tmp_path: Path, planted_store: Path, name: str) -> None:
    config, more = CASES[name]
    tensors, x = foreign_tensors(), planted_rows(planted_store)
    path = saelens_folder(tmp_path / "in", tensors | more, **config)
    convert(path, tmp_path / "run", store=planted_store)
    codes, decoded = dense(Run.open(tmp_path / "run").sae(), x)

    z = (x - tensors["b_dec"] * config.get("apply_b_dec_to_input", True)) @ tensors["W_enc"] + tensors["b_enc"]
    norm = tensors["W_dec"].norm(dim=1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(40)
    z = z * norm
    if config["architecture"] == "topk":
        wanted = (z * (z >= z.topk(5).values[:, -1:])).relu()
    else:
        threshold = more.get("topk_threshold", more.get("log_threshold", torch.tensor(-torch.inf)))
        threshold = threshold.exp() if "log_threshold" in more else threshold
        wanted = z.relu() * (z > threshold)
    torch.testing.assert_close(codes, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(decoded, (wanted / norm) @ tensors["W_dec"] + tensors["b_dec"], rtol=1e-3, atol=1e-3)


def test_gated_without_centering(tmp_path: Path, planted_store: Path) -> None:
    tensors, x = foreign_tensors(), planted_rows(planted_store)
    tensors["b_gate"] = tensors.pop("b_enc")
    tensors |= {"b_mag": torch.full((40,), 0.3), "r_mag": torch.linspace(-1, 1, 40)}
    path = saelens_folder(tmp_path / "in", tensors, architecture="gated", apply_b_dec_to_input=False)
    convert(path, tmp_path / "run", store=planted_store)
    open_ = x @ tensors["W_enc"] + tensors["b_gate"] > 0
    wanted = open_ * (x @ tensors["W_enc"] * tensors["r_mag"].exp() + tensors["b_mag"]).relu()
    codes, _ = dense(Run.open(tmp_path / "run").sae(), x)
    torch.testing.assert_close(codes, wanted, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Pickles and other hostile files


class ViTSAERunnerConfig:
    """An object of a class that is missing here, as in a file of PatchSAE."""


def patchsae_file(path: Path, config: object, **tensors: Tensor) -> Path:
    torch.save({"cfg": config, "state_dict": foreign_tensors() | tensors}, path)
    return path


def test_a_pickled_config_of_patchsae_is_read(
    tmp_path: Path, planted_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ViTSAERunnerConfig()
    config.d_in, config.dtype, config.device = 32, torch.float32, torch.device("cpu")  # type: ignore[attr-defined]
    module = type(sys)("src.sae_training.config")
    module.ViTSAERunnerConfig = ViTSAERunnerConfig  # type: ignore[attr-defined]
    monkeypatch.setattr(ViTSAERunnerConfig, "__module__", "src.sae_training.config")
    for name in ("src", "src.sae_training", "src.sae_training.config"):
        monkeypatch.setitem(sys.modules, name, module)
    path = patchsae_file(tmp_path / "out.pt", config)
    monkeypatch.undo()
    with zipfile.ZipFile(path) as archive:
        assert b"src.sae_training.config" in archive.read("out/data.pkl")
    assert convert(path, tmp_path / "run", store=planted_store).format == "patchsae"
    tensors, x = foreign_tensors(), planted_rows(planted_store)
    codes, _ = dense(Run.open(tmp_path / "run").sae(), x)
    wanted = ((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    torch.testing.assert_close(codes, wanted, rtol=1e-3, atol=1e-3)


class Malice:
    def __init__(self, what: Any, *arguments: Any) -> None:
        self.call = what, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_code_in_a_pickle_is_never_run(tmp_path: Path, planted_store: Path) -> None:
    witness = tmp_path / "witness"
    for number, bad in enumerate(
        (Malice(os.system, f"touch {witness}"), Malice(eval, f"open({str(witness)!r}, 'w')"),
         Malice(Path.touch, witness), Malice(pickle.loads, b"cos\nsystem\n(S'true'\ntR."))
    ):  # fmt: skip
        for config in (bad, {"d_in": bad}):
            path = patchsae_file(tmp_path / f"{number}.pt", config)
            with pytest.raises(CorruptError, match="could not be read as tensors"):
                convert(path, tmp_path / "run", store=planted_store)
    assert not witness.exists()
    assert not (tmp_path / "run").exists()


def test_damaged_and_lying_checkpoints_are_refused(tmp_path: Path, planted_store: Path) -> None:
    tensors = foreign_tensors()
    bad: dict[str, Callable[[Path], object]] = {
        "missing": lambda p: saelens_folder(p, {n: tensors[n] for n in ("W_enc", "b_dec")}, architecture="standard"),
        "shape": lambda p: saelens_folder(p, tensors | {"b_enc": torch.zeros(7)}, architecture="standard"),
        "nan": lambda p: saelens_folder(p, tensors | {"b_enc": torch.full((40,), torch.nan)}, architecture="standard"),
        "integers": lambda p: saelens_folder(p, {n: t.int() for n, t in tensors.items()}, architecture="standard"),
        "k": lambda p: saelens_folder(p, tensors, architecture="topk", k=10**12),
        "no k": lambda p: saelens_folder(p, tensors, architecture="topk"),
        "architecture": lambda p: saelens_folder(p, tensors, architecture="temporal"),
        "normalized": lambda p: saelens_folder(p, tensors, architecture="standard", normalize_activations="batch_norm"),
        "width": lambda p: saelens_folder(p, foreign_tensors(d=16), architecture="standard"),
        "json": lambda p: (saelens_folder(p, tensors) / "cfg.json").write_text("[" * 100_000),
        "weights": lambda p: (saelens_folder(p, tensors, architecture="standard") / "sae_weights.safetensors")
        .write_bytes(b"\xff" * 100),
        "empty": lambda p: p.mkdir(),
        "text": lambda p: p.write_text("hello"),
        "no tensors": lambda p: torch.save([1, 2], p),
    }  # fmt: skip
    for name, make in bad.items():
        make(tmp_path / name)
        with pytest.raises(PipelineError):
            convert(tmp_path / name, tmp_path / "run", store=planted_store)
        assert not (tmp_path / "run").exists(), name
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * (1 << 26))
    with pytest.raises(CorruptError, match="unpack to"):
        convert(bomb, tmp_path / "run", store=planted_store)


@pytest.mark.parametrize("size", [0, 100, 2000])
def test_a_cut_file_is_refused(tmp_path: Path, planted_store: Path, size: int) -> None:
    path = patchsae_file(tmp_path / "x.pt", {})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorruptError):
        convert(path, tmp_path / "run", store=planted_store)


def test_a_checkpoint_needs_activations(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--store"):
        convert(patchsae_file(tmp_path / "x.pt", {}), tmp_path / "run")
    with pytest.raises(SettingsError, match="does not exist"):
        convert(tmp_path / "nothing", tmp_path / "run")


def test_the_command_line_says_how_well_they_agree(
    tmp_path: Path, runs: dict[str, Run], planted_store: Path, warm: WarmProcess
) -> None:
    words = ("--json", "convert", runs["gated"].path, tmp_path / "out", "--store", planted_store)
    done = warm.run("cli.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["format"] == "saelens"
    assert facts["parity"]["max_reconstruction_difference"] < 1e-4
    shutil.rmtree(tmp_path / "out")
