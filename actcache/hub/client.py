"""The hub's own client, with bounded waits and without its screen output, and its errors as one line of ours each.

The client asks again for a minute when there is no network, for each of the names that a file might have. Here the
server is asked once, and only for what is not in the cache.
"""

import contextlib
import errno
import socket
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors

from actcache.artifacts import describe_refusal
from actcache.errors import CorruptError, HubError, ModelError, PipelineError, SettingsError, StorageError
from actcache.hub.address import HubAddress

TIMEOUT_S = 10.0
"""Longest wait for an answer of the server, before a download begins and between two parts of it."""

_WAITS = ("connect", "read", "write", "pool")
_LOGIN = "run `hf auth login` or set HF_TOKEN"


# ---------------------------------------------------------------------------------------------------------------------
# Files of models


def fetch_file(repo: str, names: Sequence[str]) -> Path:
    """The first of these files that the repository has, from the cache or the hub.

    Raises:
        ModelError: the hub cannot be reached, or the repository does not exist or has none of the files.
    """
    for name in names:
        try:
            cached = huggingface_hub.try_to_load_from_cache(repo, name)
        except ValueError as error:  # not OWNER/NAME
            raise ModelError(f"hf-hub:{repo} is not the name of a repository: {_first_line(error)}.") from error
        if isinstance(cached, str):
            return Path(cached)
    for name in names:
        try:
            with limit_waits():
                huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repo, name), timeout=TIMEOUT_S)
                return Path(huggingface_hub.hf_hub_download(repo, name, etag_timeout=TIMEOUT_S))
        except errors.EntryNotFoundError:
            continue
        except Exception as error:  # network libraries raise many kinds of errors
            raise ModelError(
                f"{name} of hf-hub:{repo} is not in the cache of the Hugging Face hub and could not be downloaded: "
                f"{_first_line(error)}. Download the repository where there is a network, and name its folder."
            ) from error
    raise ModelError(f"hf-hub:{repo} has no {' or '.join(names)}. Give the repository of a model, or a folder.")


# ---------------------------------------------------------------------------------------------------------------------
# The client


@contextlib.contextmanager
def limit_waits(seconds: float | None = None) -> Iterator[None]:
    """Let no socket that is opened inside wait without end, and no call of the client: by default, TIMEOUT_S.

    Some calls of the client say that they wait for ever, so the limit is set on each request.
    """
    limit = seconds or TIMEOUT_S

    def bound(request: Any) -> None:
        asked = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {name: asked.get(name) or limit for name in _WAITS}

    session: Any = huggingface_hub.get_session()
    before, hooks = socket.getdefaulttimeout(), session.event_hooks
    socket.setdefaulttimeout(limit)
    session.event_hooks = {**hooks, "request": [*hooks["request"], bound]}
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
        session.event_hooks = hooks


@contextlib.contextmanager
def use_client(address: HubAddress, seconds: float | None = None) -> Iterator[None]:
    """Let calls of the client wait that long at most, log nothing, and raise errors of ours that name the address."""
    log: Any = huggingface_hub.utils.logging
    bars: Any = huggingface_hub.utils
    verbosity = log.get_verbosity()
    shown = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not bars.are_progress_bars_disabled()
    log.set_verbosity(log.CRITICAL)
    if shown:
        bars.disable_progress_bars()
    try:
        with limit_waits(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as that a table is not expected in a repository of models
            yield
    except PipelineError:
        raise
    except Exception as error:  # network libraries raise many kinds of errors
        raise translate(error, address) from error
    finally:
        log.set_verbosity(verbosity)
        if shown:
            bars.enable_progress_bars()


class Api(huggingface_hub.HfApi):
    """The client's API. It remembers why a branch was not resolved, which the client passes over for its cache.

    Attributes:
        unreachable: the error of the last call that asked the server for a commit; None if there was none.
    """

    unreachable: Exception | None = None

    def repo_info(self, *args: Any, **options: Any) -> Any:
        self.unreachable = None
        try:
            return super().repo_info(*args, **options)
        except Exception as error:
            self.unreachable = error
            raise


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def translate(error: BaseException, address: HubAddress) -> PipelineError:
    """An error of the client, of its network library or of the disk, as one line that says what to do."""
    for each in _chain(error):
        for describe in (_of_repository, _of_cache, _of_answer, _of_network, _of_disk):
            if (ours := describe(each, address)) is not None:
                return ours
    return HubError(f"{address}: the client of the Hugging Face hub failed: {_first_line(error)}. Try again.")


def _of_repository(error: BaseException, address: HubAddress) -> PipelineError | None:
    """What the server says of the repository. A gated one is the client's subclass of an absent one: it goes first."""
    where = HubAddress(address.repo, kind=address.kind)
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{where} is gated: its owner decides who may read it. Ask for access on "
            f"{constants.ENDPOINT}/{address.page}, then {_LOGIN}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"{where} does not exist, or it is private and you may not read it: the hub does not tell which. Check the "
            f"name; for a private repository, {_LOGIN}."
        )
    if isinstance(error, errors.DisabledRepoError):
        return HubError(f"{where} was disabled on the hub, and nobody can read it. Give another repository.")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{where} has no revision {address.revision}. Give a branch, a tag or a whole commit that "
            f"{constants.ENDPOINT}/{address.page} lists, after the folder: {where}/FOLDER@REVISION."
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return HubError(f"{address} has no such file. Check the name on {constants.ENDPOINT}/{address.page}.")
    if isinstance(error, errors.HFValidationError):
        return SettingsError(f"{address} is not an address that the hub accepts: {_first_line(error)}.")
    return None


