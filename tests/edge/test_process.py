"""Child processes: output, an end in time, no orphan; and log files of bounded size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge.process import MAX_LINE_BYTES, RotatingLog, free_bytes, start_child
from protocol.errors import MindstreamError
from tests.support.nodes import CHECKOUT, runs, wait_for
from tests.support.waiting import DEADLINE_S


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_every_line_of_both_streams_is_passed_on_and_the_last_one_kept() -> None:
    lines: list[bytes] = []
    child = start_child(
        python("import sys; print('one', flush=True); print('two', file=sys.stderr, flush=True); print()"),
        name="speaker",
        on_line=lines.append,
    )
    assert child.wait(DEADLINE_S) == 0
    child.drain(DEADLINE_S)
    assert lines == [b"one", b"two", b""]
    assert child.last_line == "two"


def test_a_line_without_an_end_is_passed_on_in_pieces() -> None:
    pieces: list[bytes] = []
    child = start_child(python(f"print('x' * {3 * MAX_LINE_BYTES})"), on_line=pieces.append)
    assert child.wait(DEADLINE_S) == 0
    child.drain(DEADLINE_S)
    assert max(map(len, pieces)) <= MAX_LINE_BYTES
    assert b"".join(pieces) == b"x" * 3 * MAX_LINE_BYTES


def test_a_child_that_ends_when_asked_is_not_killed() -> None:
    child = start_child(python("import time; time.sleep(600)"))
    child.terminate()
    assert child.wait_or_kill(DEADLINE_S)
    assert child.poll() == -15


def test_a_child_that_does_not_end_is_killed_at_the_deadline() -> None:
    ready: list[bytes] = []
    child = start_child(
        python("import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"),
        on_line=ready.append,
    )
    wait_for(lambda: ready, "the child does not speak")
    child.terminate()
    assert not child.wait_or_kill(0.3)
    assert child.poll() == -9


def test_a_program_that_is_not_there_says_so_in_its_last_line() -> None:
    # The shim that ties a child to its parent starts, and the program does not.
    child = start_child(["/nowhere/program"], on_line=lambda _line: None)
    assert child.wait(DEADLINE_S) != 0
    child.drain(DEADLINE_S)
    assert "/nowhere/program" in child.last_line


def test_children_die_with_a_parent_that_is_killed() -> None:
    program = (
        "from edge.process import start_child; import sys, time\n"
        "child = start_child([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(python(program), stdout=subprocess.PIPE, cwd=CHECKOUT)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert runs(pid)
    parent.kill()
    parent.wait(DEADLINE_S)
    parent.stdout.close()
    wait_for(lambda: not runs(pid), "an orphan")


def test_log_files_stay_within_their_bounds(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "a.log", max_bytes=1000, files=3)
    for number in range(200):
        assert log.write_line(b"%04d" % number + b"x" * 45)
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["a.log", "a.log.1", "a.log.2"]
    assert all(path.stat().st_size <= 1000 for path in files)
    kept = b"".join(path.read_bytes() for path in reversed(files)).splitlines()
    # The newest, in order, none missing.
    assert [int(line[:4]) for line in kept] == list(range(200 - len(kept), 200))
    assert len(kept) > 40


def test_one_log_file_alone_starts_over(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "a.log", max_bytes=100, files=1)
    for _ in range(20):
        log.write_line(b"x" * 30)
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.log"]
    assert (tmp_path / "a.log").stat().st_size <= 100


def test_a_log_whose_disk_refuses_counts_what_was_lost_and_goes_on(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "absent" / "a.log", max_bytes=1000, files=2)
    assert not log.write_line(b"lost")
    assert log.lost_lines == 1
    (tmp_path / "absent").mkdir()
    assert log.write_line(b"kept")
    log.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")  # noqa: PTH110
def test_a_full_disk_stops_no_logger() -> None:
    log = RotatingLog(Path("/dev/full"), max_bytes=1000, files=1)
    assert not log.write_line(b"lost")
    log.close()


def test_free_space_is_a_number_of_bytes(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) > 0
    with pytest.raises(MindstreamError, match="absent"):
        free_bytes(tmp_path / "absent")
