"""saev and ViT-Prisma checkpoints, by the formulas of their packages; hostile ones are refused.

What all formats promise (there and back, damage, parity) is in test_conversion.py.
"""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from warm_process import WarmProcess

from actcache import ActivationStore, CorruptError, PipelineError, SettingsError
from saetrain import Run, convert
from saetrain.interop.files import load_tensors

D, F = 32, 40


def tensors_of(seed: int = 0, *, bias: float = 0.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(D, F, generator=g) / 4, "b_enc": torch.randn(F, generator=g) / 4 + bias,
        "W_dec": torch.randn(F, D, generator=g), "b_dec": torch.randn(D, generator=g),
    }  # fmt: skip


def rows_of(planted_store: Path) -> Tensor:
    values = ActivationStore.open(planted_store).read(images=range(8, 40))
    return torch.from_numpy(values.reshape(-1, values.shape[-1])).float()


def dense(run: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes in the units of the package that they came from, reconstruction)."""
    sae = Run.open(run).sae()
    rows, latents, values = sae.encode(x)
    codes = torch.zeros(len(x), sae.config.n_latents).index_put_((rows, latents), values)
    return codes if sae.norms is None else codes / sae.norms, sae.decode(rows, latents, values, len(x))


def saev_file(path: Path, header: object, tensors: object) -> Path:
    buffer = BytesIO()
    torch.save(tensors, buffer)
    path.write_bytes(json.dumps(header).encode() + b"\n" + buffer.getvalue())
    return path


def activation(name: str, **params: Any) -> dict[str, Any]:
    return {"cls": name, "params": params}


SAEV: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "0.1, relu": ({"d_vit": D, "exp_factor": 2, "sparsity_coeff": 4e-4, "seed": 1}, {}),
    "1a, relu": ({"schema": 1, "cls": "Relu", "cfg": {"d_vit": D}}, {}),
    "1a, topk": ({"schema": 1, "cls": "TopK", "cfg": {"d_vit": D, "top_k": 4}}, {}),
    "1b, relu by default": ({"schema": 1, "cfg": {"d_vit": D, "exp_factor": 2}}, {}),
    "1b, topk": ({"schema": 1, "cfg": {"activation": activation("TopK", top_k=4)}}, {}),
    "2, batchtopk without a threshold": ({"schema": 2, "cfg": {"activation": activation("BatchTopK", top_k=4)}}, {}),
    "5, relu": ({"schema": 5, "cfg": {"activation": activation("Relu", key="relu")}}, {}),
    "5, with all that its training writes": (
        {
            "schema": 5, "commit": "abc", "lib": "0.5.0",
            "cfg": {
                "d_model": D, "d_sae": F, "reinit_blend": 0.8, "reinit_enc_dec_tranpose": True,
                "remove_parallel_grads": True, "normalize_w_dec": True,
                "activation": activation(
                    "Relu", key="relu", sparsity=activation("L1Sparsity", key="l1-sparsity", coeff=4e-4),
                    aux=activation("NoAux", key="no-aux"),
                ),
            },
        },
        {},
    ),
    "5, batchtopk": (
        {"schema": 5, "cfg": {"activation": activation("BatchTopK", top_k=4, momentum=0.1)}},
        {"activation.threshold": torch.tensor(1.3)},
    ),
    "5, batchtopk, never trained": (
        {"schema": 5, "cfg": {"activation": activation("BatchTopK", top_k=4)}},
        {"activation.threshold": torch.tensor(0.0)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAEV)
def test_every_schema_of_saev_is_read(tmp_path: Path, planted_store: Path, name: str) -> None:
    header, more = SAEV[name]
    tensors, x = tensors_of(), rows_of(planted_store)
    file = saev_file(tmp_path / "sae.pt", header, tensors | more)
    made = convert(file, tmp_path / "run", store=planted_store, input_mean=0, input_scale=1)
    assert made.format == "saev"
    assert made.parity.rows == "activations"
    z = (x - tensors["b_dec"] if name.startswith("0.1") else x) @ tensors["W_enc"] + tensors["b_enc"]
    if more:
        wanted = torch.where(z > more["activation.threshold"], z, 0)
    elif "topk" in name:
        wanted = torch.where(z >= z.topk(4).values[:, -1:], z, 0)
        assert (wanted >= 0).all()  # else it would have been refused
    else:
        wanted = z.relu()
    codes, decoded = dense(tmp_path / "run", x)
    torch.testing.assert_close(codes, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(decoded, wanted @ tensors["W_dec"] + tensors["b_dec"], rtol=1e-3, atol=1e-3)


def test_negative_codes_of_saev_are_refused_and_counted(tmp_path: Path, planted_store: Path) -> None:
    tensors, x = tensors_of(bias=-8.0), rows_of(planted_store)
    z = x @ tensors["W_enc"] + tensors["b_enc"]
    assert ((z > 0).sum(1) < 20).any()  # so that the 20 largest are not all positive
    saev_file(tmp_path / "sae.pt", {"schema": 5, "cfg": {"activation": activation("TopK", top_k=20)}}, tensors)
    with pytest.raises(CorruptError, match=r"\d+ codes of the other package are negative"):
        convert(tmp_path, tmp_path / "run", store=planted_store)
    assert not (tmp_path / "run").exists()


class Malice:
    def __init__(self, what: Any, *arguments: Any) -> None:
        self.call = what, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_hostile_files_of_saev_are_refused(tmp_path: Path, planted_store: Path) -> None:
    tensors, header = tensors_of(), {"schema": 5, "cfg": {"activation": activation("TopK", top_k=4)}}
    witness, path = tmp_path / "witness", tmp_path / "sae.pt"

    def written(data: bytes) -> None:
        path.write_bytes(data)

    whole = saev_file(path, header, tensors).read_bytes()
    bomb = BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * (1 << 26))
    bad: dict[str, Callable[[], object]] = {
        "code": lambda: saev_file(path, header, tensors | {"b_enc": Malice(os.system, f"touch {witness}")}),
        "code alone": lambda: saev_file(path, header, Malice(eval, f"open({str(witness)!r}, 'w')")),
        "pickle": lambda: written(json.dumps(header).encode() + b"\n" + pickle.dumps(Malice(Path.touch, witness))),
        "bomb": lambda: written(json.dumps(header).encode() + b"\n" + bomb.getvalue()),
        "cut": lambda: written(whole[: len(whole) // 2]),
        "header only": lambda: written(whole[: whole.index(b"\n") + 1]),
        "endless header": lambda: written(b"{" + b" " * (1 << 21)),
        "deep header": lambda: written(b'{"a":' + b"[" * 100_000 + b"\n"),
        "header is a list": lambda: written(b"[]\n" + whole),
        "schema": lambda: saev_file(path, header | {"schema": 6}, tensors),
        "schema is text": lambda: saev_file(path, header | {"schema": "5"}, tensors),
        "no settings": lambda: saev_file(path, {"schema": 5}, tensors),
        "settings are text": lambda: saev_file(path, {"schema": 5, "cfg": {"activation": "TopK"}}, tensors),
        "activation": lambda: saev_file(path, {"schema": 5, "cfg": {"activation": activation("Gelu")}}, tensors),
        "k": lambda: saev_file(path, {"schema": 5, "cfg": {"activation": activation("TopK", top_k=41)}}, tensors),
        "no k": lambda: saev_file(path, {"schema": 5, "cfg": {"activation": activation("TopK")}}, tensors),
        "missing": lambda: saev_file(path, header, {"W_enc": tensors["W_enc"]}),
        "shape": lambda: saev_file(path, header, tensors | {"W_dec": tensors["W_dec"].T}),
        "nan": lambda: saev_file(path, header, tensors | {"b_dec": torch.full((D,), torch.nan)}),
    }  # fmt: skip
    for name, make in bad.items():
        make()
        with pytest.raises(PipelineError):
            convert(tmp_path, tmp_path / "run", store=planted_store)
        assert not (tmp_path / "run").exists(), name
    assert not witness.exists()


PROGRAMS = (b"K\x01Q", b"K\x01K\x02\x86Q", b"N\x85Q", b"h\x07", b"0", b"(", b"R", b"b", b"s")
"""Pickles that are wrong after their first opcodes: ids of tensors that are none, and opcodes on an empty stack."""


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_damaged_pickle_is_one_line(tmp_path: Path, program: bytes) -> None:
    """torch asserts, or raises whatever an opcode makes of its stack: an id of a tensor that is a number, for one."""
    path = tmp_path / "sae.pt"
    torch.save({"a": torch.zeros(3)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, b"\x80\x02" + program + b"." if name.endswith("data.pkl") else data)
    with pytest.raises(CorruptError) as told:
        load_tensors(path)
    assert "\n" not in str(told.value)


# ---------------------------------------------------------------------------------------------------------------------
# ViT-Prisma

PRISMA: dict[str, dict[str, Any]] = {
    "relu": {"architecture": "standard", "activation_fn_str": "relu"},
    "topk": {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
    "gated": {"architecture": "gated", "activation_fn_str": "relu", "activation_fn_kwargs": {}},
}


def prisma_tensors(name: str) -> dict[str, Tensor]:
    tensors = tensors_of()
    if name == "gated":
        tensors |= {"b_gate": tensors["b_enc"], "b_mag": torch.full((F,), 0.3), "r_mag": torch.linspace(-1, 1, F)}
    return tensors


@pytest.mark.parametrize("kind", ["one file", "beside", "both"])
@pytest.mark.parametrize("name", PRISMA)
def test_prisma_checkpoints_are_read(tmp_path: Path, planted_store: Path, name: str, kind: str) -> None:
    config, tensors = PRISMA[name] | {"normalize_activations": "none"}, prisma_tensors(name)
    nested = {"cfg": config, "state_dict": tensors}
    path = tmp_path / ("n_images_100.pt" if kind == "one file" else "weights.pt")
    torch.save(tensors if kind == "beside" else nested, path)
    if kind != "one file":
        (tmp_path / "config.json").write_text(json.dumps(config))
    made = convert(tmp_path if kind == "both" else path, tmp_path / "run", store=planted_store)
    assert made.format == "prisma"
    x = rows_of(planted_store)
    product = (x - tensors["b_dec"]) @ tensors["W_enc"]
    if name == "gated":
        wanted = (product + tensors["b_gate"] > 0) * (product * tensors["r_mag"].exp() + 0.3).relu()
    else:
        z = product + tensors["b_enc"]
        wanted = (z * (z >= z.topk(4).values[:, -1:]) if name == "topk" else z).relu()
    codes, decoded = dense(tmp_path / "run", x)
    torch.testing.assert_close(codes, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(decoded, wanted @ tensors["W_dec"] + tensors["b_dec"], rtol=1e-3, atol=1e-3)


def test_what_prisma_can_and_ours_cannot_is_refused(tmp_path: Path, planted_store: Path) -> None:
    plain = PRISMA["relu"] | {"normalize_activations": "none"}
    for bad in (
        plain | {"normalize_activations": "batch_norm"}, plain | {"normalize_activations": False},
        plain | {"architecture": "jumprelu"},
        plain | {"activation_fn_str": "tanh-relu"}, plain | {"is_transcoder": True},
        PRISMA["gated"] | {"activation_fn_str": "topk", "normalize_activations": "none"},
    ):  # fmt: skip
        torch.save({"cfg": bad, "state_dict": tensors_of()}, tmp_path / "x.pt")
        with pytest.raises(SettingsError):
            convert(tmp_path / "x.pt", tmp_path / "run", store=planted_store)
    for wrong in (
        plain | {"activation_fn_str": "topk"},
        plain | {"activation_fn_str": "topk", "activation_fn_kwargs": 3},
    ):
        torch.save({"cfg": wrong, "state_dict": tensors_of()}, tmp_path / "x.pt")
        with pytest.raises(CorruptError, match="k must be"):
            convert(tmp_path / "x.pt", tmp_path / "run", store=planted_store)
    torch.save(tensors_of(), tmp_path / "weights.pt")
    with pytest.raises(CorruptError, match=r"config\.json"):
        convert(tmp_path, tmp_path / "run", store=planted_store)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptError, match=r"config\.json"):
        convert(tmp_path, tmp_path / "run", store=planted_store)
    assert not (tmp_path / "run").exists()


def test_the_command_line_writes_for_saev(
    tmp_path: Path, planted_run: Run, planted_store: Path, warm: WarmProcess
) -> None:
    words = ("--json", "convert", planted_run.path, tmp_path / "out", "--to", "saev", "--store", planted_store)
    done = warm.run("cli.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parity"]["rows"] == "activations"
    header = json.loads((tmp_path / "out" / "sae.pt").read_bytes().split(b"\n", 1)[0])
    assert header["schema"] == 5
    assert header["cfg"]["activation"]["params"]["top_k"] == 3
