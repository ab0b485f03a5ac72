"""Memory is counted before it is allocated: what cannot fit is refused in one line with both figures, and leaves
nothing on the disk.
"""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import cli
from actcache import ActivationStore, SettingsError, machine
from analysis import AnalyzeConfig, analyze, inspect_dictionaries
from saetrain import CodeStore, SAEConfig, TrainConfig, encode, sweep, train


@pytest.fixture
def small_machine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(1, tmp_path_factory.mktemp("proc"), monkeypatch)


def leave(n_kb: int, proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with so much memory left, as its own /proc tells it, and no control group that says otherwise."""
    (proc / "meminfo").write_text(f"MemTotal:       65536000 kB\nMemFree:  10 kB\nMemAvailable:  {n_kb} kB\n")
    monkeypatch.setattr(machine, "PROC", proc)
    monkeypatch.setattr(machine, "CGROUP", proc / "no-cgroup")


LINE = r"needs at least [\d,.]+ GB of memory, but only [\d,.]+ GB are free\. \w"


@pytest.mark.parametrize("n_latents", ["100000000", "9223372036854775807"])
@pytest.mark.parametrize("variant", ["topk", "relu", "jumprelu", "gated"])
def test_an_sae_that_cannot_fit_is_refused_before_anything_is_written(
    n_latents: str, variant: str, tiny_store: Path, tmp_path: Path
) -> None:
    how = ["--layer", "2", "--n-latents", n_latents, "--variant", variant]
    done = CliRunner().invoke(cli.app, ["train", str(tiny_store), str(tmp_path / "run"), *how])
    (line,) = done.stderr.strip().splitlines()
    assert done.exit_code == 1
    assert line.startswith("error: Training this SAE needs at least ")
    assert " GB are free. Lower --n-latents" in line
    assert list(tmp_path.iterdir()) == []


def test_the_saes_of_a_sweep_are_counted_together(
    tiny_store: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(1_000_000, tmp_path_factory.mktemp("proc"), monkeypatch)  # other processes take and give memory meanwhile
    n_weights = 0.7 * machine.available_bytes() / 16  # one SAE would fit, two do not
    n_latents = int(n_weights / (2 * ActivationStore.open(tiny_store).layout.d_model))
    members = [(2, SAEConfig(n_latents=n_latents, k=k), TrainConfig(batch_size=128, n_steps=1)) for k in (3, 4)]
    with pytest.raises(SettingsError, match=f"Training these 2 SAEs side by side {LINE}"):
        sweep(tiny_store, tmp_path / "runs", members)
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("small_machine")
def test_every_verb_that_holds_a_dictionary_counts_it(
    tiny_store: Path, tiny_run: Path, tiny_codes: Path, tmp_path: Path
) -> None:
    config = TrainConfig(batch_size=128, n_steps=1)
    calls = {
        "Training this SAE": lambda: train(tiny_store, tmp_path / "r", layer=2, sae=SAEConfig(k=4), config=config),
        "Encoding with": lambda: encode(tiny_run, tiny_store, tmp_path / "x.codes"),
        "Analyzing": lambda: analyze(tiny_codes, tmp_path / "x.concepts", config=AnalyzeConfig()),
        "Inspecting these runs": lambda: inspect_dictionaries([tiny_run], tiny_store),
    }
    for what, call in calls.items():
        with pytest.raises(SettingsError, match=f"{what}.* {LINE}"):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_machine")
def test_what_is_complete_needs_no_memory(tiny_run: Path, tiny_codes: Path) -> None:
    assert CodeStore.open(tiny_codes).n_entries


@given(st.integers(0, 2**50), st.integers(0, 2**50))
def test_only_what_is_larger_than_what_is_free_is_refused(needed: int, free: int) -> None:
    if needed <= free:
        machine.check_memory(needed, free, "It", "Do this.")
    else:
        with pytest.raises(SettingsError, match=f"It {LINE}"):
            machine.check_memory(needed, free, "It", "Do this.")


CGROUPS = {
    "version 2": {"memory.max": "1000000", "memory.current": "900000", "memory.stat": "anon 1\ninactive_file 300000\n"},
    "version 2, of this process": {
        "user/job/memory.max": "1000000", "user/job/memory.current": "900000",
        "user/job/memory.stat": "inactive_file 300000\n", "memory.max": "max",
    },
    "version 1": {
        "memory/memory.limit_in_bytes": "1000000", "memory/memory.usage_in_bytes": "900000",
        "memory/memory.stat": "total_inactive_file 300000\n",
    },
}  # fmt: skip


@pytest.mark.parametrize("files", CGROUPS.values(), ids=CGROUPS)
def test_a_container_has_less(files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/user/job\n")
    (tmp_path / "proc" / "meminfo").write_text("MemAvailable: 2000 kB\n")
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    assert machine.available_bytes() == 400_000


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "MemAvailable: many kB\n", "MemAvailable:\n", None])
def test_without_proc_the_whole_memory_is_the_limit(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    monkeypatch.setattr(machine, "PROC", tmp_path)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.available_bytes() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
