"""What the text encoder is given for the classes of a store, when studies compare images with texts."""

from pathlib import Path

import numpy as np
import pytest

from actcache import open_stores
from analysis import evaluate_fidelity
from analysis.classifier import choose_classes, describe_config
from analysis.config import ComparisonConfig, StudyConfig
from saetrain import Run


def test_a_file_of_class_names_changes_the_texts_and_the_identity_of_a_study(
    tmp_path: Path, middle_run: Path, middle_store: Path
) -> None:
    run, store = Run.open(middle_run), open_stores(middle_store)
    plain = choose_classes(store, run.hook_point)
    assert plain.words == plain.names
    file = tmp_path / "names.csv"
    file.write_text("\n".join(f"class{i},a zebra in the snow" if i == 1 else f"class{i},class{i}" for i in range(9)))
    named = choose_classes(store, run.hook_point, class_names=file)
    assert named.names == plain.names
    assert named.words == tuple("a zebra in the snow" if name == "class1" else name for name in plain.names)
    np.testing.assert_array_equal(named.labels, plain.labels)
    results = [
        evaluate_fidelity(middle_run, middle_store, study=StudyConfig(class_names=given)) for given in (None, file)
    ]
    assert results[0].id != results[1].id
    scores = [[row.loss for row in result.runs[0].variants.values()] for result in results]
    assert scores[0] != scores[1]


@pytest.mark.parametrize("config", [StudyConfig(), ComparisonConfig()])
def test_results_without_a_file_keep_the_identity_they_had(config: StudyConfig | ComparisonConfig) -> None:
    assert "class_names" not in describe_config(config)
