"""Sparse encoders that no SAE here can be, by the names that their packages give them, and why."""

from pathlib import Path

from actcache import SettingsError

_SIGNED = "keeps the codes of the largest size, whatever their sign, and codes here are never negative"
_PURSUIT = "finds its codes one after another by matching pursuit, not by one encoder"
_TRANSCODER = "predicts one hook point from another, so it has no reconstruction of its input"
REASONS = {
    **dict.fromkeys(("abstopk", "topkabs", "topkabsrelu", "batchtopkabs", "batchtopkabsrelu"), _SIGNED),
    **dict.fromkeys(("matching_pursuit", "mp", "mpsae", "omp", "ompsae"), _PURSUIT),
    "temporal": "encodes a token together with the others of its sequence",
    "qsae": "rounds its codes to levels that it learned",
    **dict.fromkeys(
        ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"), _TRANSCODER
    ),
    "crosscoder": "reads several hook points at once",
    "switchsae": "sends each token to one of several small SAEs",
}  # fmt: skip
"""Name in lower case -> why, as a sentence goes on after "it"."""


def refuse_kind(kind: object, path: Path) -> None:
    """Raise SettingsError if `kind` is the name of an encoder that no SAE here can be."""
    if isinstance(kind, str) and (reason := REASONS.get(kind.lower())):
        raise SettingsError(f"{path} is a {kind}: it {reason}. Give an SAE with relu, topk, batchtopk or jumprelu.")
