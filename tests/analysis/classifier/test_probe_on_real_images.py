"""On CIFAR-10 a probe knows the classes that the CLIP's texts have no words for."""

from pathlib import Path

import pytest

from actcache import extract
from analysis import ModelOptions, StudyConfig, evaluate_fidelity
from saetrain import SAEConfig, TrainConfig, train

CPU = ModelOptions(device="cpu")


@pytest.mark.slow
def test_a_probe_is_better_than_texts_for_classes_that_were_never_named(tmp_path: Path, real_data: Path) -> None:
    clip = real_data / "clip-cifar"
    model = {"model": str(clip / "ViT-CIFAR-4.json"), "pretrained": str(clip / "vit_cifar4.safetensors")}
    for part, n in (("train", 1500), ("test", 300)):
        extract(real_data / "cifar10" / part, tmp_path / f"{part}.acts", **model, layers=[5], limit=n)  # type: ignore[arg-type]
    config = TrainConfig(n_steps=60, batch_size=1024)
    run = train(tmp_path / "train.acts", tmp_path / "run", sae=SAEConfig(n_latents=512, k=16), config=config)
    probe = StudyConfig(judge="probe", probe_store=str(tmp_path / "train.acts"))
    found = evaluate_fidelity(run, tmp_path / "test.acts", study=probe, model=CPU)
    texts = evaluate_fidelity(run, tmp_path / "test.acts", model=CPU)
    assert found.judge is not None
    assert found.judge.probe is not None
    accuracy = found.runs[0].variants["original"].accuracy
    assert accuracy > 0.5  # 61 % when trained on 4,750 images, and 60 % by another's logistic regression on 5,000
    assert found.judge.probe.accuracy == pytest.approx(accuracy, abs=0.12)
    assert accuracy > texts.runs[0].variants["original"].accuracy + 0.03
    assert found.runs[0].variants["sae+error"].accuracy == pytest.approx(accuracy, abs=0.01)
    assert found.runs[0].variants["zero"].accuracy < 0.2
