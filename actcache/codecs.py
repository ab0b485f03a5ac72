"""How a chunk's bytes are made: raw, or losslessly compressed by blosc with bitshuffle.

`raw` is the default: float16 activations shrink by 7 % only, and a raw chunk is read straight into memory.
Compression pays on links below about 1 GB/s.
"""

from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from actcache.errors import SettingsError

CODECS = ("raw", "lz4", "zstd")


class _Blosc(Protocol):
    def encode(self, buf: NDArray[Any]) -> bytes: ...


def zarr_compressor(codec: str, itemsize: int) -> Any:
    """What zarr's create_array takes as `compressors`. None for raw."""
    import zarr.codecs

    check_codec(codec)
    if codec == "raw":
        return None
    return zarr.codecs.BloscCodec(cname=cast(Any, codec), clevel=1, shuffle="bitshuffle", typesize=itemsize)


def chunk_encoder(codec: str, itemsize: int) -> _Blosc | None:
    """The same codec for the writer's own shards. None for raw."""
    import numcodecs

    check_codec(codec)
    if codec == "raw":
        return None
    blosc = numcodecs.Blosc(cname=codec, clevel=1, shuffle=numcodecs.Blosc.BITSHUFFLE, typesize=itemsize)
    return cast(_Blosc, blosc)


def check_codec(codec: str) -> None:
    if codec not in CODECS:
        raise SettingsError(f"Unknown codec {codec!r}. Known codecs: {', '.join(CODECS)}.")


def check_dtype(dtype: str) -> np.dtype[Any]:
    if dtype not in ("float16", "float32"):
        raise SettingsError(f"Activations are stored as float16 or float32, not {dtype!r}.")
    return np.dtype(dtype).newbyteorder("<")
