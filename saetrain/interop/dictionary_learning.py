"""dictionary_learning: a folder with config.json and ae.pt, a plain state dict (read without running its pickle).

AutoEncoder: bias, encoder.{weight [F, D], bias}, decoder.weight [D, F]. AutoEncoderNew: encoder and decoder with a bias
each, and no centering. AutoEncoderTopK and BatchTopKSAE have b_dec, k, threshold. MatryoshkaBatchTopKSAE: W_enc [D, F],
b_enc, W_dec [F, D], b_dec, k, threshold, group_sizes. JumpReluAutoEncoder: W_enc, b_enc, W_dec, b_dec, threshold [F],
without b_dec before the encoder. GatedAutoEncoder: decoder_bias, encoder.weight, r_mag, gate_bias, mag_bias,
decoder.weight.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from actcache import CorruptError, HookPoint, SettingsError
from saetrain.config import VARIANTS
from saetrain.interop.fields import Fields, check_fields, check_sizes, check_tensors, names, shorten
from saetrain.interop.files import load_tensors, read_config, read_k, take, torch_bytes
from saetrain.interop.foreign import PLAIN, Names, build_sae, fold, give_weights, take_weights
from saetrain.model import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
_LINEAR = {"encoder": "encoder.weight", "decoder": "decoder.weight"}
_TOP_K = {**_LINEAR, "b_dec": "b_dec", "b_enc": "encoder.bias"}
CLASSES: dict[str, tuple[str, Names, frozenset[str]]] = {
    "AutoEncoder": ("relu", {**_LINEAR, "b_dec": "bias", "b_enc": "encoder.bias"}, frozenset()),
    "AutoEncoderNew": ("relu", {**_LINEAR, "b_dec": "decoder.bias", "b_enc": "encoder.bias"}, frozenset()),
    "AutoEncoderTopK": ("topk", _TOP_K, names("k threshold")),
    "BatchTopKSAE": ("batchtopk", _TOP_K, names("k threshold")),
    "JumpReluAutoEncoder": ("jumprelu", PLAIN, names("threshold")),
    "GatedAutoEncoder": (
        "gated", {**_LINEAR, "b_dec": "decoder_bias", "b_enc": "gate_bias", "b_mag": "mag_bias", "log_scale": "r_mag"},
        frozenset(),
    ),
    "MatryoshkaBatchTopKSAE": ("batchtopk", PLAIN, names("k threshold group_sizes")),
    "MatroyshkaBatchTopKSAE": ("batchtopk", PLAIN, names("k threshold group_sizes")),  # a fork spells it so
}  # fmt: skip
"""dict_class -> variant, names of its weights, its other tensors. A variant is written as its first class."""
UNCENTERED = ("JumpReluAutoEncoder", "AutoEncoderNew")
"""These do not subtract b_dec before the encoder."""
TOP = Fields("dictionary_learning", used=names("trainer"), neutral=names("buffer run norm_factor"))
"""`norm_factor` scaled the activations in training, and the package folds it into the biases when it saves."""
TRAINER = Fields(
    "dictionary_learning",
    used=names("dict_class activation_dim dict_size k group_sizes"),
    neutral=names(
        "trainer_class lr steps auxk_alpha warmup_steps decay_start threshold_beta threshold_start_step seed device "
        "layer lm_name wandb_name submodule_name top_k_aux group_fractions group_weights bandwidth sparsity_penalty "
        "sparsity_warmup_steps target_l0 l1_penalty resample_steps sparsity_function p_start p_end anneal_start "
        "sparsity_queue_length n_sparsity_updates norm_factor"
    ),
)


def read(path: Path) -> SAE:
    """Read a folder. Raises CorruptError, and SettingsError for an unknown class."""
    file, settings = path / WEIGHTS, path / CONFIG
    config = read_config(settings)
    check_fields(config, TOP, settings)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise CorruptError(f"{settings} has no object `trainer`. Copy the file again.")
    check_fields(trainer, TRAINER, settings)
    kind = trainer.get("dict_class")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise SettingsError(f"{path} has dict_class {shorten(kind)}. Give an SAE of one of {', '.join(CLASSES)}.")
    variant, spelling, more = CLASSES[kind]
    tensors = load_tensors(file)
    check_tensors(tensors, {*spelling.values(), *more}, file)
    weights = take_weights(tensors, file, spelling)
    n_latents, d_model = weights["encoder"].shape
    check_sizes(trainer, {"activation_dim": d_model, "dict_size": n_latents}, settings)
    k = _read_k(tensors, trainer, n_latents, path) if VARIANTS[variant].top_k else None
    _check_groups(tensors, trainer, n_latents, path)
    shapes: dict[str, tuple[int, ...]] = {"batchtopk": (), "jumprelu": (n_latents,)}
    if variant in shapes:
        threshold = take(tensors, file, {"threshold": shapes[variant]})["threshold"]
        if threshold.dim() == 0 and threshold < 0:
            raise SettingsError(
                f"{path} has a threshold below 0: it was saved before its threshold was set. Give a later checkpoint."
            )
        weights["threshold"] = threshold.clamp_min(0)  # a threshold below 0 has the effect of ReLU
    return build_sae(variant, weights, centered=kind not in UNCENTERED, k=k)


def _read_k(tensors: Mapping[str, object], trainer: Mapping[str, object], n_latents: int, path: Path) -> int:
    """k from the tensors, as the package has it, or from the settings, where older versions have it alone."""
    found = []
    if "k" in tensors:
        found.append(read_k(float(take(tensors, path / WEIGHTS, {"k": ()})["k"]), n_latents, path / WEIGHTS))
    if "k" in trainer or not found:
        found.append(read_k(trainer.get("k"), n_latents, path / CONFIG))
    if found[0] != found[-1]:
        raise CorruptError(
            f"{path} has k = {found[0]} in {WEIGHTS} and {found[-1]} in {CONFIG}. Copy both files again."
        )
    return found[0]


def _check_groups(tensors: Mapping[str, object], trainer: Mapping[str, object], n_latents: int, path: Path) -> None:
    """Raise CorruptError unless the groups are the whole dictionary: a part of them would be another SAE."""
    stored = tensors.get("group_sizes")
    for sizes in (stored.tolist() if isinstance(stored, torch.Tensor) else stored, trainer.get("group_sizes")):
        if sizes is None:
            continue
        numbers = [n for n in sizes if isinstance(n, int) and 0 < n <= n_latents] if isinstance(sizes, list) else []
        if not isinstance(sizes, list) or len(numbers) < len(sizes) or sum(numbers) != n_latents:
            raise CorruptError(
                f"{path}: group_sizes must be positive and add up to {n_latents}. Copy both files again."
            )


def remark(path: Path) -> tuple[str, ...]:
    """What a training on the registers of DINOv2 really read (neelvarma/dinov2-saes): 4 positions after the patches,
    where this tower has its last patches; its registers come before them."""
    run = read_config(path / CONFIG).get("run")
    if not isinstance(run, dict) or run.get("token_subset") != "registers_only":
        return ()
    return (
        "It was trained on the last positions, which are the last patches of DINOv2 with registers, not registers.",
    )


def write(sae: SAE, hook_point: HookPoint) -> dict[str, bytes]:
    """File name -> bytes."""
    kind = next(kind for kind, (variant, *_) in CLASSES.items() if variant == sae.config.variant)
    folded = fold(sae, centered=kind not in UNCENTERED)
    tensors = give_weights(folded, CLASSES[kind][1])
    if sae.config.top_k:
        tensors |= {"k": torch.tensor(sae.config.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}  # -1: not set
    if "threshold" in folded:
        tensors["threshold"] = folded["threshold"]
    trainer: dict[str, object] = {
        "dict_class": kind, "activation_dim": sae.d_model, "dict_size": sae.config.n_latents,
        "layer": hook_point.layer, "submodule_name": str(hook_point), "lm_name": "", "k": sae.config.k,
    }  # fmt: skip
    config = json.dumps({"trainer": trainer, "buffer": {}}, indent=2).encode()
    return {CONFIG: config, WEIGHTS: torch_bytes(tensors)}
