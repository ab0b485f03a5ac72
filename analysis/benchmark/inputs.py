"""describe_inputs(): what the files that a benchmark is given add to the identity of its result, by their content."""

import hashlib
from pathlib import Path

from actcache import SettingsError
from analysis.config import BenchmarkConfig


def describe_inputs(config: BenchmarkConfig) -> dict[str, object]:
    """The options that are given, each with what stands for it. A benchmark without any has the identity of before.

    Raises SettingsError for a file or folder that cannot be read.
    """
    found: dict[str, object] = {}
    if config.masks is not None:
        found["masks"] = _digest_folder(Path(config.masks))
    for name, path in (("legend", config.legend), ("pairs", config.pairs)):
        if path is not None:
            found[name] = _digest_file(Path(path), f"--{name}").hexdigest()[:16]
    return found


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
