"""adapt() takes the labels of a table from the column that is named."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actcache import ImageSourceError, PromptConfig, adapt


def test_the_classes_are_those_of_the_chosen_column(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    names = sorted(str(file) for file in tiny_images.rglob("*.png"))[:24]
    columns = {"photo": names, "kind": [f"kind {i % 2}" for i in range(24)], "label": ["one"] * 24}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    config = PromptConfig(method="coop", shots=2, n_epochs=1, batch_size=4)
    with pytest.raises(ImageSourceError, match=r"--path-column"):
        adapt(tmp_path / "x.parquet", tmp_path / "x.prompts", **tiny_model, config=config)
    adapted = adapt(
        tmp_path / "x.parquet", tmp_path / "x.prompts", **tiny_model, config=config, path_column="photo", label="kind"
    )
    assert adapted.artifact.settings["classes"] == ["kind 0", "kind 1"]
