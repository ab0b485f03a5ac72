"""Co-firing equals the product of dense matrices, for chosen latents and over the sampled tokens."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_codes import write_codes
from typer.testing import CliRunner

import analysis.query.cofiring
import cli
from actcache import SettingsError
from analysis import co_fire, query_co_firing, sample_partners
from analysis.query.cofiring import sample_rows
from saetrain import CodeStore

Counts = NDArray[np.int64]


@pytest.fixture(scope="module")
def fires(table_codes: CodeStore, dense_values: Callable[[CodeStore], NDArray[np.float64]]) -> Counts:
    """[I * T, F]"""
    dense = dense_values(table_codes)
    return (dense > 0).reshape(-1, dense.shape[2]).astype(np.int64)


def jaccard_of(fires: Counts) -> NDArray[np.float64]:
    """[F, F]; -1 for a latent with itself."""
    both, count = fires.T @ fires, fires.sum(0)
    jaccard = both / np.maximum(count[:, None] + count - both, 1)
    np.fill_diagonal(jaccard, -1)
    return np.asarray(jaccard)


def test_counts_of_chosen_latents_are_the_product(table_codes: CodeStore, fires: Counts) -> None:
    latents = [*np.argsort(-fires.sum(0))[:4].tolist(), int(fires.sum(0).argmin())]
    counted = co_fire(table_codes, latents)
    np.testing.assert_array_equal(counted.both, (fires.T @ fires)[latents])
    np.testing.assert_array_equal(counted.n_fired, fires.sum(0))
    expected = jaccard_of(fires)[latents]
    others = expected >= 0
    np.testing.assert_allclose(counted.jaccard()[others], expected[others], rtol=1e-12)


def test_the_answer_is_sorted_by_jaccard(table_codes: CodeStore, fires: Counts) -> None:
    both, jaccard = fires.T @ fires, jaccard_of(fires)
    for latent in np.argsort(-fires.sum(0))[[2, 10, 20]].tolist():
        top = query_co_firing(table_codes, latent, n_top=5)
        np.testing.assert_allclose(top["jaccard"], np.sort(jaccard[latent])[::-1][: len(top)], rtol=1e-12)
        assert top["n_tokens"].to_pylist() == both[latent, np.asarray(top["latent"])].tolist()
        np.testing.assert_allclose(top["share"], np.asarray(top["n_tokens"]) / fires.sum(0)[latent], rtol=1e-12)


def test_each_latent_is_counted_once_per_shard(table_codes: CodeStore) -> None:
    """Two latents read as much as each of them alone, but the counts of all latents are read only once."""

    def read(latents: list[int]) -> int:
        codes = CodeStore.open(table_codes.path)
        co_fire(codes, latents)
        return codes.bytes_read

    counts = table_codes.n_shards * (table_codes.n_latents + 1) * 8
    assert read([3, 5]) == read([3]) + read([5]) - counts


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from(["all", "patch", "cls"]), st.integers(1, 90), st.booleans())
def test_partners_are_the_highest_of_the_dense_product_over_the_sampled_tokens(
    tmp_path_factory: pytest.TempPathFactory, seed: int, tokens: str, n_sample: int, small: bool
) -> None:
    rng = np.random.default_rng(seed)
    dense = np.where(rng.random((9, 7, 11)) < rng.choice([0, 0.1, 0.9], 11), 0.5, 0).astype(np.float16)
    dense[4] = 0  # could not be read
    dense[:, {"all": slice(0, 0), "patch": slice(0, 1), "cls": slice(1, None)}[tokens]] = 0
    codes = write_codes(tmp_path_factory.mktemp("c") / "x.codes", dense, [3, 4, 2], tokens=tokens, failed=[4])
    rows = sample_rows(codes, n_sample, 7)
    n_all = 8 * {"all": 7, "patch": 6, "cls": 1}[tokens]
    assert len(rows) == len(set(rows.tolist())) == min(n_sample, n_all)
    assert 4 not in rows // 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis.query.cofiring, "TASK_PAIRS", 5 if small else 1 << 20)  # many tasks, and many slices
        counted = sample_partners(codes, n_tokens=n_sample, seed=7, n_partners=3)
    fires = (dense.reshape(-1, 11)[rows] > 0).astype(np.int64)
    both, jaccard = fires.T @ fires, jaccard_of(fires)
    expected = []
    for latent in range(11):
        order = [other for other in np.lexsort((np.arange(11), -jaccard[latent])) if jaccard[latent, other] > 0][:3]
        for rank, other in enumerate(order):
            share = both[latent, other] / fires[:, latent].sum()
            expected.append((latent, rank, other, both[latent, other], share, jaccard[latent, other], len(rows)))
    assert [tuple(row.values()) for row in counted.to_pylist()] == expected


def test_a_sample_depends_on_its_seed_and_not_on_the_shards(tmp_path: Path) -> None:
    dense = np.ones((12, 3, 2), np.float16)
    one, many = (write_codes(tmp_path / f"{len(cut)}.codes", dense, cut) for cut in ([12], [5, 4, 3]))
    np.testing.assert_array_equal(sample_rows(one, 10, 3), sample_rows(many, 10, 3))
    assert not np.array_equal(sample_rows(one, 10, 3), sample_rows(one, 10, 4))


def test_all_latents_from_the_command_line(tmp_path: Path, tiny_codes: Path) -> None:
    out = tmp_path / "partners.parquet"
    done = CliRunner().invoke(cli.app, ["--json", "query", str(tiny_codes), "--show", "co-firing", "--sample", "300",
                                        "--seed", "1", "--n-top", "2", "--out", str(out)])  # fmt: skip
    assert done.exit_code == 0, done.output
    table = pq.read_table(out)
    assert json.loads(done.stdout)["rows"] == table.to_pylist()
    assert set(table["n_sampled"].to_pylist()) == {300}
    pairs = list(zip(table["latent"].to_pylist(), table["partner"].to_pylist(), strict=True))
    assert all(latent < partner for latent, partner in pairs)
    assert len(set(pairs)) == len(pairs)
    every = sample_partners(CodeStore.open(tiny_codes), n_tokens=300, seed=1, n_partners=2).to_pylist()
    assert set(pairs) == {tuple(sorted((row["latent"], row["partner"]))) for row in every}
    shares = {(row["latent"], row["partner"]): row["share"] for row in every}
    for row in table.to_pylist():  # either direction is what the sample says of it
        for latent, partner, share in (("latent", "partner", "share"), ("partner", "latent", "partner_share")):
            known = shares.get((row[latent], row[partner]))
            assert known is None or row[share] == pytest.approx(known, rel=1e-12)
    assert table["jaccard"].to_pylist() == sorted(table["jaccard"].to_pylist(), reverse=True)
    wrong = CliRunner().invoke(cli.app, ["query", str(tiny_codes), "--show", "patches", "--sample", "300"])
    assert wrong.exit_code == 2


def test_wrong_questions_are_refused(table_codes: CodeStore) -> None:
    for latents in ([64], [3, -1], []):
        with pytest.raises(SettingsError, match=r"0\.\.63"):
            co_fire(table_codes, latents)
    with pytest.raises(SettingsError, match="at least 1"):
        sample_partners(table_codes, n_tokens=0)
