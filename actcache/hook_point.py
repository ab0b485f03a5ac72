"""HookPoint: a place in a block of the tower, named as in TransformerLens. Imports nothing heavy.

In: a layer and a site, or their name. Out: `HookPoint`, hashable and ordered. Promises: `sorted()` gives the order
in which a forward pass reaches them, and `parse(str(hook)) == hook`.
"""

import re
from dataclasses import dataclass
from functools import total_ordering

from actcache.errors import SettingsError
from actcache.options import check_number

SITES = ("resid_post", "resid_mid", "attn_out", "mlp_out")

_REACHED = ("attn_out", "resid_mid", "mlp_out", "resid_post")  # order within a block's forward pass
_PATTERN = re.compile(r"blocks\.(\d+)\.hook_(\w+)")


@total_ordering
@dataclass(frozen=True)
class HookPoint:
    """Layer (0-based block index) and site; `str()` gives `blocks.10.hook_resid_post`.

    With resid_pre, the residual stream that enters the block (the resid_post of the layer before):

        resid_pre + attn_out = resid_mid      attn_out: what attention adds, after its output projection and LayerScale
        resid_mid + mlp_out  = resid_post     mlp_out: what the MLP adds, after LayerScale

    Source of the names: TransformerLens, `blocks.{layer}.hook_{site}`.

    Raises:
        SettingsError: a negative layer, or a site that is not in SITES.
    """

    layer: int
    site: str = "resid_post"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", check_number("layer", self.layer, int, at_least=0))
        if self.site not in SITES:
            raise SettingsError(f"Unknown site {self.site!r}. Known sites: {', '.join(SITES)}.")

    def __str__(self) -> str:
        return f"blocks.{self.layer}.hook_{self.site}"

    def __lt__(self, other: "HookPoint") -> bool:
        """Whether a forward pass reaches this one first."""
        return (self.layer, _REACHED.index(self.site)) < (other.layer, _REACHED.index(other.site))

    @classmethod
    def parse(cls, text: str) -> "HookPoint":
        """Read `blocks.10.hook_resid_post`. Raises SettingsError for anything else."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise SettingsError(f"{text!r} is not a hook point. Expected e.g. blocks.10.hook_resid_post.")
        return cls(int(match[1]), match[2])
