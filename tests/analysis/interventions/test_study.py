"""Everything that can be checked without a model is checked before one is loaded."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actcache import SettingsError
from analysis import (
    MaskingConfig,
    ModelOptions,
    StudyConfig,
    delete_latents,
    evaluate_fidelity,
    mask_latents,
    measure_steerability,
    set_latents,
)

STUDIES = {
    "evaluate": evaluate_fidelity,
    "intervene": mask_latents,
    "intervene --set": set_latents,
    "attribute": delete_latents,
    "steer": measure_steerability,
}
BAD_SETTINGS = {
    "--where names the unknown column 'color'": {"where": "color == 'red'"},
    "holds for none of the .* that have a label": {"where": "label_name == 'class9'"},
    "have one class, class": {"limit": 1},
    "limit must be at least 1": {"limit": 0},
    "tokens must be one of": {"tokens": "some"},
    "template": {"templates": "no-such-template"},
}


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: dict[str, str]) -> ModelOptions:
    """A model whose weights are not there; loading a model fails in any case."""

    def load(*args: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("actcache.models.load_clip", load)
    shutil.copy(tiny_model["model"], tmp_path)
    return ModelOptions(str(tmp_path / "tiny.json"), str(tmp_path / "moved.safetensors"), device="cpu")


@pytest.mark.parametrize("measure", STUDIES.values(), ids=STUDIES)
@pytest.mark.parametrize(("message", "study"), BAD_SETTINGS.items(), ids=BAD_SETTINGS)
def test_bad_settings_are_refused_before_a_model_is_loaded(
    middle_run: Path, middle_store: Path, no_model: ModelOptions, measure: Callable[..., object], message: str,
    study: dict[str, Any],
) -> None:  # fmt: skip
    with pytest.raises(SettingsError, match=message):
        measure(middle_run, middle_store, study=StudyConfig(**study), model=no_model)


def test_the_images_to_choose_on_are_checked_before_a_model_is_loaded(
    middle_run: Path, middle_store: Path, no_model: ModelOptions
) -> None:
    with pytest.raises(SettingsError, match="--chosen-where names the unknown column 'color'"):
        mask_latents(middle_run, middle_store, None, MaskingConfig(chosen_where="color == 'red'"), model=no_model)


def test_the_model_is_loaded_for_settings_that_hold(
    middle_run: Path, middle_store: Path, no_model: ModelOptions
) -> None:
    with pytest.raises(AssertionError, match="a model was loaded"):
        evaluate_fidelity(middle_run, middle_store, model=no_model)
