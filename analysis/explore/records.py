"""The records that the page reads, as JSON knows them: files of data/, and answers of api/.

web/src/types.ts says the same to the page, and explains the fields whose names do not. A test compares the two.
"""

from typing import NotRequired, TypedDict

ShotNames = dict[str, list[str]]
"""The uri and the label of the images in a record, by number, so that a page that shows a few need not load all."""


class Shot(TypedDict):
    """An image under a latent's heat map.

    Attributes:
        score: what the latent's top images are ordered by. peak: its maximum on a token of the image.
        cls: its value on CLS, 0 where it is silent; None where CLS was not encoded, or the codes are not there.
        at, heat: row-major numbers of the patches on which it fires, ascending, and its values there.
    """

    image: int
    score: float
    peak: float
    cls: float | None
    at: list[int]
    heat: list[float]


# ---------------------------------------------------------------------------------------------------------------------
# What the page starts with


class ColumnRecord(TypedDict):
    name: str
    title: str
    log: bool
    low_is_good: NotRequired[bool]


class AbsentRecord(TypedDict):
    name: str
    title: str
    why: str


class SiteRecord(TypedDict):
    """site.json; `results` are digests of the files that results.html draws."""

    schema: int
    live: bool
    title: str
    concepts_id: str
    codes_id: str
    run_id: str | None
    model: str
    hook_point: str
    tokens: str
    variant: str
    n_latents: int
    n_alive: int
    n_images: int
    n_tokens: int
    grid: list[int]
    covered: list[float]
    score: str
    tau: float
    quantiles: list[str]
    block: dict[str, int]
    columns: list[ColumnRecord]
    absent: list[AbsentRecord]
    making: list[str]
    classes: list[str]
    has: dict[str, bool]
    missing: dict[str, str]
    versions: dict[str, str]
    results: list[str]


class NameRecord(TypedDict, total=False):
    name: str
    origin: str
    own: bool
    note: str


class Names(TypedDict):
    """names.json: the latents with a name or a note, and the version of what people wrote."""

    latents: dict[str, NameRecord]
    version: str


# ---------------------------------------------------------------------------------------------------------------------
# Latents


class KindRecord(TypedDict):
    density: float | None
    mean: float | None
    max: float | None


class Strengths(TypedDict):
    edges: list[float]
    counts: list[int]


class ClassRecord(TypedDict):
    name: str
    n_tokens: int
    share: float | None
    n_images: int


class Partner(TypedDict):
    latent: int
    jaccard: float | None
    share: float | None
    n_tokens: int


class Group(TypedDict):
    title: str
    shots: list[Shot]


class CounterExamples(TypedDict):
    kind: str
    shots: list[Shot]


class Patch(TypedDict):
    image: int
    row: int
    column: int
    value: float | None


class Twin(TypedDict):
    run: str
    latent: int
    cosine: float | None


class LatentImages(TypedDict):
    """Where a latent fires. Without codes there are only the images that the table keeps."""

    cofiring: list[Partner] | None
    groups: list[Group]
    counter: list[CounterExamples] | None
    note: str


class LatentRecord(LatentImages):
    """latents/N.json."""

    latent: int
    numbers: dict[str, int | float | None]
    quantiles: dict[str, float | None]
    kinds: dict[str, KindRecord] | None
    histogram: Strengths | None
    position: list[int] | None
    classes: list[ClassRecord]
    n_classes: int
    nearest: list[tuple[int, float | None]]
    patches: list[Patch]
    twins: list[Twin] | None
    images: ShotNames


# ---------------------------------------------------------------------------------------------------------------------
# Images


class Images(TypedDict):
    """images.json."""

    uri: list[str]
    label: list[str]
    readable: list[int]


class ImageCodes(TypedDict):
    n_tokens: int
    tokens: int
    indptr: list[int]
    latent: list[int]
    value: list[float]
    maxima: list[float]


class ImageRecord(ImageCodes):
    """images/N.json, and the record of an upload, whose `image` is None."""

    image: int | None
    uri: str
    label: str
    readable: int
    columns: dict[str, str | bool | int | float | None]


# ---------------------------------------------------------------------------------------------------------------------
# Comparison

Compared = TypedDict(
    "Compared",
    {
        "latent": int, "class": str, "kind": str, "base_tokens": int, "adapted_tokens": int, "change": float | None,
        "base": list[Shot], "adapted": list[Shot],
    },
)  # fmt: skip


class ComparisonRecord(TypedDict):
    """comparison.json."""

    conclusion: str
    facts: list[tuple[str, str]]
    missing: list[str]
    latents: list[Compared]
    images: ShotNames


# ---------------------------------------------------------------------------------------------------------------------
# Answers of the model


class UploadAnswer(TypedDict):
    """`picture` is a data URL."""

    upload: str
    record: ImageRecord
    picture: str


class ClassChange(TypedDict):
    name: str
    before: float | None
    after: float | None
    random: float | None


class EditAnswer(TypedDict):
    """Attributes:
    random: which latent was drawn in place of each that is changed.
    frequency: shares of all tokens on which the first changed latent fires, and the one that was drawn for it.
    """

    judge: str
    classes: list[ClassChange]
    random_latent: int | None
    random: list[tuple[int, int]] | None
    frequency: list[float | None]
    seconds: float


class Found(TypedDict):
    """Latents that fit a text, and their scores; best first."""

    latents: list[tuple[int, float | None]]
