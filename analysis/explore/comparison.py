"""The record of a comparison: latents by what changed, with their top images under the base and the adapted model."""

from collections.abc import Mapping
from functools import lru_cache

from actcache.text import visible
from analysis.concepts import ConceptTable, find_codes
from analysis.explore.encoding import short, top_shots
from analysis.explore.images import name_images
from analysis.explore.records import Compared, ComparisonRecord, Shot
from analysis.explore.sources import Sources
from analysis.report import find_tables
from analysis.results import Comparison, CountOverlap
from saetrain import CodeStore

N_LATENTS, N_SHOTS = 60, 6
MODELS = ("base", "adapted")
KINDS = {
    "shared": "in the top of both models",
    "base_only": "in the top of the base model only",
    "adapted_only": "in the top of the adapted model only",
}


@lru_cache(maxsize=2)
def describe_comparison(sources: Sources) -> ComparisonRecord:
    """The record. `change` is (adapted - base) / (adapted + base) of the tokens above tau."""
    assert sources.comparison is not None
    comparison, file = sources.comparison
    tables = find_tables(comparison, sources.concepts, file.absolute().parent)
    codes = {name: _codes_of(sources, table) for name, table in tables.items()}
    counts = {latent: both for latent, *both in zip(*comparison.overlap.scatter, strict=True)}
    places = _list_latents(comparison.overlap)
    chosen = sorted(places, key=lambda n: -abs(_change(*counts.get(n, (0, 0))) * sum(counts.get(n, (0, 0)))))
    latents: list[Compared] = [
        {"latent": latent, "class": visible(places[latent][0]), "kind": KINDS[places[latent][1]],
         "base_tokens": counts.get(latent, (0, 0))[0], "adapted_tokens": counts.get(latent, (0, 0))[1],
         "change": short(_change(*counts.get(latent, (0, 0)))),
         "base": _shoot(tables.get("base"), codes.get("base"), latent),
         "adapted": _shoot(tables.get("adapted"), codes.get("adapted"), latent)}
        for latent in chosen[:N_LATENTS]
    ]  # fmt: skip
    shown = [shot["image"] for row in latents for shot in [*row["base"], *row["adapted"]]]
    return {
        "conclusion": visible(comparison.conclusion.sentence),
        "facts": [(visible(title), visible(text)) for title, text in _list_facts(comparison)],
        "missing": [f"The {name} model's concept table is not there, so its images are left out."
                    for name in MODELS if name not in tables],
        "latents": latents,
        "images": name_images(sources, shown),
    }  # fmt: skip


def _codes_of(sources: Sources, table: ConceptTable) -> CodeStore | None:
    return sources.codes if table is sources.concepts else find_codes(table)


def _change(base: int, adapted: int) -> float:
    return (adapted - base) / max(adapted + base, 1)


def _list_latents(overlap: CountOverlap) -> Mapping[int, tuple[str, str]]:
    """latent -> (the class that lists it first, "" for the dataset; how): exclusive ones before shared ones."""
    found: dict[int, tuple[str, str]] = {}
    for kind in ("base_only", "adapted_only", "shared"):
        for row in overlap.classes:
            for latent in getattr(row, kind):
                found.setdefault(latent, (row.class_, kind))
        for latent in getattr(overlap.dataset, kind):
            found.setdefault(latent, ("", kind))
    return found


def _list_facts(comparison: Comparison) -> list[tuple[str, str]]:
    conclusion, task = comparison.conclusion, comparison.overlap.task
    jaccard = "unknown" if task.jaccard is None else f"{task.jaccard:.2f}"
    return [
        ("method", str(comparison.prompts.get("method", "unknown"))),
        ("hook point", comparison.hook_point),
        ("images", f"{comparison.n_chosen:,} to choose latents, {comparison.n_judged:,} others to judge"),
        *((f"accuracy, {name}", f"{scores.accuracy:.1%}") for name, scores in comparison.accuracy.items()),
        ("gain", f"{conclusion.points:+.1f} points; {conclusion.seen_points:+.1f} where each model sees its own "
                 f"{conclusion.k} latents per class"),
        ("share of the gain without new concepts", conclusion.without_new_concepts.say()),
        ("share of the gain from the text alone", conclusion.text_only.say()),
        ("overlap of the top latents of a class (Jaccard)", jaccard),
        *([("second dictionary", comparison.dictionaries.sentence)] if comparison.dictionaries else []),
    ]  # fmt: skip


def _shoot(table: ConceptTable | None, codes: CodeStore | None, latent: int) -> list[Shot]:
    if table is None or not 0 <= latent < table.table.num_rows:
        return []
    return top_shots(table, codes, latent, N_SHOTS)
