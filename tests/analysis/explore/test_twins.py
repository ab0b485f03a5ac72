"""Twins of latents in another run that `inspect` compared with the table's run."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from typer.testing import CliRunner

import cli
from analysis.explore.data import Data
from analysis.explore.latents import describe_latent
from analysis.explore.sources import open_sources


@pytest.fixture(scope="module")
def inspection(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = golden / "inspection.json"
    words = ["inspect", str(golden / "run"), str(golden / "runs" / "variantrelu"), "--store", str(golden / "a.acts"),
             "--n-tokens", "20", "--on-seen", "use", "--out", str(out)]  # fmt: skip
    done = CliRunner().invoke(cli.app, ["--quiet", *words])
    assert done.exit_code == 0, done.output
    return out


def unit(run: Path) -> NDArray[np.float64]:
    rows = load_file(run / "sae.safetensors")["decoder"].astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1)[:, None]


def test_twins_have_the_largest_cosine(golden: Path, inspection: Path) -> None:
    sources = open_sources(golden / "a.concepts", results=[inspection])
    cosines = unit(golden / "run") @ unit(golden / "runs" / "variantrelu").T
    for latent in (0, 19, 63):
        (twin,) = describe_latent(sources, latent)["twins"]
        assert (twin["run"], twin["latent"]) == ("variantrelu", int(cosines[latent].argmax()))
        np.testing.assert_allclose(twin["cosine"], cosines[latent].max(), rtol=1e-3)
    data = Data(sources)
    assert "being computed" in {color["name"]: color["why"] for color in site(data)["absent"]}["stability"]
    assert "stability" not in {column["name"] for column in site(data)["columns"]}
    data.stability.make()
    names = [column["name"] for column in site(data)["columns"]]
    column = np.frombuffer(data.answer("atlas.bin").body, "<f4").reshape(len(names), -1)[names.index("stability")]
    np.testing.assert_allclose(column, np.where(sources.n_fired > 0, cosines.max(1), np.nan), rtol=1e-5)


def site(data: Data) -> Any:
    return json.loads(data.answer("site.json").body)


def test_a_run_that_is_gone_has_no_twins(golden: Path, inspection: Path, tmp_path: Path) -> None:
    copy = tmp_path / "inspection.json"
    copy.write_bytes(inspection.read_bytes().replace(b"variantrelu", b"variantgone"))
    with pytest.raises(Exception, match="differs"):
        open_sources(golden / "a.concepts", results=[copy])
    assert describe_latent(open_sources(golden / "a.concepts"), 19)["twins"] is None


def test_a_run_that_is_damaged_gives_no_stability_and_says_why(golden: Path, inspection: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(golden, tmp_path / "pipeline"))
    weights = folder / "runs" / "variantrelu" / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)
    data = Data(open_sources(folder / "a.concepts", results=[folder / inspection.name]))
    data.stability.start()
    while data.stability.running:
        time.sleep(0.01)
    reason = {column["name"]: column["why"] for column in site(data)["absent"]}["stability"]
    assert re.search(r"could not be computed: .*sae\.safetensors", reason)
