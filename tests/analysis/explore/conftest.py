"""The golden pipeline as an explorer shows it: its sources, and a real server."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from explorer import PAGE, Client, serving

GOLDEN = Path(__file__).parents[2] / "golden" / "pipeline"


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the golden pipeline. Notes are written into copies of its tables only."""
    return Path(shutil.copytree(GOLDEN, tmp_path_factory.mktemp("explore") / "pipeline"))


@pytest.fixture(scope="session")
def sources(golden: Path) -> Any:
    from analysis.explore.sources import open_sources

    return open_sources(golden / "a.concepts")


@pytest.fixture(scope="module")
def client(sources: Any) -> Iterator[Client]:
    with serving(sources) as client:
        yield client


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A page of three small files in place of the built one."""
    from analysis.explore import server, site

    for module in (server, site):
        monkeypatch.setattr(module, "read_page", lambda: PAGE)
    return PAGE
