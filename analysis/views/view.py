"""View and Look: what an SAE sees in images, as numbers. No torch.

In: the active entries of an image's tokens, and the picture. Out: tables of latents, heat maps, and the same facts as
text and as JSON.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache import SettingsError
from analysis.pictures import Picture
from analysis.query import At, choose_patches, describe_places, sum_latents


@dataclass(frozen=True, eq=False)
class View:
    """One image through an SAE.

    Attributes:
        image: the file, as it was given.
        picture: the part of the image that the model sees, at the model's size; heat maps lie over it.
        grid: rows and columns of patches.
        covered: the share of height and width of the picture over which the patches lie.
        tokens: all (CLS and the patches), patch or cls: those that were encoded.
        token: [n] token of each entry, ascending: 0 is CLS, and 1 + row * columns + column is a patch.
        latent, value: [n] of each entry, float32 values.
    """

    image: str
    picture: Picture = field(repr=False)
    grid: tuple[int, int]
    covered: tuple[float, float]
    n_latents: int
    tokens: str
    token: NDArray[np.int64] = field(repr=False)
    latent: NDArray[np.int64] = field(repr=False)
    value: NDArray[np.float32] = field(repr=False)

    @property
    def n_tokens(self) -> int:
        """Number of tokens that were encoded."""
        return {"cls": 1, "patch": self.grid[0] * self.grid[1], "all": 1 + self.grid[0] * self.grid[1]}[self.tokens]

    def heat_map(self, latent: int) -> NDArray[np.float32]:
        """[rows, columns]: the values of a latent on the patches. Raises SettingsError for a latent out of range."""
        self.check_latent(latent)
        values = np.zeros(1 + self.grid[0] * self.grid[1], dtype=np.float32)
        mine = self.latent == latent
        values[self.token[mine]] = self.value[mine]
        return values[1:].reshape(self.grid)

    def strongest(self, n_top: int | None = 10, *, at: At | None = None) -> pa.Table:
        """The strongest latents: latent, score, peak, share, and where the peak is as row, column and `at`.

        Args:
            n_top: how many; None for all that fire.
            at: (row, column) of a patch, or a slice of each for a region; all tokens by default.

        Returns:
            The highest score first. score: mean over the tokens, zeros included, as `query_image` has it. peak: largest
            value on one token. share: share of the patches, of the whole image, on which the latent fires.

        Raises:
            SettingsError: a patch outside the grid, or an SAE of CLS.
        """
        chosen, n_tokens = np.ones(len(self.token), dtype=bool), self.n_tokens
        if at is not None:
            rows, columns = self.find_patches(at)
            row, column = np.divmod(self.token - 1, self.grid[1])
            chosen = (self.token > 0) & np.isin(row, rows) & np.isin(column, columns)
            n_tokens = len(rows) * len(columns)
        sums = sum_latents(self.latent[chosen], self.value[chosen])
        order = np.lexsort((sums.latent, -sums.total))[:n_top]
        return self._table(sums.latent[order], sums.total[order] / n_tokens, sums.peak[order], chosen)

    def measure(self, latents: Sequence[int]) -> pa.Table:
        """The same columns for given latents, in their order, with zeros for those that do not fire."""
        sums = sum_latents(self.latent, self.value)
        wanted = np.array(latents, dtype=np.int64)
        total, peak = np.zeros(self.n_latents), np.zeros(self.n_latents)
        total[sums.latent], peak[sums.latent] = sums.total, sums.peak
        return self._table(wanted, total[wanted] / self.n_tokens, peak[wanted], np.ones(len(self.token), dtype=bool))

    def _table(
        self, latents: NDArray[np.int64], score: NDArray[Any], peak: NDArray[Any], within: NDArray[np.bool_]
    ) -> pa.Table:
        on_patch = self.token > 0
        n_patches = np.bincount(self.latent[on_patch], minlength=self.n_latents)
        share = n_patches[latents] / (self.grid[0] * self.grid[1])
        entries = [np.flatnonzero(within & (self.latent == latent)) for latent in latents]
        best = [int(self.token[mine[self.value[mine].argmax()]]) if len(mine) else 0 for mine in entries]
        row, column = np.divmod(np.array(best, dtype=np.int64) - 1, self.grid[1])
        places = describe_places(row, column, np.array(best) == 0)
        silent = pa.array([not len(mine) for mine in entries], pa.bool_())
        places["at"] = pa.compute.if_else(silent, "", places["at"])
        shares = {} if self.tokens == "cls" else {"share": share}
        return pa.table({"latent": latents, "score": score, "peak": peak, **shares, **places})

    def check_latent(self, latent: int) -> None:
        """Raise SettingsError unless the SAE has this latent."""
        if not 0 <= latent < self.n_latents:
            raise SettingsError(f"There is no latent {latent}: the SAE has 0..{self.n_latents - 1}.")

    def find_patches(self, at: At) -> tuple[range, range]:
        """The rows and columns of patches at a place. Raises SettingsError outside the grid, or for an SAE of CLS."""
        if self.tokens == "cls":
            raise SettingsError("The SAE reads CLS only, so it has no code for a place in an image. Leave out --at.")
        return choose_patches(self.grid, at)


@dataclass(frozen=True, eq=False)
class Look:
    """What an SAE sees in some images; `look` makes it. It shows itself in a notebook.

        seen = look("dog.jpg", "runs/l10"); seen[0].strongest(); seen[0].heat_map(907); seen.draw("dog.html")

    Attributes:
        sae: the SAE, as it was given.
        model: the tower, in words.
        hook_point: where in the tower.
        latents: those that were asked for; if there are none, the strongest of each image are shown.
        at: the patches that were asked about.
        names: the names of latents.
        notes: what is guessed, or differs from what the SAE names.
    """

    sae: str
    model: str
    hook_point: str
    views: tuple[View, ...]
    latents: tuple[int, ...] = ()
    at: At | None = None
    n_top: int = 10
    names: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.views)

    def __iter__(self) -> Iterator[View]:
        return iter(self.views)

    def __getitem__(self, number: int) -> View:
        return self.views[number]

    def table(self, view: View) -> pa.Table:
        """The latents that are shown of an image, as `View.strongest` has them, with their names if there are any."""
        table = view.measure(self.latents) if self.latents else view.strongest(self.n_top, at=self.at)
        if not self.names:
            return table
        names = [self.names.get(latent, "") for latent in table["latent"].to_pylist()]
        return table.add_column(1, "name", pa.array(names, pa.string()))

    def title(self, view: View) -> str:
        """The file's name, with its folder where several images have the same name."""
        path = Path(view.image)
        shared = sum(Path(other.image).name == path.name for other in self.views) > 1
        return "/".join(path.parts[-2:]) if shared else path.name

    def to_json(self) -> dict[str, object]:
        """Every fact that is shown."""
        return {
            "sae": self.sae, "model": self.model, "hook_point": self.hook_point, "notes": list(self.notes),
            "images": [
                {"image": view.image, "grid": list(view.grid), "rows": self.table(view).to_pylist()} for view in self
            ],
        }  # fmt: skip

    def draw(self, out: str | Path) -> Path:
        """Write the pictures with heat maps: .html is a page by itself, .png, .jpg and .webp are a sheet.

        Raises SettingsError for another suffix, or an SAE of CLS.
        """
        from analysis.views.drawing import draw_look

        return draw_look(self, out)

    def _repr_html_(self) -> str:
        from analysis.views.drawing import draw_html

        return draw_html(self)
