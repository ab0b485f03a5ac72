"""S3 with bounded waits and errors of one line.

s3fs as it comes tries 5 times what botocore tries 5 times with 15 s each, so a silent server holds every call for more
than six minutes, and then botocore's exceptions, which are no OSErrors, pass through everything.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from actcache.errors import PipelineError, SettingsError, StorageError

BUCKETS = ("s3", "s3a")
"""Schemes whose URLs begin with a bucket."""

TRIES, CONNECT_S, READ_S = 3, 5, 15
"""How often a call is tried, and the seconds it waits for a connection and for an answer: 45 s of silence in all."""


def check_url(url: str) -> None:
    """Raise SettingsError unless a URL names a bucket, and a folder inside it."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme in BUCKETS and not (bucket and key.strip("/")):
        missing = "a folder in the bucket" if bucket else "a bucket"
        raise SettingsError(f"{url} does not name {missing}. Expected e.g. {scheme}://bucket/val.acts.")


@cache
def register_s3() -> None:
    """Make fsspec open S3 by a class that keeps these bounds. Raises ImportError where s3fs is not installed."""
    import fsspec
    import s3fs

    class BoundedS3(s3fs.S3FileSystem):  # type: ignore[misc]
        retries = TRIES
        connect_timeout, read_timeout = CONNECT_S, READ_S

        def __init__(self, *args: Any, config_kwargs: dict[str, object] | None = None, **options: Any) -> None:
            once = {"retries": {"max_attempts": 0}}  # s3fs tries again, so botocore need not
            super().__init__(*args, config_kwargs={**once, **(config_kwargs or {})}, **options)

        async def _call_s3(self, method: str, *args: Any, **options: Any) -> Any:
            with _one_line(options.get("Bucket"), options.get("Key", options.get("Prefix"))):
                return await super()._call_s3(method, *args, **options)

        async def _isfile(self, path: str) -> bool:
            """fsspec's own takes every error for a no, after which the next call waits as long again."""
            try:
                return bool((await self._info(path))["type"] == "file")
            except FileNotFoundError:
                return False

        async def _cat_file(self, path: str, *args: Any, **options: Any) -> Any:
            with _one_line(path):
                return await super()._cat_file(path, *args, **options)

        async def _get_file(self, path: str, *args: Any, **options: Any) -> Any:
            with _one_line(path):
                return await super()._get_file(path, *args, **options)

    for scheme in BUCKETS:
        fsspec.register_implementation(scheme, BoundedS3, clobber=True)


@contextmanager
def _one_line(*parts: str | None) -> Iterator[None]:
    """Turn what the network or the server did into a StorageError. What is not there stays a FileNotFoundError."""
    try:
        yield
    except (PipelineError, FileNotFoundError, FileExistsError, asyncio.CancelledError):
        raise
    except Exception as error:
        place = "/".join(part for part in parts if part)
        what = " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__
        raise StorageError(
            f"s3://{place} cannot be reached: {what}. Check the network, the address (AWS_ENDPOINT_URL) and the "
            "credentials, then run the same command again: it resumes."
        ) from error
