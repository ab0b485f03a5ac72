"""How a chunk is stored: raw, or losslessly compressed by blosc (zstd over shuffled bytes).

`raw` is the default, because a raw chunk is read straight into memory. zstd saves 11-18 % and is faster on links below
about 1 GB/s. A block of 512 KiB gives the entropy coder enough exponent bytes at a time (with blosc's own block size
the gain is half as large); lz4 and bitshuffle save nothing on float16 activations (docs/decisions/0008).
"""

from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from actcache.errors import SettingsError

CODECS = ("raw", "zstd")
_LEVEL, _BLOCK_BYTES = 1, 512 * 1024


class _Blosc(Protocol):
    def encode(self, buf: NDArray[Any]) -> bytes: ...


def zarr_compressor(codec: str, itemsize: int) -> Any:
    """The `compressors` argument of zarr's create_array. None for raw."""
    import zarr.codecs

    check_codec(codec)
    if codec == "raw":
        return None
    return zarr.codecs.BloscCodec(
        cname=cast(Any, codec), clevel=_LEVEL, shuffle="shuffle", typesize=itemsize, blocksize=_BLOCK_BYTES
    )


def chunk_encoder(codec: str, itemsize: int) -> _Blosc | None:
    """The same codec for the writer's own shards. None for raw."""
    import numcodecs

    check_codec(codec)
    if codec == "raw":
        return None
    shuffle = numcodecs.Blosc.SHUFFLE
    blosc = numcodecs.Blosc(cname=codec, clevel=_LEVEL, shuffle=shuffle, blocksize=_BLOCK_BYTES, typesize=itemsize)
    return cast(_Blosc, blosc)


def check_codec(codec: str) -> None:
    if codec not in CODECS:
        raise SettingsError(f"Unknown codec {codec!r}. Known codecs: {', '.join(CODECS)}.")


def check_dtype(dtype: str) -> np.dtype[Any]:
    if dtype not in ("float16", "float32"):
        raise SettingsError(f"Activations are stored as float16 or float32, not {dtype!r}.")
    return np.dtype(dtype).newbyteorder("<")
