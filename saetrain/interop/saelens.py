"""SAELens: a folder with cfg.json and sae_weights.safetensors.

W_enc [D, F], W_dec [F, D], b_dec [D]; standard and topk: b_enc; jumprelu: b_enc, threshold [F]; gated: b_gate, b_mag,
r_mag. Training checkpoints of batchtopk and matryoshka_batchtopk have topk_threshold [], those of jumprelu have
log_threshold or threshold. A batchtopk SAE is written as jumprelu with one threshold, as SAELens does itself.

Version 6 keeps where the SAE came from in `metadata`. Before it, everything stood at the top level, the activation had
fields of its own, and a finetuned SAE could have a factor for each code before decoding.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from actcache import CorruptError, HookPoint, SettingsError
from saetrain.config import TOKEN_NORMALIZATIONS
from saetrain.interop.fields import Fields, check_fields, check_sizes, check_tensors, is_same, names, shorten
from saetrain.interop.files import read_config, read_flag, read_k, read_safetensors, take
from saetrain.interop.foreign import GATED, PLAIN, build_sae, fold, give_weights, take_weights
from saetrain.interop.refusals import refuse_kind
from saetrain.model import SAE

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
WHITENING = "activation_whitening.safetensors"
SCALED = ("expected_average_only_in", "covariance_whitening")
"""Normalizations by statistics of the training's activations, which lie beside the weights until they are folded."""
VERSION = "6.0.0"
"""The version from which on SAELens reads a folder without conversion."""
ARCHITECTURES = {
    "standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated", "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
}  # fmt: skip
"""Architecture -> variant."""
EXPORTS = {
    "relu": ("standard", PLAIN), "topk": ("topk", PLAIN), "jumprelu": ("jumprelu", PLAIN),
    "batchtopk": ("jumprelu", PLAIN), "gated": ("gated", GATED),
}  # fmt: skip
"""Variant -> the architecture that it is written as, and the names of its tensors."""
SINCE_6 = Fields(
    "SAELens 6",
    used=names(
        "architecture d_in d_sae apply_b_dec_to_input normalize_activations metadata k rescale_acts_by_decoder_norm"
    ),
    neutral=names(
        "dtype device decoder_init_norm l1_coefficient lp_norm l1_warm_up_steps use_sparse_activations "
        "aux_loss_coefficient topk_threshold_lr matryoshka_widths use_matryoshka_aux_loss jumprelu_init_threshold "
        "jumprelu_bandwidth jumprelu_sparsity_loss_mode l0_coefficient l0_warm_up_steps pre_act_loss_coefficient "
        "jumprelu_tanh_scale jumprelu_ste_to_input target_l0"
    ),
    only={"reshape_activations": ("none",)},
)
BEFORE_6 = Fields(
    "SAELens before 6",
    used=SINCE_6.used
    | names("activation_fn_str activation_fn activation_fn_kwargs finetuning_scaling_factor hook_name hook_point"),
    neutral=SINCE_6.neutral
    | names(
        "model_name model_class_name hook_layer hook_point_layer hook_eval hook_point_eval prepend_bos context_size "
        "dataset_path dataset_trust_remote_code sae_lens_version sae_lens_training_version neuronpedia_id "
        "model_from_pretrained_kwargs model_kwargs seqpos_slice exclude_special_tokens streaming is_dataset_tokenized "
        "use_cached_activations cached_activations_path from_pretrained_path expansion_factor b_dec_init_method "
        "normalize_sae_decoder noise_scale decoder_orthogonal_init decoder_heuristic_init decoder_heuristic_init_norm "
        "init_encoder_as_decoder_transpose n_batches_in_buffer training_tokens finetuning_tokens finetuning_method "
        "store_batch_size store_batch_size_prompts train_batch_size train_batch_size_tokens act_store_device seed "
        "autocast autocast_lm compile_llm llm_compilation_mode compile_sae sae_compilation_mode adam_beta1 adam_beta2 "
        "mse_loss_normalization scale_sparsity_penalty_by_decoder_norm lr lr_scheduler_name lr_warm_up_steps lr_end "
        "lr_decay_steps n_restart_cycles use_ghost_grads feature_sampling_window dead_feature_window "
        "dead_feature_threshold n_eval_batches eval_batch_size_prompts log_to_wandb log_activations_store_to_wandb "
        "log_optimizer_state_to_wandb wandb_project wandb_id run_name wandb_entity wandb_log_frequency "
        "eval_every_n_wandb_logs resume n_checkpoints checkpoint_path verbose tokens_per_buffer"
    ),
    only={**SINCE_6.only, "hook_head_index": (None,), "hook_point_head_index": (None,)},
)
"""Older training checkpoints hold the settings of their whole training."""
METADATA = Fields("SAELens 6", used=frozenset(), only={"hook_head_index": (None,), "reshape_activations": ("none",)})
FINETUNED = ("scaling_factor", "finetuning_scaling_factor")
"""Two names of one tensor: a factor [F] that a finetuned SAE applies to its codes before decoding them."""


