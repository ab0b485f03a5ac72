"""Entries as a dask dataframe: one partition per shard, joined with the image table, read when computed."""

from collections.abc import Callable
from functools import partial

import dask
import numpy as np
import pytest
from numpy.typing import NDArray

from actcache import SettingsError
from analysis import map_shards, open_entries, read_entries
from saetrain import CodeStore


def test_every_entry_is_there_with_its_image(
    table_codes: CodeStore, dense_values: Callable[[CodeStore], NDArray[np.float64]]
) -> None:
    dense = dense_values(table_codes)
    frame = open_entries(table_codes, columns=["domain", "weight", "label_name"])
    assert frame.npartitions == table_codes.n_shards
    computed = frame.compute()
    assert len(computed) == (dense > 0).sum() == table_codes.n_entries
    np.testing.assert_allclose(computed["value"], dense[computed["image"], computed["token"], computed["latent"]])
    for name in ("domain", "weight", "label_name"):
        column = np.array(table_codes.images[name].to_pylist())
        assert (computed[name].to_numpy() == column[computed["image"]]).all()


def test_a_user_can_compute_what_no_query_answers(
    table_codes: CodeStore, dense_values: Callable[[CodeStore], NDArray[np.float64]]
) -> None:
    dense = dense_values(table_codes)
    frame = open_entries(table_codes, columns=["domain"], where="weight > 0.5")
    mean = frame.groupby("domain", observed=True)["value"].mean().compute()
    chosen = np.array(table_codes.images["weight"].to_pylist()) > 0.5
    domain = np.array(table_codes.images["domain"].to_pylist())
    for name in ("photo", "sketch"):
        values = dense[chosen & (domain == name)]
        assert mean[name] == pytest.approx(values[values > 0].mean(), rel=1e-5)


def test_arrow_tables_hold_the_same_without_pandas(table_codes: CodeStore) -> None:
    tables = dask.compute(*map_shards(table_codes, partial(read_entries, columns=["weight"])))
    assert [table.num_rows for table in tables] == [
        len(table_codes.read_shard(i).value) for i in range(table_codes.n_shards)
    ]
    assert tables[0].column_names == ["latent", "image", "token", "value", "weight"]


def test_wrong_columns_and_selections_are_refused_at_once(table_codes: CodeStore) -> None:
    with pytest.raises(SettingsError, match=r"no column 'colour'.*domain"):
        open_entries(table_codes, columns=["colour"])
    with pytest.raises(SettingsError, match="none of the"):
        open_entries(table_codes, where="weight > 3")
