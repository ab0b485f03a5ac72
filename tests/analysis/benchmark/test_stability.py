"""Measure 8: the matching is scipy's dense one, firing is counted as on dense codes, and equal runs are stable."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from actcache import open_stores
from analysis import StudyConfig
from analysis.benchmark.benchmarking import describe_subjects
from analysis.benchmark.judging import choose_judged
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.stability import Stability, find_partners
from analysis.benchmark.subject import Judged, Subject
from saetrain import SAE, Run, SAEConfig, TrainConfig, encode, train
from saetrain.interop import write_imported

N_LATENTS, K = 48, 4
NAMES = ("stability cosine", "stability share > 0.7", "stability above random", "stability jaccard")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory, middle_store: Path) -> list[Subject]:
    """Three runs that differ only in their seed."""
    folder, made = tmp_path_factory.mktemp("stability"), []
    for seed in range(3):
        config = TrainConfig(n_steps=40, batch_size=128, lr=3e-3, seed=seed)
        run = train(
            middle_store, folder / f"seed{seed}", layer=1, sae=SAEConfig(n_latents=N_LATENTS, k=K), config=config
        )
        made.append(Subject(f"seed{seed}", None, None, run, encode(run, middle_store, folder / f"{seed}.codes")))
    return made


@pytest.fixture(scope="module")
def judged(subjects: list[Subject], middle_store: Path) -> Judged:
    study = StudyConfig(on_seen="use")
    return choose_judged([each.run for each in subjects], open_stores(middle_store), study)[0]


def read_firing(subject: Subject, judged: Judged) -> np.ndarray:
    """[I, T, F] whether a latent fires, row by row."""
    codes = subject.codes
    dense = np.zeros((codes.n_images * codes.n_tokens, codes.n_latents), dtype=bool)
    for number in range(codes.n_shards):
        shard = codes.read_shard(number)
        dense[shard.row, np.repeat(np.arange(codes.n_latents), np.diff(shard.latent_indptr))] = True
    return dense.reshape(codes.n_images, codes.n_tokens, -1)[judged.images]


def plain_pair(a: Subject, b: Subject, judged: Judged, weights: np.ndarray) -> tuple[float, float, float]:
    """Mean matched cosine, share above 0.7 and mean Jaccard on images that count `weights` times."""
    firing = [read_firing(each, judged) for each in (a, b)]
    live = [np.flatnonzero(each.any((0, 1))) for each in firing]
    rows = [each.run.sae().decoder.detach().double().numpy()[own] for each, own in zip((a, b), live, strict=True)]
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in rows]
    cosine = np.maximum(unit[0] @ unit[1].T, 0)
    first, second = linear_sum_assignment(-cosine)
    jaccards = []
    for i, j in zip(first, second, strict=True):
        one, two = firing[0][..., live[0][i]], firing[1][..., live[1][j]]
        either = weights @ (one | two).sum(1)
        if cosine[i, j] > 0 and either:
            jaccards.append(weights @ (one & two).sum(1) / either)
    matched = cosine[first, second]
    size = min(map(len, live))
    return matched.sum() / size, (matched > 0.7).sum() / size, float(np.mean(jaccards))


def measure(subject: Subject, partners: list[Subject], judged: Judged) -> dict[str, Measured]:
    found = {each.name: each for each in Stability(judged).measure(subject, partners)}
    assert all(isinstance(each, Measured) for each in found.values())
    return found  # type: ignore[return-value]


def test_each_number_is_that_of_a_dense_computation(subjects: list[Subject], judged: Judged) -> None:
    first, *partners = subjects
    steps: list[tuple[int, int]] = []
    stability = Stability(judged)
    found = {each.name: each for each in stability.measure(first, partners, lambda *step: steps.append(step))}
    assert tuple(found) == NAMES
    once = np.ones(len(judged.images))
    plain = np.mean([plain_pair(first, other, judged, once) for other in partners], axis=0)
    for name, wanted in zip((NAMES[0], NAMES[1], NAMES[3]), plain, strict=True):
        each = found[name]
        assert isinstance(each, Measured)
        assert each.value == pytest.approx(wanted, abs=1e-5), name
    jaccard = found["stability jaccard"]
    assert isinstance(jaccard, Measured)
    assert jaccard.replicates is not None
    weights = judged.resamples.weights(0, len(judged.images))
    for number in (0, 11):
        again = [plain_pair(first, other, judged, weights[number])[2] for other in partners]
        assert jaccard.replicates[number] == pytest.approx(np.mean(again), abs=1e-9)
    assert steps[-1] == (2 * len(judged.images), 2 * len(judged.images))
    back = {each.name: each for each in stability.measure(partners[0], [first])}["stability cosine"]
    assert isinstance(back, Measured)
    assert back.value == pytest.approx(plain_pair(partners[0], first, judged, once)[0], abs=1e-5)
    assert len(stability.pairs) == 2  # the pair was not matched twice


def test_the_draw_of_random_directions_is_matched_in_the_same_way(subjects: list[Subject], judged: Judged) -> None:
    found = measure(subjects[0], subjects[1:2], judged)
    n, m = found["stability cosine"].details["n_latents"][0]  # type: ignore[index]
    rng = np.random.Generator(np.random.Philox(judged.seed))
    rows = [rng.standard_normal((size, subjects[0].run.d_model), dtype=np.float32) for size in (n, m)]
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in rows]
    cosine = np.maximum(unit[0] @ unit[1].T, 0)
    by_chance = cosine[linear_sum_assignment(-cosine)].sum() / min(n, m)
    value, above = found["stability cosine"].value, found["stability above random"].value
    assert value is not None
    assert found["stability cosine"].details["random"] == pytest.approx(by_chance, abs=1e-5)
    assert above == pytest.approx(value - by_chance, abs=1e-5)


def test_a_run_whose_latents_are_renumbered_is_wholly_stable(
    subjects: list[Subject], judged: Judged, middle_store: Path, tmp_path: Path
) -> None:
    first = subjects[0]
    sae, order = first.run.sae(), torch.randperm(N_LATENTS, generator=torch.Generator().manual_seed(1))
    permuted = SAE(sae.config, sae.d_model)
    state = {name: value[order] if name in ("encoder", "decoder", "b_enc") else value
             for name, value in sae.state_dict().items()}  # fmt: skip
    permuted.load_state_dict(state)
    run = write_imported(
        tmp_path / "run", permuted.requires_grad_(False), open_stores(middle_store), first.run.hook_point,
        format="permuted", tokens="all", provenance={"source": "permuted"},
    )  # fmt: skip
    twin = Subject("twin", None, None, run, encode(run, middle_store, tmp_path / "codes"))
    found = measure(first, [twin], judged)
    assert found["stability cosine"].value == pytest.approx(1, abs=1e-6)
    assert found["stability share > 0.7"].value == 1
    assert found["stability jaccard"].value == pytest.approx(1)
    assert found["stability jaccard"].replicates == pytest.approx(1)
    scrambled = replace(first, name="scrambled", run=subjects[1].run)  # other directions under the same codes
    other = measure(first, [scrambled], judged)
    assert other["stability cosine"].value < 0.9  # type: ignore[operator]
    assert other["stability jaccard"].value < 0.5  # type: ignore[operator]


def test_partners_differ_in_nothing_but_the_seed(subjects: list[Subject]) -> None:
    untrained = [replace(each, name=f"untrained {each.name}", baseline="untrained", of=each.name) for each in subjects]
    pca = replace(subjects[0], name="pca", baseline="pca")
    every = [*subjects, *untrained, pca]
    described = describe_subjects(every)
    assert find_partners(subjects[1], every, described) == [subjects[0], subjects[2]]
    assert find_partners(untrained[2], every, described) == untrained[:2]
    assert find_partners(pca, every, described) == []
    alone = [subjects[0], untrained[0], pca]
    for each in alone:
        said = find_partners(each, alone, describe_subjects(alone))
        assert isinstance(said, Skipped)
        assert "another --seed" in said.reason
        assert Stability.measure(None, each, said) == [said]  # type: ignore[arg-type]


def test_a_run_of_which_nothing_fires_has_no_partner(subjects: list[Subject], judged: Judged) -> None:
    codes = subjects[1].codes
    silent = type("Silent", (), {"n_latents": codes.n_latents, "n_tokens": codes.n_tokens,
                                 "read_rows": lambda self, rows: codes.read_rows(rows[:0])})()  # fmt: skip
    found = Stability(judged).measure(subjects[0], [replace(subjects[1], codes=silent)])
    assert [each.value for each in found if isinstance(each, Measured)] == [0, 0, 0]
    assert isinstance(found[3], Skipped)


def test_what_the_dictionaries_start_from_is_told(subjects: list[Subject], judged: Judged) -> None:
    details = measure(subjects[0], subjects[1:], judged)["stability cosine"].details
    assert details["initialization"] == "random"
    assert details["shared_initialization"] is False
    assert details["centered"] is True
    assert details["seeds"] == [0, 1, 2]
    assert "compares dictionaries" in str(details["no_interval"])
    assert Run.open(subjects[0].run.path).train_config.init == "random"