def read(path: Path) -> SAE:
    """Read a folder. Raises CorruptError, and SettingsError for what no SAE here can compute."""
    file, settings = path / WEIGHTS, path / CONFIG
    config, tensors = read_config(settings), read_safetensors(file)
    _check_version(config, settings)
    architecture, k = _read_architecture(config, settings)
    own = {"gated": names("b_gate b_mag r_mag")}.get(architecture, names("b_enc"))
    own |= {"jumprelu": names("threshold log_threshold")}.get(architecture, frozenset())
    own |= names("topk_threshold") if "batchtopk" in architecture else frozenset()
    check_tensors(tensors, names("W_enc W_dec b_dec") | own | {*FINETUNED}, file)
    weights = take_weights(tensors, file, GATED if architecture == "gated" else PLAIN)
    n_latents, d_model = weights["encoder"].shape
    check_sizes(config, {"d_in": d_model, "d_sae": n_latents}, settings)
    rescaled = "topk" in architecture and read_flag(config, "rescale_acts_by_decoder_norm", False, settings)
    weights = _fold_finetuning(weights, tensors, config, rescaled, file)
    weights = _rescale(weights) if rescaled else weights  # by the norms in the units of the normalized input
    normalize = _read_normalization(config, settings)
    if normalize in SCALED:
        weights = _fold_scaling(weights, settings.with_name(SCALER), normalize)
    if architecture == "jumprelu":
        if names("threshold log_threshold") <= set(tensors):
            raise CorruptError(f"{file} has both threshold and log_threshold. Remove the one that was not trained.")
        if "log_threshold" in tensors:
            weights["threshold"] = take(tensors, file, {"log_threshold": (n_latents,)})["log_threshold"].exp()
        else:
            weights["threshold"] = take(tensors, file, {"threshold": (n_latents,)})["threshold"]
    if "batchtopk" in architecture:
        weights["threshold"] = take(tensors, file, {"topk_threshold": ()})["topk_threshold"]
    if "threshold" in weights:
        weights["threshold"] = weights["threshold"].clamp_min(0)  # a threshold below 0 has the effect of ReLU
    centered = read_flag(config, "apply_b_dec_to_input", True, settings)
    count = read_k(k, n_latents, settings) if "topk" in architecture else None
    token = normalize if normalize in TOKEN_NORMALIZATIONS else "none"
    return build_sae(ARCHITECTURES[architecture], weights, centered=centered, k=count, normalize=token)


def _check_version(config: Mapping[str, object], path: Path) -> None:
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise CorruptError(f"{path}: metadata must be an object, got {shorten(metadata)}. Copy the file again.")
    version = metadata.get("sae_lens_version")
    if version is not None and not str(version).startswith("6."):
        raise SettingsError(f"{path} was written by SAELens {shorten(version)}, but only versions up to 6 are known.")
    check_fields(config, BEFORE_6 if version is None else SINCE_6, path)
    # SAELens lets anybody put anything into the metadata, since it describes the origin and no class reads it
    check_fields({name: metadata[name] for name in METADATA.only if name in metadata}, METADATA, path)
    hooks = (config.get("hook_name"), config.get("hook_point"), metadata.get("hook_name"))
    if any(isinstance(hook, str) and "hook_z" in hook for hook in hooks):
        raise SettingsError(f"{path} reads the outputs of attention heads (hook_z). Give an SAE of a residual stream.")


