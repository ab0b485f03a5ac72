"""What a benchmark is given beside runs and a store, in the identity of its result: files by content, stores by id."""

import hashlib
from pathlib import Path

from actcache import SettingsError, open_stores
from actcache.artifacts import Artifact, digest
from analysis.benchmark.visaebench.hierarchy import read_hierarchy
from analysis.config import BenchmarkConfig


def describe_inputs(config: BenchmarkConfig) -> dict[str, object]:
    """The options that are given, each with what stands for it. A benchmark without any has the identity of before.

    Raises SettingsError for a file or folder that cannot be read, or a hierarchy that is none.
    """
    found: dict[str, object] = {} if config.protocol is None else {"protocol": config.protocol}
    if config.hierarchy is not None:
        found["hierarchy"] = digest([list(group) for group in read_hierarchy(config.hierarchy)])
    if config.masks is not None:
        found["masks"] = _digest_folder(Path(config.masks))
    for name, path in (("legend", config.legend), ("pairs", config.pairs)):
        if path is not None:
            found[name] = _digest_file(Path(path), f"--{name}").hexdigest()[:16]
    return found


def name_given(config: BenchmarkConfig) -> dict[str, Artifact]:
    """The other stores that are given, for the parents of a result: transfer store, transfer store 2, ..."""
    named: dict[str, Artifact] = {}
    for name, path in (("transfer", config.transfer), ("embeddings", config.embeddings)):
        members = () if path is None else open_stores(path).stores
        named |= {f"{name} store {i}" if i > 1 else f"{name} store": each.artifact for i, each in enumerate(members, 1)}
    return named


def _digest_file(path: Path, flag: str) -> "hashlib._Hash":
    try:
        return hashlib.sha256(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}. Check {flag}.") from error


def _digest_folder(path: Path) -> str:
    """Of the masks of a folder, with their names."""
    if not path.is_dir():
        raise SettingsError(f"{path} is not a folder. Give the folder of the masks with --masks.")
    content = hashlib.sha256()
    for file in sorted(path.rglob("*.png")):
        content.update(file.relative_to(path).as_posix().encode(errors="surrogateescape"))
        content.update(_digest_file(file, "--masks").digest())
    return content.hexdigest()[:16]
