"""find_seen() against an oracle that knows which bytes a run was trained on: other seeds, limits, filters, copies under
other names, sources, orders and subsets, several stores, and stores and runs that an earlier version wrote."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from earlier_version import forget_hashes, forget_learned

from actcache import ActivationStore, SettingsError, extract, open_stores
from saetrain import CodeStore, Run, SAEConfig, TrainConfig, convert, encode, train
from saetrain.lineage import find_seen

SMALL: dict[str, Any] = {"layers": [2], "shard_images": 16, "precision": "float32"}
SAE = SAEConfig(n_latents=32, k=2)
WHERE = "label_name != 'class1'"


class World:
    """Stores over two folders of images, and runs trained on them."""

    def __init__(self, folder: Path, model: dict[str, str], make_images: Callable[..., Path]) -> None:
        self.folder, self.model, self.make_images = folder, model, make_images
        self.images = make_images(folder / "images", 60, seed=0)
        self.others = make_images(folder / "others", 40, seed=1)  # other pictures under names of the first folder
        self.files: dict[str, bytes] = {}

    def store(self, name: str, images: Path, **options: Any) -> ActivationStore:
        path = self.folder / f"{name}.acts"
        return extract(images, path, **self.model, **SMALL, **options)

    def run(self, name: str, stores: list[ActivationStore], where: str | None = None) -> Run:
        config = TrainConfig(n_steps=2, batch_size=32, where=where)
        return train(stores, self.folder / name, sae=SAE, config=config, device="cpu")

    def mixed(self) -> Path:
        """Half of the images under new names and in other classes, and some of the others."""
        target = self.folder / "mixed"
        for i, file in enumerate([*sorted(self.images.rglob("*.png"))[::2], *sorted(self.others.rglob("*.png"))[:10]]):
            new = target / f"class{i % 2}" / f"x{i * 37 % 101:03d}.png"
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, new)
        return target


def copy_alone(artifact: Path, target: Path) -> Path:
    """A copy as it arrives on another machine, which knows no places of this one."""
    copy = Path(shutil.copytree(artifact, target))
    (copy / "places.json").unlink(missing_ok=True)
    return copy


def bytes_of(store: ActivationStore) -> list[bytes]:
    """The file of every image in stored order."""
    source = store.artifact.parent_path("images")
    return [(source / uri).read_bytes() for uri in store.images["uri"].to_pylist()]


def trained_on(stores: list[ActivationStore], where: str | None = None) -> set[bytes]:
    """By the definition in the format page: all but the last 5 % of each store, and of those what the filter keeps."""
    learned = set()
    for store in stores:
        n = store.n_images - min(store.n_images - 1, max(1, round(0.05 * store.n_images)))
        names = store.images["label_name"].to_pylist()
        learned |= {
            data for i, data in enumerate(bytes_of(store)[:n]) if where is None or names[i] != "class1"
        }  # fmt: skip
    return learned


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: dict[str, str], make_images: Callable[..., Path]
) -> World:
    return World(tmp_path_factory.mktemp("world"), tiny_model, make_images)


@pytest.fixture(scope="module")
def stores(world: World) -> dict[str, ActivationStore]:
    copy = Path(shutil.copytree(world.images, world.folder / "elsewhere" / "copy"))
    made = {
        "first": world.store("first", world.images),
        "seed": world.store("seed", world.images, seed=3),
        "limit": world.store("limit", world.images, limit=25, seed=4),
        "prefix": world.store("prefix", world.images, limit=25),
        "copy": world.store("copy", copy, seed=5),
        "mixed": world.store("mixed", world.mixed()),
        "others": world.store("others", world.others),
    }
    shutil.copytree(made["seed"].path, world.folder / "old-seed.acts")
    made["old-seed"] = ActivationStore.open(forget_hashes(world.folder / "old-seed.acts"))
    return made


@pytest.fixture(scope="module")
def runs(world: World, stores: dict[str, ActivationStore]) -> dict[str, tuple[Run, set[bytes]]]:
    """A run, and the bytes that it was trained on."""
    wanted = {
        "plain": ([stores["first"]], None),
        "where": ([stores["first"]], WHERE),
        "several": ([stores["limit"], stores["others"]], None),
    }
    made = {name: (world.run(name, *how), trained_on(*how)) for name, how in wanted.items()}
    moved = copy_alone(world.folder / "plain", world.folder / "far" / "away" / "plain")
    made["moved"] = Run.open(moved), made["plain"][1]  # its stores are not where it says
    unaware = Path(shutil.copytree(world.folder / "plain", world.folder / "unaware"))
    made["unaware"] = Run.open(forget_learned(unaware, "learned.bin")), made["plain"][1]
    return made


@pytest.mark.parametrize("run", ["plain", "where", "several", "moved", "unaware"])
@pytest.mark.parametrize("store", ["first", "seed", "limit", "prefix", "copy", "mixed", "others", "old-seed"])
def test_the_images_a_run_was_trained_on_are_known_wherever_they_come_from(
    stores: dict[str, ActivationStore], runs: dict[str, tuple[Run, set[bytes]]], run: str, store: str
) -> None:
    trained, learned = runs[run]
    found = find_seen(open_stores(stores[store]), [trained])
    if (run, store) == ("moved", "old-seed"):  # it knows hashes, the store names: nobody can tell
        assert found.known_by == "unknown"
        return
    if (run, store) == ("several", "old-seed"):  # by name, of which two folders share some
        names = {uri for name in ("limit", "others") for uri in _trained_names(stores[name])}
        wanted = [uri in names for uri in stores[store].images["uri"].to_pylist()]
    else:
        wanted = [data in learned for data in bytes_of(stores[store])]
    assert found.images.tolist() == wanted
    assert found.known_by == ("uri" if store == "old-seed" else "content")
    assert found.by == (f"run {trained.path.name}",)


def _trained_names(store: ActivationStore) -> list[str]:
    n = store.n_images - max(1, round(0.05 * store.n_images))
    return list(store.images["uri"].to_pylist()[:n])


@pytest.mark.parametrize("seed", range(3))
def test_several_runs_on_several_stores_add_up(
    stores: dict[str, ActivationStore], runs: dict[str, tuple[Run, set[bytes]]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    chosen = [str(name) for name in rng.permutation(["seed", "limit", "copy", "mixed", "others"])[:3]]
    several = [str(name) for name in rng.permutation(["plain", "where", "several", "moved"])[:2]]
    found = find_seen(open_stores([stores[name] for name in chosen]), [runs[name][0] for name in several])
    learned = set().union(*(runs[name][1] for name in several))
    wanted = [data in learned for name in chosen for data in bytes_of(stores[name])]
    if "several" in several:  # stores that it was trained on count by position, too: they hold what was left out
        start = 0
        for name in chosen:
            n = stores[name].n_images
            if name in ("limit", "others"):
                trained = n - max(1, round(0.05 * n))
                wanted[start : start + trained] = [True] * trained
            start += n
    assert found.images.tolist() == wanted


def test_a_run_of_which_nothing_is_known_says_so(
    world: World, stores: dict[str, ActivationStore], runs: dict[str, tuple[Run, set[bytes]]]
) -> None:
    lost = copy_alone(world.folder / "unaware", world.folder / "very" / "far" / "lost")
    found = find_seen(open_stores(stores["copy"]), [Run.open(lost)])
    assert (found.known_by, found.images.any()) == ("unknown", False)
    own = find_seen(open_stores(stores["first"]), [Run.open(lost)])  # its own store is known by its id
    assert own.images.tolist() == [True] * 57 + [False] * 3
    convert(world.folder / "plain", world.folder / "lens", to="saelens", store=stores["first"])
    back = convert(world.folder / "lens", world.folder / "back", store=stores["first"]).path
    assert not find_seen(open_stores(stores["first"]), [Run.open(back)]).images.any()


def test_codes_keep_the_answer(world: World, stores: dict[str, ActivationStore], runs: Any, tmp_path: Path) -> None:
    for name in ("seed", "mixed"):
        made = encode(runs["plain"][0], stores[name], tmp_path / f"{name}.codes")
        wanted = find_seen(open_stores(stores[name]), [runs["plain"][0]]).images
        far = CodeStore.open(shutil.copytree(made.path, tmp_path / "far" / "away" / f"{name}.codes"))
        assert far.seen is not None
        assert far.seen.tolist() == wanted.tolist()
        assert far.images.equals(stores[name].images)
        earlier = CodeStore.open(forget_learned(far.path, "seen.bin", "content.bin"))
        assert earlier.seen is None
        assert earlier.images.column_names == stores["old-seed"].images.column_names
    both = encode(runs["plain"][0], [stores["first"], stores["old-seed"]], tmp_path / "both.codes")
    assert both.images["content_hash"].null_count == 60


def test_held_out_images_that_are_also_trained_on_are_not_measured(
    world: World, stores: dict[str, ActivationStore]
) -> None:
    both = [stores["first"], stores["others"], stores["mixed"]]
    run = world.run("copies", both)
    learned = trained_on(both)
    held_out = [data for store in both for data in bytes_of(store)[len(_trained_names(store)) :]]
    copies = sum(data in learned for data in held_out)
    assert 0 < copies < len(held_out)
    assert run.quality["left_out"] == copies
    assert run.quality["n_tokens"] == 10 * (len(held_out) - copies)
    assert "left_out" not in world.run("plain", [stores["first"]]).quality
    again = world.store("again", world.images, seed=11)
    everything = {*trained_on([again, stores["first"]])}
    if all(data in everything for store in (again, stores["first"]) for data in bytes_of(store)[57:]):
        with pytest.raises(SettingsError, match=r"held-out images .* also trained on"):
            world.run("twice", [again, stores["first"]])
