"""hf://OWNER/REPO[/folder][@revision]: how a repository of the Hugging Face hub, or a part of it, is named.

Needs no library and makes no call.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actcache.errors import SettingsError

MAIN = "main"
"""The branch that is meant where no revision is named."""

_SCHEME = re.compile(r"hf:/{1,2}(?=[^/])")
"""With one slash, too, because pathlib makes `hf:/` of it."""
_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
"""An owner or a repository: letters, digits, `_`, and inside also `-` and `.`, but not `--` or `..`."""
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._/+-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PREFIXES: dict[str, Literal["model", "dataset"]] = {"models": "model", "datasets": "dataset"}
_EXPECTED = "Expected hf://OWNER/REPO, hf://OWNER/REPO/FOLDER or either with @REVISION (a branch, tag or commit)"


@dataclass(frozen=True)
class HubAddress:
    """A repository, a folder or file in it, and a revision of it.

    Attributes:
        repo: OWNER/REPO.
        folder: the path of a folder or file in the repository, without slashes at its ends; empty for all of it.
        revision: a branch, a tag, or a commit of 40 hexadecimal digits.
        kind: some SAEs lie in a repository of data sets, which is named hf://datasets/OWNER/REPO.
    """

    repo: str
    folder: str = ""
    revision: str = MAIN
    kind: Literal["model", "dataset"] = "model"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, whose files never change."""
        return _COMMIT.fullmatch(self.revision) is not None

    @property
    def page(self) -> str:
        """The path of the repository's page below the hub's own address."""
        return f"datasets/{self.repo}" if self.kind == "dataset" else self.repo

    def __str__(self) -> str:
        revision = "" if self.revision == MAIN else f"@{self.revision}"
        return f"hf://{self.page}{'/' if self.folder else ''}{self.folder}{revision}"


def is_hub_address(text: str | Path) -> bool:
    """Whether a text or path is meant as an address, which may still be malformed."""
    return str(text).startswith("hf:/")


def parse_address(text: str | Path) -> HubAddress:
    """Read an address. Raises SettingsError.

    parse_address("hf://owner/repo/layer_11@v1") == HubAddress("owner/repo", "layer_11", "v1")
    """
    where = str(text)
    scheme = _SCHEME.match(where)
    if scheme is None:
        raise SettingsError(f"{where} is not an address of the Hugging Face hub. {_EXPECTED}.")
    where = f"hf://{where[scheme.end() :]}"
    owner, _, rest = where.removeprefix("hf://").partition("/")
    kind = _PREFIXES.get(owner, "model")
    if owner in _PREFIXES:
        owner, _, rest = rest.partition("/")
    path, at, revision = rest.rpartition("@")
    name, _, folder = (path if at else rest).partition("/")
    revision = revision if at else MAIN
    parts = (("owner", owner, _NAME), ("repository", name, _NAME), ("revision", revision, _REVISION))
    for what, value, pattern in parts:
        if not pattern.fullmatch(value):
            wrong = f"{value!r} is not the name of one" if value else "there is none"
            raise SettingsError(f"{where} names no {what} of the Hugging Face hub: {wrong}. {_EXPECTED}.")
    folder = folder.rstrip("/")
    if folder and not is_safe_name(folder):
        raise SettingsError(f"{where} does not name a folder inside the repository. {_EXPECTED}.")
    return HubAddress(f"{owner}/{name}", folder, revision, kind)


def is_safe_name(name: str) -> bool:
    """Whether a name of the hub's is a relative path that stays in its folder."""
    plain = "\\" not in name and len(name) <= 1000 and all(ord(sign) >= 32 and sign != "\x7f" for sign in name)
    return plain and all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in name.split("/"))
