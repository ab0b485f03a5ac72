"""A script that starts its processes by `spawn` or `forkserver`, as macOS does, on a system that has no fork at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import multiprocessing
import os
import sys

METHOD, images, model, pretrained, out = sys.argv[1:]
if METHOD == "spawn":
    del os.fork  # also in the processes that import this script again
os.write(1, f"imported {os.getpid()}\\n".encode())

def main():
    multiprocessing.set_start_method(METHOD)
    from actcache import extract
    from analysis import analyze, query_latent
    from saetrain import SAEConfig, TrainConfig, encode, train

    extract(images, f"{out}/x.acts", model=model, pretrained=pretrained, layers=[2], shard_images=16,
            precision="float32", device="cpu")
    config = TrainConfig(n_steps=20, batch_size=64, lr=3e-3)
    train(f"{out}/x.acts", f"{out}/run", sae=SAEConfig(n_latents=32, k=4), config=config, device="cpu")
    codes = encode(f"{out}/run", f"{out}/x.acts", f"{out}/x.codes", device="cpu")
    table = analyze(codes, f"{out}/x.concepts", n_workers=2, device="cpu")
    print("latents", table.table.num_rows, query_latent(codes, 3).num_rows >= 0)

if __name__ == "__main__":
    main()
"""


def files(folder: Path, name: str) -> dict[str, bytes]:
    """The files of an artifact that do not depend on the time or on the place."""
    left_out = {"metrics.jsonl", "manifest.json", "places.json"}
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted((folder / name).rglob("*"))
        if file.is_file() and file.name not in left_out
    }


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_model: dict[str, str]
) -> dict[str, dict[str, bytes]]:
    """What the same calls write in this process, on threads."""
    from actcache import extract
    from analysis import analyze
    from saetrain import SAEConfig, TrainConfig, encode, train

    out = tmp_path_factory.mktemp("expected")
    extract(tiny_images, out / "x.acts", **tiny_model, layers=[2], shard_images=16, precision="float32", device="cpu")
    config = TrainConfig(n_steps=20, batch_size=64, lr=3e-3)
    train(out / "x.acts", out / "run", sae=SAEConfig(n_latents=32, k=4), config=config, device="cpu")
    encode(out / "run", out / "x.acts", out / "x.codes", device="cpu")
    analyze(out / "x.codes", out / "x.concepts", device="cpu")
    return {name: files(out, name) for name in ("x.codes", "x.concepts")}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_guarded_script_writes_what_threads_write(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], expected: dict[str, dict[str, bytes]], method: str
) -> None:
    script = tmp_path / "study.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, method, tiny_images, tiny_model["model"], tiny_model["pretrained"], tmp_path],
        capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    assert "latents 32 True" in done.stdout
    imported = {line for line in done.stdout.splitlines() if line.startswith("imported")}
    assert len(imported) >= 3  # each of the two workers imports the script
    for name, there in expected.items():
        assert files(tmp_path, name) == there


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_command_starts_workers_by_spawn(tmp_path: Path, tiny_codes: Path, method: str) -> None:
    """`patchsae analyze --n-workers`, in a process whose start method somebody else has chosen."""
    caller = (
        f"import multiprocessing, sys\nif __name__ == '__main__':\n    multiprocessing.set_start_method({method!r})\n"
        "    import cli\n    sys.exit(cli.app(sys.argv[1:], prog_name='patchsae'))\n"
    )
    (tmp_path / "caller.py").write_text(caller)
    done = subprocess.run(
        [sys.executable, tmp_path / "caller.py", "--quiet", "analyze", tiny_codes, tmp_path / "x.concepts",
         "--n-workers", "2"],
        capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    assert (tmp_path / "x.concepts" / "manifest.json").exists()
