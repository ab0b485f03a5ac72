"""Ctrl-C at any moment of a command's first seconds: exit code 130 and no traceback. Real processes are interrupted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import signal
real = signal.signal
def first(*arguments):
    before, signal.signal = real(*arguments), real
    print("begun", flush=True)
    return before
signal.signal = first
from cli import app
app()
"""
QUIET = ("", "interrupted; the same command resumes")


def interrupt_after(seconds: float, args: list[str], program: str = PROGRAM) -> tuple[int, str]:
    """(exit code, stderr) of a command that gets SIGINT so long after its first lines, which answer it, have run."""
    child = subprocess.Popen(
        [sys.executable, "-c", program, *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    time.sleep(seconds)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    return child.returncode, stderr.strip()


COMMANDS = ("info", "encode", "extract")


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_in_the_first_half_second_is_quiet(
    command: str, part: int, tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], tiny_run: Path,
    tiny_store: Path,
) -> None:  # fmt: skip
    commands = {
        "info": ["info", str(tiny_store)],
        "encode": ["encode", str(tiny_run), str(tiny_store), str(tmp_path / "x.codes")],
        "extract": ["extract", str(tiny_images), str(tmp_path / "x.acts"), "--layer", "1",
                    *(f"--{name}={value}" for name, value in tiny_model.items())],
    }  # fmt: skip
    for number in range(3):  # the commands begin alike, and each has moments of its own
        seconds = (3 * (3 * part + number) + COMMANDS.index(command)) / 72
        code, stderr = interrupt_after(seconds, commands[command])
        said = all(line.startswith(("Wrote ", "Was there already: ", "Next: ")) for line in stderr.splitlines())
        if code in (0, -signal.SIGINT) and said and (stderr or code == 0):  # the verb had ended before
            return
        assert (code, stderr in QUIET) == (130, True), f"after {seconds} s: {code}, {stderr}"


IMPORTING = """
import sys
print('begun', flush=True)
from actcache.interrupts import interrupt, on_interrupt
with on_interrupt(interrupt):
    try:
        import slow_module
    except BaseException as error:
        print(repr(error), file=sys.stderr)
"""
MODULES = {
    "a plain module": "import time; time.sleep(5)",
    "__set_name__": "import time\nclass A:\n def __set_name__(self, owner, name): time.sleep(5)\nclass B:\n a = A()",
    "what an import swallows": "import time\ntry:\n time.sleep(5)\nexcept BaseException:\n pass\nraise RecursionError",
    "a module that it imports": "import slower_module",
}


@pytest.mark.parametrize("text", MODULES.values(), ids=MODULES)
def test_an_import_that_is_interrupted_ends_the_program(text: str, tmp_path: Path) -> None:
    (tmp_path / "slow_module.py").write_text(text)
    (tmp_path / "slower_module.py").write_text("import time; time.sleep(5)")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{IMPORTING}"
    assert interrupt_after(0.3, [], program) == (130, "")


def test_elsewhere_it_is_a_keyboard_interrupt() -> None:
    program = IMPORTING.replace("import slow_module", "import time; time.sleep(5)")
    code, stderr = interrupt_after(0.3, [], program)
    assert (code, stderr) == (0, "KeyboardInterrupt()")


def test_importing_the_command_line_leaves_the_signal_as_it_was() -> None:
    code = "import signal, cli; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
