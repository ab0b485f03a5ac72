"""A whole number given for a float means the float. Artifacts that older versions made with it resume as they did."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from actcache import SettingsError
from actcache.artifacts import open_artifact
from actcache.artifacts.opening import artifact_id
from saetrain import Run, SAEConfig, TrainConfig, train


def retrain(store: Path, run: Path, **changes: Any) -> Run:
    return train(
        store, run, layer=2, sae=SAEConfig("jumprelu", 64, 4, **{"target_l0": 5, **changes}),
        config=TrainConfig(n_steps=3, batch_size=128, lr=0.001),
    )  # fmt: skip


@pytest.mark.parametrize("asked", [5, 5.0])
def test_a_run_that_stores_a_whole_number_is_returned(asked: float, tiny_store: Path, tmp_path: Path) -> None:
    retrain(tiny_store, tmp_path / "run")
    file = tmp_path / "run" / "artifact.json"
    value = json.loads(file.read_text())
    assert value["settings"]["sae"]["target_l0"] == 5.0
    value["settings"]["sae"]["target_l0"] = 5  # as an older version wrote it
    value["id"] = artifact_id("run", value["settings"], open_artifact(tmp_path / "run").parents)
    file.write_text(json.dumps(value))
    found = retrain(tiny_store, tmp_path / "run", target_l0=asked)
    assert found.run_id == value["id"]
    with pytest.raises(SettingsError, match="made with other settings"):
        retrain(tiny_store, tmp_path / "run", target_l0=6)
    shutil.rmtree(tmp_path / "run")
