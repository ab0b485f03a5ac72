"""What the atlas shows beside the columns of the table, and what takes longer than a page waits: the map, and how
coherent latents are in space. It is made once, in a process of its own, and kept beside the table's seal.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache import CorruptError, SettingsError
from actcache.store import read_signed_table
from analysis.concepts import NOTES
from analysis.explore.sources import Sources

Columns = Mapping[str, NDArray[np.float32]]

NICE = 10
"""The priority of a process that makes something: what people look at comes first."""


def read_kept(sources: Sources, file: str, key: str, parents: Mapping[str, str | None]) -> pa.Table | None:
    """What was kept beside the table's seal; None if it is missing, damaged, or made from something else.

    Args:
        file: its name in the notes. key: where its metadata hold facts.
        parents: the ids that the facts must name; one that is None is not compared.
    """
    path = sources.concepts.path / NOTES / file
    if not path.is_file():
        return None
    try:
        table = read_signed_table(path, "Delete it; the explorer makes it again.")
    except CorruptError:
        return None
    facts = json.loads((table.schema.metadata or {}).get(key.encode(), b"{}"))
    known = all(wanted is None or facts.get(name) == wanted for name, wanted in parents.items())
    return table if known and table.num_rows == sources.n_latents else None


@dataclass(frozen=True)
class Recipe:
    """How some columns of the atlas are made.

    Attributes:
        title: what the page calls it, at the start of a sentence.
        read: the columns that were kept, [F] each; none if there are none that belong to this table.
        explain: why they cannot be made, "" if they can.
        find: the paths that `make` is called with.
        make: a function of a module of this room, which makes the columns and keeps them. Raises SettingsError.
    """

    title: str
    read: Callable[[Sources], Columns]
    explain: Callable[[Sources], str]
    find: Callable[[Sources], tuple[Path, ...]]
    make: Callable[..., Columns]


class Maker:
    """Makes what a recipe says, once, unless it is there.

    Attributes:
        state: what the page is told while the columns are not there.
    """

    def __init__(self, sources: Sources, recipe: Recipe) -> None:
        self.sources, self.recipe = sources, recipe
        self.state = f"{recipe.title} has not been made."
        self._made: Columns = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._waiter: threading.Thread | None = None

    @property
    def columns(self) -> Columns:
        """The columns, if they have been made."""
        if not self._made:
            self._made = self.recipe.read(self.sources)
        return self._made

    @property
    def running(self) -> bool:
        """Whether its process runs, or `state` does not say yet how it has ended."""
        return self._waiter is not None and self._waiter.is_alive()

    def start(self) -> None:
        """Begin, if something is to be made and can be."""
        if self._settle():
            return
        self.state = f"{self.recipe.title} is being made. This page shows it as soon as it is there."
        make, paths = self.recipe.make, [str(path.absolute()) for path in self.recipe.find(self.sources)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MAKE, make.__module__, make.__name__, *paths],
            stdin=subprocess.PIPE,  # it ends with this process, however that ends
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # Ctrl-C is for the server, which ends this process
        )
        self._waiter = threading.Thread(target=self._wait, args=(self._process,), daemon=True)
        self._waiter.start()

    def _settle(self) -> bool:
        """Whether there is nothing to do, because the columns are there or cannot be made."""
        if self.columns:
            return True
        reason = self.recipe.explain(self.sources)
        self.state = reason or self.state
        return bool(reason)

    def _wait(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stderr is not None
        with process:  # its pipes are closed when it has ended
            told = process.stderr.read()
            failed = process.wait()
        if failed:
            last = told.decode(errors="replace").strip().splitlines()[-1:] or ["it was stopped"]
            self.state = f"{self.recipe.title} could not be made: {last[0][:300]}"
        elif not self.columns:
            self.state = f"{self.recipe.title} was made, but could not be kept in {self.sources.concepts.path}."

    def make(self) -> None:
        """Make the columns now, unless they are there or cannot be made."""
        if self._settle():
            return
        try:
            self._made = self.recipe.make(*self.recipe.find(self.sources))
        except SettingsError as error:
            self.state = str(error)

    def stop(self) -> None:
        """End the process, if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()


_MAKE = f"""
import importlib, os, sys, threading, warnings
warnings.simplefilter("ignore")
os.nice({NICE})
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
from actcache import PipelineError
module, name, *paths = sys.argv[1:]
try:
    getattr(importlib.import_module(module), name)(*paths)
except PipelineError as error:
    sys.exit(str(error))
"""
