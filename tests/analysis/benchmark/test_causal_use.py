"""Measure 10: areas and shifts are those of plain forward passes with hooks; a planted latent steers, others do not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actcache import open_stores
from analysis import ModelOptions, StudyConfig, benchmark_runs
from analysis.benchmark.causal_use import GRID, describe_causes, measure_areas, measure_causal_use
from analysis.benchmark.causes import STRENGTH, Causes, ChosenLatents, choose_latents, open_causes, steer
from analysis.benchmark.judging import choose_judged
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.subject import Judged, Subject
from analysis.benchmark.task import Task, open_task, study_of
from saetrain import SAE, Run, SAEConfig
from saetrain.interop import write_imported

CPU, PROBED = ModelOptions(device="cpu"), StudyConfig(on_seen="use", judge="probe")
LAYER = 1
NAMES = ("deletion area", "deletion below random", "insertion area", "insertion above random", "steering",
         "steering above random", "steering above diffmean")  # fmt: skip


@pytest.fixture(scope="module")
def judged(middle_run: Path, middle_store: Path) -> Judged:
    return choose_judged([Run.open(middle_run)], open_stores(middle_store), PROBED)[0]


@pytest.fixture(scope="module")
def causes(middle_run: Path, judged: Judged) -> Causes:
    run = Run.open(middle_run)
    task = open_task(judged, run, PROBED, CPU)
    assert isinstance(task, Task)
    found = open_causes(task, judged, run)
    assert isinstance(found, Causes)
    return found


@pytest.fixture(scope="module")
def lists(middle_run: Path, causes: Causes) -> ChosenLatents:
    found = choose_latents(study_of(causes.task, Run.open(middle_run)), causes, max(GRID))
    assert isinstance(found, ChosenLatents)
    return found


@pytest.fixture(scope="module")
def plain_p(plain_clip: Any, tiny_images: Path, causes: Causes) -> Callable[..., np.ndarray]:
    """plain_p(images, edit) -> [B, C] of whole passes of open_clip's model; edit replaces the output of a block."""
    import open_clip
    from PIL import Image

    transform = open_clip.image_transform(24, is_train=False)
    visual, probe = plain_clip.visual, causes.task.classifier.judge
    uris = causes.task.classifier.store.images["uri"].to_pylist()

    def read(images: np.ndarray, edit: Callable[..., Any] = lambda x: x) -> np.ndarray:
        pixels = torch.stack([transform(Image.open(tiny_images / uris[image]).convert("RGB")) for image in images])
        last: list[torch.Tensor] = []
        blocks = visual.transformer.resblocks
        hooks = [blocks[LAYER].register_forward_hook(lambda module, args, out: edit(out)),
                 blocks[-1].register_forward_hook(lambda module, args, out: last.append(out))]  # fmt: skip
        try:
            with torch.no_grad():
                visual(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        normed = visual.ln_post(last[0])
        features = torch.cat([normed[:, 0], normed[:, 1:].mean(1)], dim=1)
        logits = ((features - probe.mean) / probe.deviation) @ probe.weight.T + probe.bias
        return np.asarray(logits.double().softmax(1))

    return read


def test_images_and_classes_are_the_judges(causes: Causes, judged: Judged, plain_p: Callable[..., np.ndarray]) -> None:
    assert set(causes.choosing.tolist()).isdisjoint(judged.images.tolist())
    assert set(causes.steered.tolist()) <= set(causes.images.tolist()) <= set(judged.images.tolist())
    np.testing.assert_array_equal(plain_p(causes.images).argmax(1), causes.classes[causes.targets])
    names = np.array(judged.store.images["label_name"].to_pylist())
    classes = np.array(causes.task.classifier.names)[causes.classes]
    np.testing.assert_array_equal(names[causes.choosing], classes[causes.labels])
    np.testing.assert_array_equal(names[causes.steered], classes[causes.own])
    x = judged.store.read(LAYER, images=causes.choosing).astype(np.float64).mean(1)
    means = np.stack([x[causes.labels == c].mean(0) for c in range(len(classes))])
    others = [np.delete(means, c, axis=0).mean(0) for c in range(len(classes))]
    np.testing.assert_allclose(causes.diff_mean.numpy(), means - others, atol=1e-5)


def test_latents_are_ranked_by_attribution_on_choosing_images(
    causes: Causes, lists: ChosenLatents, judged: Judged, plain_sae: Any, plain_clip: Any
) -> None:
    x = torch.from_numpy(judged.store.read(LAYER, images=causes.choosing)).float().requires_grad_()
    visual, probe = plain_clip.visual, causes.task.classifier.judge
    normed = visual.ln_post(visual.transformer.resblocks[2](x))
    features = torch.cat([normed[:, 0], normed[:, 1:].mean(1)], dim=1)
    logits = ((features - probe.mean) / probe.deviation) @ probe.weight.T + probe.bias
    y = logits[torch.arange(len(x)), torch.from_numpy(causes.classes[causes.labels])].sum()
    (gradient,) = torch.autograd.grad(y, x)
    z = plain_sae.encode(x.detach())
    effect = (z * (gradient.double() @ plain_sae.w["decoder"].T) / plain_sae.w["scale"]).sum(1).numpy()
    frequency = (z > 0).sum((0, 1)).numpy()
    np.testing.assert_array_equal(lists.frequency, frequency)
    for c in range(len(causes.classes)):
        table = effect[causes.labels == c].sum(0)
        order = np.argsort(-table)[: lists.chosen.shape[1]]
        wanted = np.where(table[order] > 0, order, -1)
        np.testing.assert_allclose(table[lists.chosen[c][lists.chosen[c] >= 0]], table[wanted[wanted >= 0]], rtol=1e-3)
        chosen, random = (each[each >= 0] for each in (lists.chosen[c], lists.random[c]))
        assert len(chosen) == len(random) == len(set(random.tolist()))
        assert not set(chosen.tolist()) & set(random.tolist())
        assert (frequency[random] > 0).all()


def test_areas_are_those_of_whole_passes_with_hooks(
    causes: Causes, lists: ChosenLatents, middle_run: Path, plain_sae: Any, plain_p: Callable[..., np.ndarray]
) -> None:
    steps: list[tuple[int, int]] = []
    study = study_of(causes.task, Run.open(middle_run))
    found = measure_areas(study, causes, lists, lambda *step: steps.append(step))
    assert steps[-1] == (len(causes.images),) * 2
    x = np.log1p([0, *GRID])
    number, w = causes.classes[causes.targets], plain_sae.w
    for which, of in enumerate((lists.chosen, lists.random)):
        curves = np.empty((2, len(GRID) + 1, len(causes.images)))
        for i, n in enumerate((0, *GRID)):
            table = np.zeros((len(causes.images), 1, len(lists.frequency)))
            for place, target in enumerate(causes.targets):
                table[place, 0, [latent for latent in of[target, :n] if latent >= 0]] = 1

            def delete(stream: Any, table: Any = torch.from_numpy(table)) -> Any:
                return (stream - (plain_sae.encode(stream) * table) @ w["decoder"] / w["scale"]).float()

            def insert(stream: Any, table: Any = torch.from_numpy(table)) -> Any:
                return plain_sae.decode(plain_sae.encode(stream) * table).float()

            for mode, edit in enumerate((delete, insert)):
                curves[mode, i] = plain_p(causes.images, edit)[np.arange(len(number)), number]
        areas = np.trapezoid(curves, x, axis=1) / x[-1]
        np.testing.assert_allclose(found[:, :, which], areas.T, atol=1e-5)


def test_steering_is_that_of_whole_passes_with_hooks(
    causes: Causes, lists: ChosenLatents, middle_run: Path, plain_sae: Any, plain_p: Callable[..., np.ndarray]
) -> None:
    rows = Run.open(middle_run).sae().decoder.detach()[torch.from_numpy(lists.chosen[:, 0])]
    before = plain_p(causes.steered)
    for directions, found in ((rows, steer(causes, rows)), (causes.diff_mean, causes.by_diff_mean)):
        for c, number in enumerate(causes.classes.tolist()):
            length = STRENGTH * float(causes.diff_mean[c].norm())
            move = directions[c] / directions[c].norm() * length
            after = plain_p(causes.steered, lambda stream, move=move: stream + move)
            wanted = np.where(causes.own == c, np.nan, (after - before)[:, number])
            np.testing.assert_allclose(found[:, c], wanted, atol=1e-5)
    assert not steer(causes, torch.zeros_like(rows))[~np.isnan(causes.by_diff_mean)].any()


def test_the_numbers_are_means_over_images_and_over_each_resample(causes: Causes, judged: Judged) -> None:
    rng, n_classes = np.random.default_rng(0), len(causes.classes)
    areas = rng.random((len(causes.images), 2, 2))
    shifts = [np.where(np.isnan(causes.by_diff_mean), np.nan, rng.random(causes.by_diff_mean.shape)) for _ in range(2)]
    none = ChosenLatents(*(np.zeros((n_classes, 3), dtype=np.int64) for _ in range(2)), np.ones(5, dtype=np.int64))
    found = {each.name: each for each in describe_causes(judged, causes, none, areas, *shifts)}
    assert tuple(found) == NAMES
    weights = judged.resamples.weights(0, len(judged.images))[7]
    per_image = {
        "deletion area": areas[:, 0, 0],
        "deletion below random": areas[:, 0, 1] - areas[:, 0, 0],
        "insertion above random": areas[:, 1, 0] - areas[:, 1, 1],
        "steering": np.nanmean(shifts[0], 1),
        "steering above random": np.nanmean(shifts[0] - shifts[1], 1),
        "steering above diffmean": np.nanmean(shifts[0] - causes.by_diff_mean, 1),
    }
    for name, values in per_image.items():
        images = causes.steered if name.startswith("steering") else causes.images
        drawn = weights[np.searchsorted(judged.images, images)]
        each = found[name]
        assert isinstance(each, Measured)
        assert each.value == pytest.approx(values.mean())
        assert each.replicates is not None
        assert each.replicates[7] == pytest.approx(drawn @ values / drawn.sum())
        assert each.higher_is_better == (name != "deletion area")


def test_latents_that_write_the_classes_steer_and_random_ones_do_not(
    causes: Causes, judged: Judged, middle_run: Path, plain_clip: Any, tmp_path: Path
) -> None:
    run = Run.open(middle_run)
    classifier, n_classes, n_others = causes.task.classifier, len(causes.classes), 20
    x = classifier.read(causes.choosing).requires_grad_()
    logits = classifier.logits(x)
    written = []
    for number in causes.classes.tolist():
        others = np.delete(causes.classes, list(causes.classes).index(number))
        margin = logits[:, number] - logits[:, torch.from_numpy(others)].mean(1)
        (gradient,) = torch.autograd.grad(margin.sum(), x, retain_graph=True)
        written.append(gradient.mean((0, 1)))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        noise = torch.randn(n_others, run.d_model)
    basis = torch.linalg.qr(torch.stack(written).T)[0]
    noise -= noise @ basis @ basis.T  # they write none of the classes
    rows = torch.nn.functional.normalize(torch.cat([torch.stack(written), noise]))
    n_latents = n_classes + n_others
    sae = SAE(SAEConfig("topk", n_latents, n_latents).resolve(run.d_model), run.d_model).requires_grad_(False)
    sae.decoder.copy_(rows)
    sae.encoder.zero_()
    sae.b_enc.fill_(1.0)  # every latent fires on every token, so that all are equally frequent
    planted = write_imported(
        tmp_path / "planted", sae, judged.store, run.hook_point, format="planted", tokens="all",
        provenance={"source": "planted"},
    )  # fmt: skip
    subject = Subject("planted", None, None, planted, None)  # type: ignore[arg-type]
    found = {each.name: each for each in measure_causal_use(subject, judged, causes)}
    steering, above = found["steering"], found["steering above random"]
    assert isinstance(steering, Measured)
    assert isinstance(above, Measured)
    assert steering.details["latents"] == list(range(n_classes))
    assert steering.value is not None
    assert above.value is not None
    assert above.replicates is not None
    random = steering.value - above.value
    assert steering.value > 0.3
    assert abs(random) < 0.3 * steering.value
    assert np.percentile(above.replicates, 2.5) > 0
    deletion = found["deletion below random"]
    assert isinstance(deletion, Measured)
    assert deletion.value is not None
    assert deletion.value > 0


def test_a_judge_of_one_class_and_no_task_leave_the_measure_out(
    middle_run: Path, middle_store: Path, causes: Causes, judged: Judged
) -> None:
    run, study = Run.open(middle_run), StudyConfig(on_seen="use", judge="zero-shot")
    task = open_task(judged, run, study, CPU)  # random weights: every image is of class0
    said = open_causes(task, judged, run)
    assert isinstance(said, Skipped)
    assert "two are needed" in said.reason
    nothing = open_causes(Skipped("task", "no labels"), judged, run)
    assert nothing == Skipped("causal use", "no labels")
    assert measure_causal_use(Subject("run", None, None, run, None), judged, nothing) == [nothing]  # type: ignore[arg-type]


def test_every_subject_of_a_benchmark_is_measured(middle_run: Path, middle_store: Path, tmp_path: Path) -> None:
    result = benchmark_runs(middle_run, middle_store, tmp_path / "b.json", study=replace(PROBED, limit=12), model=CPU)
    for subject in result.subjects:
        for name in NAMES:
            found = result.find(subject.name, name)
            assert found is not None, (subject.name, name)
            assert found.table == "reliability"
            assert found.low is not None
    pairs = {(each.second, each.measure) for each in result.differences}
    assert ("untrained run", "insertion area") in pairs