def _of_cache(error: BaseException, address: HubAddress) -> PipelineError | None:
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(
            f"{address} is not in the cache, or only a part of it is, and HF_HUB_OFFLINE forbids to ask the hub. Unset "
            "it, or run the command once where there is a network: later ones use the cache."
        )
    return None


def _of_answer(error: BaseException, address: HubAddress) -> PipelineError | None:
    """An answer that is not the hub's, or that refuses for a reason that has nothing to do with the repository."""
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        what = {
            401: f"the token is not valid. To replace it, {_LOGIN}.",
            403: f"the token may not do this. Give one that may: {_LOGIN}.",
            **dict.fromkeys((409, 412), "another commit was made at the same time. Run the command again."),
            413: "it is too large for the hub. Publish less.",
            429: "too many requests. Wait some minutes, then run the command again.",
        }.get(status, "the hub has a problem. Try again later." if status >= 500 else f"{_first_line(error)}.")
        return HubError(f"{address}: {constants.ENDPOINT} answered with error {status}: {what}")
    if isinstance(error, errors.FileMetadataError) or _is(error, "JSONDecodeError"):
        return not_the_hub(address)
    if "Invalid metadata in README.md" in str(error):
        return SettingsError(f"{address}: the hub refuses the card. {' '.join(str(error).split())[:400]} Correct it.")
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return cut_off(address)
    return None


def _of_network(error: BaseException, address: HubAddress) -> PipelineError | None:
    if _is(error, "TimeoutException", "TimeoutError"):
        return HubError(
            f"{address}: {constants.ENDPOINT} did not answer in time. Try again later, or use what is in the cache "
            "with HF_HUB_OFFLINE=1."
        )
    if _is(error, "RemoteProtocolError", "ReadError", "TooManyRedirects"):
        return cut_off(address)
    if _is(error, "TransportError", "ConnectionError", "gaierror"):
        return HubError(
            f"{address} is not in the cache, and {constants.ENDPOINT} could not be reached: {_first_line(error)}. "
            "Check the network, or run the command once where there is one: later ones use the cache."
        )
    return None


def _of_disk(error: BaseException, address: HubAddress) -> PipelineError | None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(address)
    refusal = describe_refusal(error)
    return StorageError(f"{address}: {refusal}") if refusal else None


def not_the_hub(address: HubAddress) -> CorruptError:
    return CorruptError(
        f"{address}: what {constants.ENDPOINT} answered is not an answer of the Hugging Face hub, but perhaps the "
        "login page of a network or a proxy. Open that address in a browser, or correct HF_ENDPOINT."
    )


def cut_off(address: HubAddress) -> CorruptError:
    return CorruptError(
        f"{address}: the download was cut off before its end, and nothing of it is kept. Run the command again."
    )


def disk_full(address: HubAddress, needs: str = "") -> StorageError:
    return StorageError(
        f"{address} does not fit on the disk of the hub's cache, {constants.HF_HUB_CACHE}{needs}. Free space there, or "
        "set HF_HOME to a folder on another disk."
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it was raised from, the innermost last; the client wraps most of them."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is(error: BaseException, *names: str) -> bool:
    """Whether a class of the error has such a name: versions of the client use different network libraries."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200].rstrip(".")