def _read_architecture(config: Mapping[str, object], path: Path) -> tuple[str, object]:
    """(architecture, k). Before version 6, a top-k SAE was a standard one with another activation."""
    architecture = config.get("architecture", "standard")
    refuse_kind(architecture, path)
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise SettingsError(
            f"{path} has architecture {shorten(architecture)}. Give an SAE of one of {', '.join(ARCHITECTURES)}."
        )
    spellings = [config[name] for name in ("activation_fn_str", "activation_fn") if name in config]
    activation = spellings[0] if spellings else None
    arguments = config.get("activation_fn_kwargs") or {}
    if any(other != activation for other in spellings) or not isinstance(arguments, dict):
        raise CorruptError(f"{path} names its activation twice, differently, or without an object of arguments.")
    check_fields(arguments, Fields("an activation of SAELens", names("k" if activation == "topk" else "")), path)
    if activation == "topk" and architecture in ("standard", "topk"):
        k = arguments.get("k", config.get("k"))
        if "k" in arguments and "k" in config and not is_same(config["k"], k):
            raise CorruptError(f"{path} has two different values of k, {shorten(k)} and {shorten(config['k'])}.")
        return "topk", k
    if activation not in (None, "relu"):
        raise SettingsError(
            f"{path} is a {architecture} SAE with activation {shorten(activation)}. Give one with relu or topk."
        )
    if activation == "relu" and "topk" in architecture:
        raise SettingsError(f"{path} is a {architecture} SAE with activation 'relu': one of the two is wrong.")
    return architecture, config.get("k")


def _read_normalization(config: Mapping[str, object], path: Path) -> str:
    """The normalization of the input: none, one of TOKEN_NORMALIZATIONS or one of SCALED."""
    value = config.get("normalize_activations")
    if value is None or is_same(value, False):  # a truth value in the oldest versions
        return "none"
    name = "expected_average_only_in" if is_same(value, True) else value
    known = ("none", *TOKEN_NORMALIZATIONS, *SCALED)
    if not isinstance(name, str) or name not in known:
        raise SettingsError(
            f"{path} normalizes its input by {shorten(value)}, which is not known. Give an SAE with one of "
            f"{', '.join(known)}."
        )
    return name


def _fold_scaling(weights: Mapping[str, Tensor], scaler: Path, normalize: str) -> dict[str, Tensor]:
    """Fold the scaling of the input by statistics of the training.

    One factor c: (c x - b) E = (x - b / c) c E, and (f W + b) / c = f (W / c) + b / c. Whitening by a matrix M and its
    inverse N: ((x - m) M - b) E = (x - (m + b N)) M E, and (f W + b) N + m = f (W N) + (m + b N). E is [D, F] here.
    """
    whitens = normalize == "covariance_whitening"
    name = WHITENING if whitens else SCALER
    if not scaler.with_name(name).is_file():
        folding = "fold_activation_whitening" if whitens else "fold_activation_norm_scaling_factor"
        raise SettingsError(
            f"{scaler.with_name(CONFIG)} normalizes its input ({normalize}) by what it does not hold. Put {name} of "
            f"the training beside it, or fold it with SAELens ({folding})."
        )
    if not whitens:
        c = _read_factor(scaler)
        folded = {"encoder": weights["encoder"] * c, "decoder": weights["decoder"] / c, "b_dec": weights["b_dec"] / c}
        return {**weights, **folded} if c != 1 else dict(weights)
    encoder, decoder, b_dec = (weights[name].double() for name in ("encoder", "decoder", "b_dec"))
    n, file = len(b_dec), scaler.with_name(WHITENING)
    shapes: dict[str, tuple[int | None, ...]] = {"mean": (n,), "matrix": (n, n), "inverse_matrix": (n, n)}
    tensors = read_safetensors(file)
    check_tensors(tensors, shapes, file)
    take(tensors, file, shapes)  # checks them, in float32
    mean, matrix, inverse = (tensors[name].double() for name in shapes)
    if not torch.allclose(matrix @ inverse, torch.eye(n, dtype=torch.float64), atol=1e-3):
        raise CorruptError(f"{file}: inverse_matrix is not the inverse of matrix. Copy the file again.")
    folded = {"encoder": encoder @ matrix.T, "decoder": decoder @ inverse, "b_dec": b_dec @ inverse + mean}
    return {**weights, **{name: value.float() for name, value in folded.items()}}


