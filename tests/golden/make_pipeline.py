"""Writes tests/golden/pipeline: every kind of artifact and every kind of result, from a tiny CLIP and 48 small images.

    python tests/golden/make_pipeline.py FOLDER

It was written once, by version 0.1.0 before its modules moved into sub-packages, and is not made again: what
the tests ask is whether the code of today opens, verifies, resumes and shows what that code wrote. Floating point
differs between processors, so a folder made again elsewhere has the same ids and settings but not the same bytes.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
N_IMAGES, N_CLASSES, SIZE = 48, 3, 24
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIZE, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
WORDS = "red\nsky\nwood\nclass0\nclass1\nclass2\n"
MODEL = "--model model/tiny.json --pretrained model/tiny.safetensors"
EXACT = "--precision float32 --device cpu"
SMALL = "--n-latents 64 --k 4 --n-steps 60 --batch-size 128 --lr 0.003 --precision float32 --device cpu"
LONG = SMALL.replace("--n-steps 60", "--n-steps 4000")
VARIANTS = "--variant batchtopk --variant relu --variant jumprelu --variant gated"

COMMANDS = [
    f"extract images a.acts {MODEL} --layer 1 --shard-images 16 --masks masks {EXACT}",
    f"extract images b.acts {MODEL} --layer 1 --seed 3 --shard-images 16 --codec zstd {EXACT}",
    f"adapt images a.prompts {MODEL} --method maple --shots 4 --n-epochs 2 --n-prompts 2 --depth 2 {EXACT}",
    f"extract images adapted.acts {MODEL} --prompts a.prompts --layer 1 --shard-images 16 {EXACT}",
    f"train a.acts run {SMALL}",
    f"train a.acts runs {VARIANTS} {SMALL}",
    "encode run a.acts a.codes --device cpu",
    "encode run adapted.acts adapted.codes --device cpu",
    "analyze a.codes a.concepts --n-gallery 4 --embeddings clip --device cpu",
    "analyze adapted.codes adapted.concepts --n-gallery 4 --device cpu",
    "name a.concepts --vocabulary words.txt --device cpu",
    "name a.concepts --set 19=stripes",
    "name a.concepts --note 19=seen",
    "evaluate run a.acts evaluate.json --device cpu",
    "evaluate runs b.acts evaluate-runs.json --device cpu",
    "intervene run b.acts intervene.json --k 1 --k 3 --n-random 1 --device cpu",
    "intervene run b.acts intervene-set.json --set 19=5 --add 18=-1 --device cpu",
    "attribute run b.acts attribute.json --n 1 --n 3 --limit 12 --device cpu",
    "steer run b.acts steer.json --latent 19 --strength 20 --vocabulary words.txt --device cpu",
    "rules a.codes rules.json --n-patches 1 --concepts a.concepts",
    "compare a.concepts adapted.concepts compare.json --k 1 --k 5 --n-seeds 2 --device cpu",
    "report a.concepts report.html --result evaluate.json --result intervene.json --result attribute.json "
    "--result steer.json --result rules.json --result compare.json",
]

ANSWERS = {
    "inspect": "inspect runs --store a.acts --n-tokens 40",
    "localize": "localize a.codes",
    "latent": "query a.codes --latent 19",
    "patches": "query a.codes --latent 19 --show patches",
    "counter-examples": "query a.codes --latent 19 --show counter-examples",
    "co-firing": "query a.codes --latent 19 --show co-firing",
    "sample": "query a.codes --sample 200",
    "image": "query a.codes --image 3",
    "region": "query a.codes --image 3 --at 0:2,1:3",
    "images": "query a.codes --image 3 --image 5",
    "class": "query a.codes --class class1 --n-top 3 --names a.concepts",
    "group": "query a.codes --group label==1 --versus label==2 --n-top 3",
    "fires": "query a.codes --fires 19 --silent 18",
    "where": "query a.codes --where label==1",
    "info-acts": "info a.acts",
    "info-prompts": "info a.prompts",
    "info-run": "info run",
    "info-codes": "info a.codes",
    "info-concepts": "info a.concepts",
}
"""Questions whose answers are kept as the JSON object that was printed."""


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    write_images(folder)
    write_model(folder / "model")
    (folder / "words.txt").write_text(WORDS)
    for command in COMMANDS:
        run_command(folder, command)
    (folder / "answers").mkdir()
    for name, command in ANSWERS.items():
        (folder / "answers" / f"{name}.json").write_text(run_command(folder, command))
    for page in folder.glob("*.html"):  # bokeh's script makes a page a megabyte
        page.unlink()
    for name in ("a.acts", "a.codes"):
        interrupt_copy(folder / name, folder / f"interrupted-{name}")
    kill_training(folder)


def write_images(folder: Path) -> None:
    """Flat colors with a square of another color; the square is what the mask shows, by class."""
    rng = np.random.default_rng(0)
    for i in range(N_IMAGES):
        label, (top, left) = i % N_CLASSES, rng.integers(0, 2, 2) * 8
        pixels = np.full((SIZE, SIZE, 3), rng.integers(0, 255, 3) // 32 * 32, np.uint8)
        pixels[top : top + 16, left : left + 16, label] = 255
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[top : top + 16, left : left + 16] = label + 1
        for kind, image in (("images", pixels), ("masks", mask)):
            path = folder / kind / f"class{label}" / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


def write_model(folder: Path) -> None:
    """Random weights of few distinct values, so that 49,408 word vectors take little room in a repository."""
    import open_clip

    folder.mkdir()
    (folder / "tiny.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    clip = open_clip.CLIP(**json.loads(json.dumps(CONFIG)))
    rng = np.random.default_rng(1)
    state = {}
    for name, value in clip.state_dict().items():
        shape = tuple(value.shape)
        if name == "token_embedding.weight":
            state[name] = rng.normal(0, 0.3, (61, shape[1])).astype(np.float16)[np.arange(shape[0]) % 61]
        elif name == "logit_scale":
            state[name] = np.array(2.0, np.float16)
        elif name.endswith(("ln_1.weight", "ln_2.weight", "ln_pre.weight", "ln_post.weight", "ln_final.weight")):
            state[name] = np.ones(shape, np.float16)
        else:
            state[name] = rng.normal(0, 0.2, shape).astype(np.float16)
    save_file(state, folder / "tiny.safetensors")


def run_command(folder: Path, command: str) -> str:
    words = [sys.executable, str(ROOT / "cli.py"), "--quiet", "--json", *command.split()]
    return subprocess.run(words, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def interrupt_copy(sealed: Path, copy: Path) -> None:
    """What a writer leaves that dies before it commits its second shard: no seal, no record of that shard."""
    shutil.copytree(sealed, copy)
    (copy / "manifest.json").unlink()
    sorted((copy / "commits").iterdir())[1].unlink()


def kill_training(folder: Path) -> None:
    """A run that was killed at its first checkpoint, and its twin that was not."""
    run_command(folder, f"train a.acts long {LONG} --checkpoint-every 1000")
    words = [sys.executable, str(ROOT / "cli.py"), "--quiet", "train", "a.acts", "interrupted-run"]
    process = subprocess.Popen([*words, *LONG.split(), "--checkpoint-every", "1000"], cwd=folder)
    while not list((folder / "interrupted-run").glob("checkpoints/*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
