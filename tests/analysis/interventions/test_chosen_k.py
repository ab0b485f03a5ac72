"""A number of latents that somebody chose is measured or refused; only the default is cut to a small dictionary."""

from pathlib import Path

import pytest

from actcache import SettingsError
from analysis import ComparisonConfig, MaskingConfig, ModelOptions, compare, mask_latents
from analysis.interventions import check_grid

CPU = ModelOptions(device="cpu")
GOLDEN = Path(__file__).parents[2] / "golden" / "pipeline"


@pytest.mark.parametrize("usual", [MaskingConfig.k, ComparisonConfig.k])
@pytest.mark.parametrize("n_latents", [3, 64, 501, 10**6])
def test_the_default_is_cut_where_the_dictionary_ends(usual: tuple[int, ...], n_latents: int) -> None:
    for given in (usual, list(usual)):
        assert check_grid("--k", given, n_latents, usual=usual) == [k for k in usual if k < n_latents]


@pytest.mark.parametrize(
    ("given", "too_large"),
    [((1, 64), "64"), ((99, 5, 1, 1000), "99, 1000"), ((64,), "64"), ((1, 2, 5, 64), "64"), ((), "nothing")],
)
def test_a_chosen_number_that_is_too_large_is_refused(given: tuple[int, ...], too_large: str) -> None:
    with pytest.raises(SettingsError, match=rf"--k must be below the dictionary's 64 latents, got {too_large}\. "):
        check_grid("--k", given, 64, usual=MaskingConfig.k)


def test_numbers_that_fit_are_kept_ascending_and_once() -> None:
    assert check_grid("--k", [5, 1, 63, 5], 64, usual=MaskingConfig.k) == [1, 5, 63]


def test_the_verbs_say_it_before_they_load_a_model(tmp_path: Path, middle_run: Path, middle_store: Path) -> None:
    with pytest.raises(SettingsError, match="64 latents, got 100, 2000"):
        mask_latents(middle_run, middle_store, tmp_path / "x.json", MaskingConfig(k=(1, 2000, 100)), model=CPU)
    with pytest.raises(SettingsError, match="64 latents, got 5000"):
        compare(GOLDEN / "a.concepts", GOLDEN / "adapted.concepts", tmp_path / "x.json", ComparisonConfig(k=(2, 5000)))
    assert not (tmp_path / "x.json").exists()