def _read_factor(scaler: Path) -> float:
    fields = read_config(scaler)
    check_fields(fields, Fields("SAELens", names("scaling_factor"), only={"has_whitening": (False,)}), scaler)
    factor = fields.get("scaling_factor")
    if not isinstance(factor, int | float) or not 1e-9 < factor < 1e9:
        raise CorruptError(f"{scaler}: scaling_factor must be a positive number, got {shorten(factor)}.")
    return float(factor)


def _fold_finetuning(
    weights: Mapping[str, Tensor], tensors: Mapping[str, object], config: Mapping[str, object], rescaled: bool,
    file: Path,
) -> dict[str, Tensor]:  # fmt: skip
    present = [name for name in FINETUNED if name in tensors]
    is_on = read_flag(config, "finetuning_scaling_factor", False, file.with_name(CONFIG))
    if len(present) != 1:
        if present or is_on:
            raise CorruptError(f"{file} should have one tensor {FINETUNED[0]}, but has {len(present)}. Copy it again.")
        return dict(weights)
    factor = take(tensors, file, {present[0]: (len(weights["encoder"]),)})[present[0]]
    if torch.equal(factor, torch.ones_like(factor)):  # SAELens wrote it for a while although nothing was finetuned
        return dict(weights)
    if not is_on or rescaled:
        raise SettingsError(
            f"{file} has {present[0]}, but finetuning_scaling_factor is {str(is_on).lower()} and the codes are "
            f"{'' if rescaled else 'not '}rescaled by the decoder's norms: it is unclear whether it applies."
        )
    return {**weights, "decoder": weights["decoder"] * factor[:, None]}


def _rescale(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold the norms r of the decoder rows into the weights: (z r) selects, and z r (W_dec / r) decodes."""
    norm = weights["decoder"].norm(dim=1)
    if not norm.all():
        raise SettingsError(
            "The checkpoint scales by the norms of its decoder rows, and one of them is 0. Give another checkpoint."
        )
    encoder, decoder = weights["encoder"] * norm[:, None], weights["decoder"] / norm[:, None]
    return {**weights, "encoder": encoder, "b_enc": weights["b_enc"] * norm, "decoder": decoder}


def write(sae: SAE, hook_point: HookPoint) -> dict[str, bytes]:
    """File name -> bytes."""
    architecture, spelling = EXPORTS[sae.config.variant]
    folded = fold(sae, holds=TOKEN_NORMALIZATIONS)
    tensors = give_weights(folded, spelling)
    if "threshold" in folded:
        tensors["threshold"] = folded["threshold"].expand(sae.config.n_latents)
    more = {"k": sae.config.k, "rescale_acts_by_decoder_norm": False} if sae.variant.exact_k else {}
    config = {
        "architecture": architecture, "d_in": sae.d_model, "d_sae": sae.config.n_latents, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": True, "reshape_activations": "none",
        "normalize_activations": sae.config.normalize if sae.config.per_token else "none",
        "metadata": {"sae_lens_version": VERSION, "hook_name": str(hook_point), "hook_head_index": None}, **more,
    }  # fmt: skip
    weights = save({name: value.float().contiguous() for name, value in tensors.items()})
    return {CONFIG: json.dumps(config, indent=2).encode(), WEIGHTS: weights}
