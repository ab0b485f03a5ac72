"""No field and no tensor of a foreign checkpoint is passed over: it is used, known not to matter, or refused by name.

The values that are expected here are computed in this file, from the tensors, by the formulas of the packages' papers
and documentation.
"""

import json
import math
from pathlib import Path
from typing import Any

import foreign_files
import pytest
import torch
from foreign_files import CHECKPOINTS, D, F, K, plain_tensors, saelens_5, saelens_6, write
from torch import Tensor

from actcache import ActivationStore, PipelineError
from saetrain import Run, convert
from saetrain.interop.conversion import PARITY_FILE
from saetrain.interop.formats import FORMATS


@pytest.fixture(scope="module")
def rows(planted_store: Path) -> Tensor:
    values = ActivationStore.open(planted_store).read(images=range(8, 40))
    return torch.from_numpy(values.reshape(-1, values.shape[-1])).float()


def decode(run: Path, x: Tensor) -> Tensor:
    sae = Run.open(run).sae()
    return sae.decode(*sae.encode(x), len(x), like=x)


def refused(path: Path, out: Path, store: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        convert(path, out, store=store)
    assert not out.exists()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Older versions of SAELens


def top(z: Tensor, k: int) -> Tensor:
    return torch.where(z >= z.topk(k).values[:, -1:], z, 0).relu()


OLD: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "topk by its activation": ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}, {}),
    "topk, no architecture": (
        {"architecture": None, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}}, {},
    ),
    "topk, first name of the field": ({"activation_fn_str": None, "activation_fn": "topk", "k": 6}, {}),
    "topk by its architecture": (
        {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}, {},
    ),
    "no architecture": ({"architecture": None}, {}),
    "neither": ({"architecture": None, "activation_fn_str": None, "activation_fn_kwargs": None}, {}),
    "finetuned": ({"finetuning_scaling_factor": True}, {"scaling_factor": torch.linspace(0.2, 3, F)}),
    "finetuned, later name": (
        {"finetuning_scaling_factor": True}, {"finetuning_scaling_factor": torch.linspace(2, 0.5, F)},
    ),
    "finetuned topk": (
        {"finetuning_scaling_factor": True, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
        {"scaling_factor": torch.linspace(0.2, 3, F)},
    ),
    "a factor that does nothing": ({}, {"scaling_factor": torch.ones(F)}),
    "not normalized, as a truth value": ({"normalize_activations": False}, {}),
    "not normalized, as null": ({"normalize_activations": None}, {}),
    "not centered": ({"apply_b_dec_to_input": False}, {}),
    "settings of the training": ({"l1_coefficient": 5, "lr": 1e-4, "noise_scale": 0.1, "use_ghost_grads": False}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_saelens_before_6_computes_what_its_package_does(
    tmp_path: Path, planted_store: Path, rows: Tensor, name: str
) -> None:
    changes, more = OLD[name]
    config = saelens_5(**changes)
    config = {key: value for key, value in config.items() if value is not None or key == "normalize_activations"}
    tensors = plain_tensors()
    foreign_files.write_saelens(tmp_path / "in", config, tensors | more)
    made = convert(tmp_path / "in", tmp_path / "run", store=planted_store)
    z = (rows - tensors["b_dec"] * config["apply_b_dec_to_input"]) @ tensors["W_enc"] + tensors["b_enc"]
    k = (config.get("activation_fn_kwargs") or config).get("k")
    codes = top(z, k) if k else z.relu()
    wanted = codes * more.get("scaling_factor", more.get("finetuning_scaling_factor", torch.ones(F)))
    wanted = wanted @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(decode(tmp_path / "run", rows), wanted, rtol=1e-3, atol=1e-3)
    assert made.parity.max_reconstruction_difference < 1e-4


@pytest.mark.parametrize("value", [True, "expected_average_only_in"])
def test_the_factor_of_the_input_comes_from_the_file_beside_or_is_asked_for(
    tmp_path: Path, planted_store: Path, rows: Tensor, value: object
) -> None:
    tensors, c = plain_tensors(), 0.37
    foreign_files.write_saelens(tmp_path / "in", saelens_5(normalize_activations=value), tensors)
    assert "activation_scaler.json" in refused(tmp_path / "in", tmp_path / "run", planted_store)
    (tmp_path / "in" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": c}))
    convert(tmp_path / "in", tmp_path / "run", store=planted_store)
    codes = ((rows * c - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    wanted = (codes @ tensors["W_dec"] + tensors["b_dec"]) / c
    torch.testing.assert_close(decode(tmp_path / "run", rows), wanted, rtol=1e-3, atol=1e-3)


def test_whitening_is_folded_from_the_file_beside(tmp_path: Path, planted_store: Path, rows: Tensor) -> None:
    tensors, values = plain_tensors(), rows.double()
    covariance = torch.cov(values.T) + 1e-3 * torch.eye(D, dtype=torch.float64)
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    whitening = {
        "mean": values.mean(0), "matrix": vectors * eigenvalues.rsqrt(),
        "inverse_matrix": eigenvalues.sqrt()[:, None] * vectors.T,
    }  # fmt: skip
    config = saelens_6("topk", k=K, normalize_activations="covariance_whitening")
    foreign_files.write_saelens(tmp_path / "in", config, tensors)
    assert "activation_whitening.safetensors" in refused(tmp_path / "in", tmp_path / "run", planted_store)
    file = tmp_path / "in" / "activation_whitening.safetensors"
    foreign_files.write_safetensors(file, whitening | {"matrix": whitening["matrix"].T})
    assert "not the inverse" in refused(tmp_path / "in", tmp_path / "run", planted_store)
    foreign_files.write_safetensors(file, whitening | {"mean": torch.full((D,), torch.nan)})
    assert "not finite" in refused(tmp_path / "in", tmp_path / "run", planted_store)

    foreign_files.write_safetensors(file, whitening)
    made = convert(tmp_path / "in", tmp_path / "run", store=planted_store)
    w = {name: value.double() for name, value in tensors.items()}
    codes = top(((values - whitening["mean"]) @ whitening["matrix"] - w["b_dec"]) @ w["W_enc"] + w["b_enc"], K)
    wanted = (codes @ w["W_dec"] + w["b_dec"]) @ whitening["inverse_matrix"] + whitening["mean"]
    torch.testing.assert_close(decode(tmp_path / "run", rows), wanted.float(), rtol=1e-3, atol=1e-3)
    assert made.parity.max_reconstruction_difference < 1e-4


REFUSED: dict[str, dict[str, Any]] = {
    "batch_norm": saelens_5(normalize_activations="batch_norm"),
    "covariance_whitening": saelens_6("standard", normalize_activations="covariance_whitening"),
    "a number": saelens_5(normalize_activations=2),
    "tanh-relu": saelens_5(activation_fn_str="tanh-relu"),
    "gated topk": saelens_5(architecture="gated", activation_fn_str="topk", activation_fn_kwargs={"k": 4}),
    "one head": saelens_5(hook_head_index=3),
    "heads": saelens_5(hook_name="blocks.1.attn.hook_z"),
    "heads in 6": saelens_6("standard", reshape_activations="hook_z"),
    "two activations": saelens_5(activation_fn="topk", activation_fn_kwargs={"k": 4}),
    "two ks": saelens_5(activation_fn_str="topk", activation_fn_kwargs={"k": 4}, k=5),
    "argument": saelens_5(activation_fn_kwargs={"power": 2}),
    "finetuned without a factor": saelens_5(finetuning_scaling_factor=True),
    "a later version": saelens_6("standard") | {"metadata": {"sae_lens_version": "7.0.0"}},
    "transcoder": saelens_6("transcoder"),
    "other sizes": saelens_6("standard", d_sae=F + 1),
    "not a flag": saelens_6("standard", apply_b_dec_to_input="no"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_sae_here_can_compute_is_refused(tmp_path: Path, planted_store: Path, name: str) -> None:
    foreign_files.write_saelens(tmp_path / "in", REFUSED[name], plain_tensors())
    refused(tmp_path / "in", tmp_path / "run", planted_store)


# ---------------------------------------------------------------------------------------------------------------------
# Every format


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_checkpoints_that_the_tests_vary_are_read(tmp_path: Path, planted_store: Path, name: str) -> None:
    made = convert(write(name, tmp_path / "in"), tmp_path / "run", store=planted_store)
    assert made.format == name.split()[0]
    assert made.parity.max_reconstruction_difference < 1e-4


@pytest.mark.parametrize("field", ["output_gain", "post_scale\x1b[2J\n"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_field_that_is_not_known_is_named(tmp_path: Path, planted_store: Path, name: str, field: str) -> None:
    config = CHECKPOINTS[name][1]() | {field: 2.0}
    message = refused(write(name, tmp_path / "in", config), tmp_path / "run", planted_store)
    assert field.split("\x1b")[0] in message
    assert "\x1b" not in message


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_tensor_that_is_not_known_is_named(tmp_path: Path, planted_store: Path, name: str) -> None:
    tensors = CHECKPOINTS[name][2]() | {"output_gain": torch.full((F,), 2.0)}
    assert "output_gain" in refused(write(name, tmp_path / "in", tensors=tensors), tmp_path / "run", planted_store)


HOSTILE = [math.nan, math.inf, -1, 0, 0.5, 10**400, 1e300, True, None, "5", [5], {"k": 5}, K + 100]


def place_of_k(config: dict[str, Any]) -> tuple[str, ...] | None:
    if config.get("activation_fn_kwargs"):
        return "activation_fn_kwargs", "k"
    if isinstance(activation := config.get("activation"), dict) and "top_k" in activation["params"]:
        return "activation", "params", "top_k"
    return ("k",) if "k" in config else None


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if place_of_k(CHECKPOINTS[name][1]())])
def test_a_hostile_k_is_one_line(tmp_path: Path, planted_store: Path, name: str, value: object) -> None:
    config = CHECKPOINTS[name][1]()
    place = place_of_k(config)
    assert place is not None
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    refused(write(name, tmp_path / "in", config), tmp_path / "run", planted_store)


@pytest.mark.parametrize("value", [math.nan, 3e38])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_numbers_that_overflow_are_refused(tmp_path: Path, planted_store: Path, name: str, value: float) -> None:
    for tensor in CHECKPOINTS[name][2]():
        tensors = {key: each.clone() for key, each in CHECKPOINTS[name][2]().items()}
        if not tensors[tensor].is_floating_point() or (
            tensor == "threshold" and "TopK" in name and "Batch" not in name
        ):
            continue  # the package itself does not use that one
        if not tensors[tensor].dim():
            tensors[tensor] = torch.tensor(value)
        else:
            tensors[tensor][..., 3] = value
        refused(write(name, tmp_path / tensor, tensors=tensors), tmp_path / "run", planted_store)


# ---------------------------------------------------------------------------------------------------------------------
# The parity report


CHANGES: dict[str, list[tuple[str, ...]]] = {
    "saelens 6 standard": [("apply_b_dec_to_input",)],
    "saelens 6 topk": [("apply_b_dec_to_input",), ("k",)],
    "saelens 6 topk rescaled": [("rescale_acts_by_decoder_norm",)],
    "saelens 6 batchtopk in training": [("rescale_acts_by_decoder_norm",)],
    "saelens 5 topk": [("activation_fn_kwargs", "k"), ("apply_b_dec_to_input",)],
    "saelens 5 gated": [("apply_b_dec_to_input",)],
    "dictionary_learning TopK without k": [("k",)],
    "sparsify": [("k",)],
    "overcomplete topk": [("k",)],
    "overcomplete batchtopk": [("threshold",)],
    "saev topk": [("activation", "params", "top_k")],
    "prisma topk": [("activation_fn_kwargs", "k")],
    "lasgroup": [("k",), ("normalize_decoder",)],
}
"""Fields whose value decides what is computed, each with a checkpoint that is still valid when it has another one."""


@pytest.mark.parametrize(("name", "place"), [(name, place) for name in CHANGES for place in CHANGES[name]])
def test_both_sides_of_a_parity_report_follow_each_field(
    tmp_path: Path, planted_store: Path, rows: Tensor, name: str, place: tuple[str, ...]
) -> None:
    """A reader that overlooked the field would give the old SAE; formulas that did would give the old values."""
    from saetrain.interop.formats import read_foreign
    from saetrain.interop.parity import compare

    config = CHECKPOINTS[name][1]()
    before = read_foreign(write(name, tmp_path / "before", config))
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    value = inner[place[-1]]
    inner[place[-1]] = not value if isinstance(value, bool) else value + 2
    after = read_foreign(write(name, tmp_path / "after", config))
    assert compare(after.sae, after.forward, rows, "activations").holds
    for sae, forward in ((before.sae, after.forward), (after.sae, before.forward)):
        with pytest.raises(PipelineError, match="disagree"):
            compare(sae, forward, rows, "activations")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_both_sides_of_a_parity_report_follow_each_tensor(
    tmp_path: Path, rows: Tensor, planted_store: Path, name: str
) -> None:
    from saetrain.interop.formats import read_foreign
    from saetrain.interop.parity import compare

    before = read_foreign(write(name, tmp_path / "before"))
    for tensor, value in CHECKPOINTS[name][2]().items():
        unused = name == "dictionary_learning TopK" and tensor == "threshold"
        if tensor in ("k", "group_sizes") or unused:
            continue
        changed = value * 1.5 if value.any() else value + 1
        if tensor == "dictionary._weights" or (name, tensor) == ("lasgroup", "W_dec"):  # only its directions count
            changed = value.roll(1, 1)
        tensors = CHECKPOINTS[name][2]() | {tensor: changed}
        after = read_foreign(write(name, tmp_path / tensor, tensors=tensors))
        assert compare(after.sae, after.forward, rows, "activations").holds
        for sae, forward in ((before.sae, after.forward), (after.sae, before.forward)):
            with pytest.raises(PipelineError, match="disagree"):
                compare(sae, forward, rows, "activations")


# ---------------------------------------------------------------------------------------------------------------------
# Unit rows


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_imported_dictionary_has_unit_rows_and_goes_back_as_it_came(
    tmp_path: Path, planted_store: Path, rows: Tensor, name: str
) -> None:
    from saetrain.interop.formats import read_foreign

    source = write(name, tmp_path / "in")
    constants = {"input_mean": 0, "input_scale": 1} if read_foreign(source).lacks_constants else {}
    convert(source, tmp_path / "run", store=planted_store, **constants)
    sae = Run.open(tmp_path / "run").sae()
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(F))
    codes, decoded = read_foreign(source).forward(rows)
    torch.testing.assert_close(decode(tmp_path / "run", rows), decoded, rtol=1e-3, atol=1e-3)
    _, latents, values = sae.encode(rows)  # a code is the length of what it adds, in the SAE's own units
    some = torch.arange(len(values))[:: 1 + len(values) // 50]
    like = rows[: len(some)]
    nothing = sae.decode(some[:0], some[:0], values[:0], len(some), like=like)
    added = sae.decode(torch.arange(len(some)), latents[some], values[some], len(some), like=like) - nothing
    torch.testing.assert_close((added * sae.units(like)).norm(dim=1), values[some], rtol=1e-3, atol=1e-3)

    format_name = name.split()[0] if FORMATS[name.split()[0]].write else "saelens"
    convert(tmp_path / "run", tmp_path / "out", to=format_name, store=planted_store)
    assert (tmp_path / "out" / PARITY_FILE).is_file()
    again, restored = read_foreign(tmp_path / "out").forward(rows)
    torch.testing.assert_close(restored, decoded, rtol=1e-3, atol=1e-3)
    if "rescaled" not in name and "training" not in name:  # the others' norms were folded into the encoder
        torch.testing.assert_close(again, codes, rtol=1e-3, atol=1e-3)


def test_a_row_of_zeros_stays_and_unit_rows_change_nothing(tmp_path: Path, planted_store: Path, rows: Tensor) -> None:
    tensors = plain_tensors(unit=True)
    convert(write("saelens 6 standard", tmp_path / "unit", tensors=tensors), tmp_path / "a", store=planted_store)
    sae = Run.open(tmp_path / "a").sae()
    assert sae.norms is None
    assert float(sae.scale) == 1
    assert torch.equal(sae.encoder, tensors["W_enc"].T)
    tensors["W_dec"][7] = 0
    convert(write("saelens 6 standard", tmp_path / "zero", tensors=tensors), tmp_path / "b", store=planted_store)
    sae = Run.open(tmp_path / "b").sae()
    assert not sae.decoder[7].any()
    wanted = ((rows - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu() @ tensors["W_dec"]
    torch.testing.assert_close(decode(tmp_path / "b", rows), wanted + tensors["b_dec"], rtol=1e-3, atol=1e-3)
    assert rows.shape[1] == D
