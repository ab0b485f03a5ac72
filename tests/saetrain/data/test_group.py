"""Several stores of one model are read, trained on and encoded as one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actcache import ActivationStore, HookPoint, ParentMismatchError, SettingsError, open_stores
from actcache.store import StoreGroup
from saetrain import ActivationLoader, CodeStore, Run, SAEConfig, TrainConfig, encode, split_images, train

MakeStore = Callable[..., Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, make_store: MakeStore) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return (
        make_store(folder / "a.acts", n_images=150, failed=(3, 149), rows_id="a"),
        make_store(folder / "b.acts", n_images=90, failed=(0,), rows_id="b", seed=9),
    )


def test_images_of_the_second_follow_those_of_the_first(pair: tuple[Path, Path]) -> None:
    group, (a, b) = open_stores(list(pair)), map(ActivationStore.open, pair)
    assert (group.n_images, group.n_tokens) == (240, a.n_tokens)
    np.testing.assert_array_equal(group.read(), np.concatenate([a.read(), b.read()]))
    assert sorted(group.failed) == [3, 149, 150]
    assert np.flatnonzero(~group.valid).tolist() == [3, 149, 150]
    assert group.images["store"].to_pylist() == [0] * 150 + [1] * 90
    np.testing.assert_allclose(group.statistics(None).sum, (a.statistics(None) + b.statistics(None)).sum, rtol=1e-12)
    assert [len(images) for images in group.shards()] == [64, 64, 22, 64, 26]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 239), max_size=40), st.sampled_from(["all", "patch", "cls"]))
def test_any_images_in_any_order_come_from_their_store(pair: tuple[Path, Path], images: list[int], tokens: str) -> None:
    group = open_stores(list(pair))
    whole = group.read(tokens=tokens)  # type: ignore[arg-type]
    np.testing.assert_array_equal(group.read(images=np.array(images, int), tokens=tokens), whole[images])  # type: ignore[arg-type]


@given(st.sets(st.integers(0, 239), min_size=1))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_never_span_stores_or_blocks(pair: tuple[Path, Path], images: set[int]) -> None:
    blocks = open_stores(list(pair)).blocks(np.array(sorted(images)))
    assert np.concatenate(blocks).tolist() == sorted(images)
    for block in blocks:
        assert len({(image >= 150, (image - 150 * (image >= 150)) // 16) for image in block.tolist()}) == 1


def test_each_store_gives_its_own_held_out_images(pair: tuple[Path, Path]) -> None:
    training, held_out = split_images([150, 90])
    assert sorted([*training, *held_out]) == list(range(240))
    assert held_out.tolist() == [*range(142, 150), *range(236, 240)]
    loader = ActivationLoader(list(pair), batch_size=64, pool_tokens=2000)
    batches = loader.batches()
    seen = {int(image) for _ in range(loader.steps_per_epoch) for image in next(batches).image}
    batches.close()
    assert seen <= set(training.tolist()) - {3, 150}
    assert len(seen) > 220


def test_a_run_of_two_stores_knows_both_and_encodes_both(pair: tuple[Path, Path], tmp_path: Path) -> None:
    config = TrainConfig(n_steps=20, batch_size=128)
    run = train(list(pair), tmp_path / "run", sae=SAEConfig(n_latents=64, k=3), config=config)
    assert set(run.artifact.parents) == {"store", "store 2"}
    both = encode(run, list(pair), tmp_path / "both.codes")
    each = [encode(run, store, tmp_path / f"{i}.codes") for i, store in enumerate(pair)]
    assert (both.n_images, both.n_shards) == (240, 5)
    parts = [(codes, shard) for codes in each for shard in range(codes.n_shards)]
    for shard, (codes, number) in enumerate(parts):
        mine, other = both.read_shard(shard), codes.read_shard(number)
        for name in ("indptr", "latent", "value", "latent_indptr", "latent_value"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(other, name))
        shift = mine.first_row - other.first_row
        np.testing.assert_array_equal(mine.row, other.row + shift)
    assert not both.valid[[3, 149, 150]].any()


def test_a_group_of_one_is_that_store(pair: tuple[Path, Path], tmp_path: Path) -> None:
    options = {"sae": SAEConfig(n_latents=32, k=2), "config": TrainConfig(n_steps=2, batch_size=32)}
    one: Run = train([pair[0]], tmp_path / "one", **options)  # type: ignore[arg-type]
    other: Run = train(pair[0], tmp_path / "other", **options)  # type: ignore[arg-type]
    assert one.run_id == other.run_id
    assert isinstance(encode(one, [pair[0]], tmp_path / "x.codes"), CodeStore)


def test_stores_that_do_not_belong_together_are_refused(tmp_path: Path, make_store: MakeStore) -> None:
    a = make_store(tmp_path / "a.acts", n_images=40, failed=())
    other_model = make_store(tmp_path / "m.acts", n_images=40, failed=(), model_id="other")
    other_dtype = make_store(tmp_path / "d.acts", n_images=40, failed=(), dtype="float32", rows_id="d")
    other_layer = make_store(tmp_path / "l.acts", n_images=40, failed=(), layers=(1,), rows_id="l")
    with pytest.raises(ParentMismatchError, match="same CLIP weights"):
        open_stores([a, other_model])
    with pytest.raises(ParentMismatchError, match="different storage dtypes"):
        open_stores([a, other_dtype])
    with pytest.raises(SettingsError, match=r"blocks\.0\.hook_resid_post is not in"):
        open_stores([a, other_layer]).hook_point(HookPoint(0))
    with pytest.raises(SettingsError, match="given twice"):
        open_stores([a, a])
    with pytest.raises(SettingsError, match="at least one"):
        StoreGroup([])
