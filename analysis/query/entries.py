"""All entries of codes, joined with the image table, as a dask dataframe, for questions that no query here answers.

In: codes. Out: a lazy dataframe with one partition per shard and one row per entry: latent, image, token, value, and
columns of images.parquet. `read_entries` returns a partition as a pyarrow table. The dataframe needs pandas
(`pip install 'patchsae[dataframe]'`).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from actcache import SettingsError
from analysis.query.where import choose_images, image_rows
from analysis.reduce import open_codes
from saetrain import CodeStore


def open_entries(codes: CodeStore, *, columns: Sequence[str] = ("label_name",), where: str | None = None) -> Any:
    """A `dask.dataframe.DataFrame` of the entries; nothing is read until it is computed.

    open_entries(codes).groupby("label_name", observed=True)["value"].mean().compute()

    Args:
        columns: columns of images.parquet. Text becomes a categorical with the same categories in all partitions.
        where: only the entries of these images are read.

    Raises:
        SettingsError: there is no such column or image, or pandas is not installed.
    """
    _check_columns(codes, columns)
    choose_images(codes, where)
    try:
        import dask.dataframe as dd
    except ImportError as error:
        raise SettingsError(
            "A dataframe needs pandas, which is not installed: pip install 'patchsae[dataframe]'."
        ) from error
    read = partial(_read_frame, path=str(codes.path.absolute()), codes_id=codes.codes_id, joined=tuple(columns),
                   where=where)  # fmt: skip
    empty = _join_images(codes, np.empty(0, np.int64), columns)
    return dd.from_map(read, range(codes.n_shards), meta=empty.to_pandas(), label="entries")


def read_entries(
    codes: CodeStore, shard: int, *, columns: Sequence[str] = ("label_name",), where: str | None = None
) -> pa.Table:
    """The entries of one shard: latent uint32, image int64, token int32, value float32, and columns of images.parquet.

    The arguments and errors are those of `open_entries`.
    """
    _check_columns(codes, columns)
    chosen = choose_images(codes, where)
    images = np.array(codes.shard_range(shard))
    return _join_images(codes, image_rows(codes, images[chosen[images]]), columns)


def _join_images(codes: CodeStore, rows: Any, columns: Sequence[str]) -> pa.Table:
    entries = codes.read_rows(rows)
    image, token = np.divmod(entries.row, codes.n_tokens)
    table = {
        "latent": entries.latent.astype(np.uint32),
        "image": image,
        "token": token.astype(np.int32),
        "value": entries.value.astype(np.float32),
    }
    for name in columns:
        column = codes.images[name].combine_chunks()
        if pa.types.is_string(column.type):
            column = column.dictionary_encode()
        table[name] = column.take(pa.array(image))
    return pa.table(table)


def _read_frame(shard: int, *, path: str, codes_id: str, joined: Sequence[str], where: str | None) -> Any:
    """The keyword is not called `columns`: dask would pass its own and ask for fewer columns where fewer are used."""
    return read_entries(open_codes(path, codes_id), shard, columns=joined, where=where).to_pandas()


def _check_columns(codes: CodeStore, columns: Sequence[str]) -> None:
    own = ("latent", "image", "token", "value")
    missing = [name for name in columns if name not in codes.images.column_names or name in own]
    if missing:
        raise SettingsError(f"There is no column {missing[0]!r}. Columns: {', '.join(codes.images.column_names)}.")
