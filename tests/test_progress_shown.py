"""Progress as it is shown: in real terminals of several widths, in a pipe, and without colors."""

import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.progress import State, draw_line, show_time

ROOT = Path(__file__).parents[1]

WORK = """
import sys, time
sys.path.insert(0, {root!r})
from analysis.terminal import progress
from analysis.terminal import options, show_progress, emit
progress.FIRST_LINE_S, progress.QUIET_S, progress.REDRAW_S = 0.2, 0.05, 0.05
options.quiet = {quiet}
with show_progress("train", "steps") as on_progress:
    time.sleep(0.3)
    for step in range(1, 41):
        time.sleep(0.05)
        on_progress(1_234_000 + step, 1_234_567, "fvu 0.123  123,456 tokens/s  dead 12.3%  l0 32.0")
emit({{}}, "the result")
"""


def run_in_terminal(code: str, columns: int, **variables: str) -> str:
    """What a real process writes to a real terminal of some width."""
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=follower, stdout=follower, stderr=follower,
        env={**environment, "TERM": "xterm-256color", **variables},
    )  # fmt: skip
    os.close(follower)
    written = b""
    while select.select([leader], [], [], 30)[0]:
        try:
            data = os.read(leader, 65536)
        except OSError:  # the process has closed its end
            break
        if not data:
            break
        written += data
    os.close(leader)
    assert process.wait(30) == 0, written.decode()
    return written.decode()


def drawn(written: str) -> list[str]:
    """The lines that were drawn one over the other."""
    return [part.split("\r\n")[0] for part in written.split("\r\x1b[K")[1:]]


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_shows_one_line_that_fits(columns: int) -> None:
    written = run_in_terminal(WORK.format(root=str(ROOT), quiet=False), columns)
    lines = [line for line in drawn(written) if line]
    assert len(lines) > 10
    assert max(map(len, lines)) < columns
    assert lines[0].startswith("train  starting, 0:00 so far")
    for line in lines[next(i for i, line in enumerate(lines) if "of" in line) :]:
        assert re.search(r"  1,234,0\d\d of 1,234,567 steps  ", line), line
        assert re.search(r"  (\d+:)?\d+:\d\d (left|so far)$", line), line
        assert set(re.findall(r"\S+", line)) <= {
            "train", "of", "1,234,567", "steps", "fvu", "0.123", "123,456", "tokens/s", "dead", "12.3%", "l0", "32.0",
            "left", "so", "far", *re.findall(r"1,234,0\d\d|[\d:]+:\d\d|[━─]+", line),
        }, line  # fmt: skip
    assert "the result" in written.splitlines()[-1]
    assert ("l0 32.0" in lines[-1]) == (columns == 200)  # what does not fit is left out as a whole
    assert "123,456 tokens/s" in lines[-1]


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colors(variables: dict[str, str]) -> None:
    written = run_in_terminal(WORK.format(root=str(ROOT), quiet=False), 80, **variables)
    assert re.findall(r"\x1b\[[\d;]*m", written) == []
    if variables.get("TERM") == "dumb":
        assert "\x1b" not in written
        assert written.count("\r") == written.count("\r\n")
        assert "1,234,567 steps" in written


@pytest.mark.parametrize("quiet", [False, True])
def test_a_pipe_gets_lines_at_growing_intervals(quiet: bool) -> None:
    done = subprocess.run([sys.executable, "-c", WORK.format(root=str(ROOT), quiet=quiet)], capture_output=True,
                          text=True, check=True, env={**os.environ, "FORCE_COLOR": "1"})  # fmt: skip
    assert done.stdout == "the result\n"
    lines = done.stderr.splitlines()
    assert re.sub("[\n -~]", "", done.stderr) == ""  # no control codes, no signs of a bar
    if quiet:
        assert lines == []
        return
    assert 3 <= len(lines) <= 7  # after 0.2, 0.4, 0.8, 1.6 seconds, and at the end
    assert lines[0] == "train  starting, 0:00 so far"
    counts = [int(line.split()[1].replace(",", "")) for line in lines[1:]]
    assert counts == sorted(set(counts))
    steps = [after - before for before, after in pairwise(counts)]
    assert steps[:2] == sorted(steps[:2])
    assert counts[-1] == 1_234_040


@given(
    done=st.integers(0, 10**9), more=st.integers(1, 10**9), seconds=st.floats(0.01, 10**6), width=st.integers(20, 200),
    unit=st.sampled_from(["images", "steps", "bytes", "runs and pairs"]),
    note=st.sampled_from(["", "loss 1.234", "fvu 0.123  61,907 tokens/s  dead 0.0%  l0 4.0"]),
)  # fmt: skip
def test_no_number_is_ever_cut(done: int, more: int, seconds: float, width: int, unit: str, note: str) -> None:
    state = State("evaluate", unit, 0.0)
    state.update(done // 2, done + more, note, seconds / 2)
    state.update(done, done + more, note, seconds)
    line, whole = draw_line(state, width, seconds), draw_line(state, 1000, seconds)
    assert len(line) <= width
    parts = [part for part in line.split("  ") if not set(part) <= set("━─")]
    assert set(parts) <= set(whole.split("  ")) or width < 45  # parts as they are, or none
    if width >= 70:
        assert re.search(r"(left|so far|finishing, [\d:]+( d \d+ h)?)$", line)
        assert f"of {done + more:,}" in line or unit == "bytes"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (7, "0:07"), (65, "1:05"), (3725, "1:02:05"), (273_600, "3 d 04 h")]
)
def test_times(seconds: float, text: str) -> None:
    assert show_time(seconds) == text


def test_the_rate_of_a_resumed_task_counts_what_was_done_now() -> None:
    state = State("extract", "images", 0.0)
    state.update(9000, 10_000, "", 5.0)
    assert "so far" in draw_line(state, 100, 5.0)
    state.update(9100, 10_000, "", 15.0)
    assert "10.0 images/s  1:30 left" in draw_line(state, 100, 15.0)
    assert "10.0 images/s  1:20 left" in draw_line(state, 100, 25.0)  # the time goes on without news
    state.update(10_000, 10_000, "", 105.0)
    assert draw_line(state, 100, 106.0).endswith("finishing, 1:46")
    state.closed = True
    assert draw_line(state, 100, 106.0).endswith("took 1:46")


# ---------------------------------------------------------------------------------------------------------------------
# progress_bar, which programs of users pass to functions of the library

BAR_WORK = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from actcache import progress_bar
bar = progress_bar("train", "steps")
for step in range(1, 31):
    time.sleep(0.05)
    bar(step, 30, {{"fvu": 0.123}})
quick = progress_bar("encode")
quick(1, 2)
quick(2, 2)
print("the result")
"""


def test_a_bar_on_a_terminal_is_one_line() -> None:
    written = run_in_terminal(BAR_WORK, 80)
    lines = drawn(written)
    assert 3 <= len(lines) <= 6
    assert all(re.match(r"train  [━─]+  \d+ of 30 steps  ", line) for line in lines)
    assert re.search(r"30 of 30 steps  .*fvu 0.123  took 0:0\d$", lines[-1])
    assert "encode" not in written  # it took no time
    assert written.splitlines()[-1] == "the result"


def test_a_bar_leaves_nothing_in_a_log() -> None:
    done = subprocess.run([sys.executable, "-c", BAR_WORK], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("the result\n", "")
