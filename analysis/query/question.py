"""Question: what `query` asks of codes, with a field for each of its flags. Importing it loads no heavy library."""

from dataclasses import dataclass, fields
from typing import ClassVar

from actcache import SettingsError
from actcache.options import check_options, option

ALLOWED = {
    "latent": {"show", "where", "score"}, "sample": {"show", "seed"}, "image": {"at"},
    "class_": {"rank", "where", "tau"},
    "group": {"versus", "where", "score"}, "fires": {"silent", "where"}, "silent": {"where"}, "where": {"tau"},
}  # fmt: skip
"""The subjects a question can have, and the fields that go with each. The first field that is given is the subject."""

SHOW = {"images": {"where", "score"}, "patches": {"where"}, "counter-examples": {"where"}, "co-firing": set[str]()}
"""What --show can be for a latent, and the fields that go with it."""


RANKS = ("distinctive", "frequent")
"""How the latents of a class are ranked: by how much more often than on other classes they fire, or by how often."""


@dataclass(frozen=True)
class Question:
    """One question about codes. A field that is None (or empty) was not given, and the usual value applies.

    Raises SettingsError where nothing is asked, or where a field does not go with the subject.
    """

    IS_USAGE: ClassVar[bool] = True  # what is wrong with a question is wrong usage of the command line

    latent: int | None = option(None, "Show the images on which this latent fires most.", at_least=0)
    show: str | None = option(None, f"With --latent, what to show: {', '.join(SHOW)}. The default is images.")
    sample: int | None = option(None, "Show which latents fire together on this many random tokens.", at_least=1)
    seed: int | None = option(None, "Random seed for that sample. The default is 0.", at_least=0)
    image: tuple[str, ...] = option(
        (), "Show the latents of an image (its number, uri or path); give two to compare them."
    )
    at: str | None = option(None, "With --image, a patch or a region of it: ROW,COLUMN or 0:3,2:5.")
    class_: str | None = option(None, "Show the latents that distinguish this class from the other classes.")
    rank: str | None = option(
        None, f"With --class, which latents come first: {' or '.join(RANKS)}. The default is {RANKS[0]}."
    )
    group: str | None = option(
        None, "Show the latents that separate these images (a filter as for --where) from others."
    )
    versus: str | None = option(None, "With --group, the images to compare it with. The default is all others.")
    fires: str | None = option(None, "Show the images on which all of these latents fire, for example 12,57.")
    silent: str | None = option(None, "Show the images on which none of these latents fires, for example 3.")
    where: str | None = option(None, "Filter over the columns of images.parquet: \"split == 'test'\".")
    score: str | None = option(None, "How images are ranked: by the mean over tokens (the default), or by the max.")
    tau: float | None = option(None, "Activation above which a token counts. The default is 0.2.", at_least=0)
    n_top: int = option(10, "Number of rows in the answer.", at_least=1)

    def __post_init__(self) -> None:
        check_options(self)
        given = [field.name for field in fields(self) if field.name != "n_top" and self.gives(field.name)]
        if not any(name in ALLOWED for name in given):
            *others, last = map(flag, ALLOWED)
            raise SettingsError(f"No question was asked. Give one of {', '.join(others)} or {last}.")
        if self.show is not None and self.show not in SHOW:
            raise SettingsError(f"--show must be one of {', '.join(SHOW)}, got {self.show!r}.")
        if self.rank is not None and self.rank not in RANKS:
            raise SettingsError(f"--rank must be {' or '.join(RANKS)}, got {self.rank!r}.")
        if self.subject == "sample" and self.show not in (None, "co-firing"):
            raise SettingsError(f"--sample can only show co-firing, got --show {self.show}.")
        shown = self.show if self.subject == "latent" else None
        allowed = SHOW[shown] | {"show"} if shown else ALLOWED[self.subject]
        for name in given:
            if name not in {self.subject, *allowed}:
                subject = flag(self.subject) + (f" --show {shown}" if shown else "")
                raise SettingsError(f"{flag(name)} does not go with {subject}. Leave one of them out.")
        if len(self.image) > (1 if self.at else 2):
            raise SettingsError(f"--image may be given twice, or once with --at, got {len(self.image)} images.")

    def gives(self, name: str) -> bool:
        """Whether a field was given."""
        return getattr(self, name) not in (None, ())

    @property
    def subject(self) -> str:
        """The field that says what is asked about; the other fields qualify it."""
        return next(name for name in ALLOWED if self.gives(name))

    @property
    def latents(self) -> list[int]:
        """The latents whose images are shown. Raises SettingsError for --fires that cannot be read."""
        if self.show == "co-firing" or self.latent is None:
            return parse_latents(self.fires, "--fires")
        return [self.latent]

    @property
    def named_latents(self) -> list[int]:
        """The latents that the question names. Raises SettingsError for lists that cannot be read."""
        own = [] if self.latent is None else [self.latent]
        return [*own, *parse_latents(self.fires, "--fires"), *parse_latents(self.silent, "--silent")]


def flag(name: str) -> str:
    """class_ -> --class."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def parse_latents(text: str | None, flag: str) -> list[int]:
    """`12,57` as numbers; nothing for None. Raises SettingsError."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise SettingsError(f"{flag} must be a list of latents such as 12,57, got {text!r}.") from error
