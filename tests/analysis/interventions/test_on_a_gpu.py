"""Classifiers behind an SAE on a pretend GPU: what they say on the CPU, with and without latents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pretend_device import PretendDevice, tell

from analysis import (
    DeletionConfig,
    MaskingConfig,
    ModelOptions,
    SteerabilityConfig,
    StudyConfig,
    delete_latents,
    evaluate_fidelity,
    mask_latents,
    measure_steerability,
    set_latents,
)

STUDY = StudyConfig(on_seen="use", limit=24)
Measure = Callable[[Path, Path, ModelOptions], Any]
MEASURES: dict[str, Measure] = {
    "evaluate": lambda run, store, model: evaluate_fidelity(run, store, study=STUDY, model=model),
    "intervene": lambda run, store, model: mask_latents(
        run, store, None, MaskingConfig(k=(1, 4)), study=STUDY, model=model
    ),
    "attribute": lambda run, store, model: delete_latents(
        run, store, None, DeletionConfig(n=(1, 4)), study=STUDY, model=model
    ),
    "steer": lambda run, store, model: set_latents(
        run, store, None, set={3: 1.0}, add={5: 0.5}, study=STUDY, model=model
    ),
    "steerability": lambda run, store, model: measure_steerability(
        run, store, None, SteerabilityConfig(n_latents=2), study=STUDY, model=model
    ),
}


def numbers(value: Any, place: str = "") -> dict[str, float | str]:
    """Every number and name in a result, by its place."""
    if isinstance(value, dict):
        parts = [(f"{place}.{key}", part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"{place}.{i}", part) for i, part in enumerate(value)]
    elif hasattr(value, "__dataclass_fields__"):
        parts = [(f"{place}.{name}", getattr(value, name)) for name in value.__dataclass_fields__]
    else:
        return {place: value}
    return {key: found for name, part in parts for key, found in numbers(part, name).items()}


CASES = [*((name, "cuda") for name in MEASURES), *((name, "mps") for name in ("evaluate", "attribute", "steer"))]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_device_says_what_the_cpu_says(middle_run: Path, middle_store: Path, name: str, kind: str) -> None:
    measure = MEASURES[name]
    expected = numbers(measure(middle_run, middle_store, ModelOptions(device="cpu", batch_size=16)))
    with PretendDevice(kind):
        found = numbers(measure(middle_run, middle_store, ModelOptions(device=kind, batch_size=16)))
    assert found.keys() == expected.keys()
    for place, value in expected.items():
        if isinstance(value, float):
            assert found[place] == pytest.approx(value, rel=1e-4, abs=1e-5), place
        else:
            assert found[place] == value, place


def test_a_batch_of_a_masking_curve_waits_for_its_answers_only(middle_run: Path, middle_store: Path) -> None:
    """One copy to the device for the stream, and one back for the logits of each condition: no tower waits."""
    with PretendDevice() as gpu:
        MEASURES["evaluate"](middle_run, middle_store, ModelOptions(device="cuda", batch_size=12))
    variants, n_batches = 5, 2
    assert sum(event.place == "outcomes.Outcomes.add" for event in gpu.waits) == variants * n_batches, tell(gpu.waits)
    assert sum(event.place == "classifier.Classifier.read" for event in gpu.waits) == n_batches
    assert not [event for event in gpu.waits if event.place.startswith(("vision.", "blocks.", "anatomy."))]
