"""HookPoint: a place in the residual stream, spelled as TransformerLens spells it. Imports nothing heavy."""

import re
from dataclasses import dataclass

from actcache.errors import SettingsError

SITES = ("resid_post",)

_PATTERN = re.compile(r"blocks\.(\d+)\.hook_(\w+)")


@dataclass(frozen=True, order=True)
class HookPoint:
    """Layer (0-based block index) and site; `str()` gives `blocks.10.hook_resid_post`.

    Source of the spelling: TransformerLens, `blocks.{layer}.hook_{site}`.
    """

    layer: int
    site: str = "resid_post"

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise SettingsError(f"A layer is a block index from 0, got {self.layer}.")
        if self.site not in SITES:
            raise SettingsError(f"Unknown site {self.site!r}. Known sites: {', '.join(SITES)}.")

    def __str__(self) -> str:
        return f"blocks.{self.layer}.hook_{self.site}"

    @classmethod
    def parse(cls, text: str) -> "HookPoint":
        """Read `blocks.10.hook_resid_post`. Raises SettingsError for anything else."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise SettingsError(f"{text!r} is not a hook point. Expected e.g. blocks.10.hook_resid_post.")
        return cls(int(match[1]), match[2])
