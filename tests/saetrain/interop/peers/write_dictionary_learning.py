"""dictionary_learning: a folder of every class from its own trainers, of a few steps on the rows."""

import json
import shutil
from typing import Any

import torch
from dictionary_learning import dictionary, trainers
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary
from shared import D, F, K, keep, read_arguments, shake

STEPS = 12
SHARED = {"steps": STEPS, "activation_dim": D, "dict_size": F, "layer": 1, "lm_name": "x", "lr": 1e-2,
          "warmup_steps": 1, "submodule_name": "y", "device": "cpu", "seed": 0}  # fmt: skip
SOON = {"threshold_start_step": 0, "threshold_beta": 0.5, "k": K}
TRAINERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AutoEncoder": (trainers.StandardTrainer, {"sparsity_warmup_steps": None}),
    "AutoEncoder-april": (StandardTrainerAprilUpdate, {"sparsity_warmup_steps": None}),
    "AutoEncoderTopK": (trainers.TopKTrainer, SOON),
    "BatchTopKSAE": (trainers.BatchTopKTrainer, SOON),
    "MatryoshkaBatchTopKSAE": (MatryoshkaBatchTopKTrainer, {**SOON, "group_fractions": [0.25, 0.75]}),
    "JumpReluAutoEncoder": (trainers.JumpReluTrainer, {"sparsity_warmup_steps": None}),
    "GatedAutoEncoder": (trainers.GatedSAETrainer, {"sparsity_warmup_steps": None}),
}  # fmt: skip


def main() -> None:
    x, out = read_arguments()
    for name, normalize in [("BatchTopKSAE", True), *((name, False) for name in TRAINERS)]:
        trainer, more = TRAINERS[name]
        folder = out / (f"{name}-normalized" if normalize else name)
        settings = {"trainer": trainer, **SHARED, **more}
        n_rounds = 9 if normalize else 1  # it takes the norm of 100 batches, and divides them in place
        batches = list(x.clone().split(len(x) // STEPS)) * n_rounds
        trainSAE(batches, [settings], STEPS, save_dir=str(out / "run"), device="cpu", normalize_activations=normalize)
        (out / "run" / "trainer_0").rename(folder)
        shutil.rmtree(out / "run")
        sae, _ = load_dictionary(str(folder), device="cpu")
        if name != "AutoEncoder":  # this one is normalized when it is loaded, so its codes are of unit rows
            shake(sae, 0.05)
            torch.save(sae.state_dict(), folder / "ae.pt")
            sae.load_state_dict(torch.load(folder / "ae.pt"))
        codes = sae.encode(x)
        keep(out, folder.name, codes, sae.decode(codes))
    # the class that no trainer of 0.1.0 writes any more
    sae = dictionary.AutoEncoderNew(D, F)
    shake(sae)
    folder = out / "AutoEncoderNew"
    folder.mkdir()
    torch.save(sae.state_dict(), folder / "ae.pt")
    settings = {**SHARED, "dict_class": "AutoEncoderNew", "trainer_class": "StandardTrainerNew"}
    (folder / "config.json").write_text(json.dumps({"trainer": settings}))
    sae, _ = load_dictionary(str(folder), device="cpu")
    codes = sae.encode(x)
    keep(out, folder.name, codes, sae.decode(codes))
    # ExplainableML/sae-for-vlm, a fork, spells the class so; its files are the same otherwise
    source, folder = out / "MatryoshkaBatchTopKSAE", out / "MatroyshkaBatchTopKSAE"
    shutil.copytree(source, folder)
    settings_file = folder / "config.json"
    settings_file.write_text(settings_file.read_text().replace("Matryoshka", "Matroyshka"))
    shutil.copy(source.with_suffix(".npz"), folder.with_suffix(".npz"))


if __name__ == "__main__":
    main()
