"""``mindstream demo`` as a user runs it: the whole tour on the real model; it leaves no process behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.nodes import CHECKOUT, wait_for

pytestmark = pytest.mark.model

TOUR_TIMEOUT_S = 280.0
READY_S = 150.0
"""To load a model, or to give up loading one."""
PROVEN = "64 of 64 tokens are the same"
STAYS = "Ctrl-C ends everything"


class Command:
    """``mindstream ...`` with a data home of its own, in a session of its own like a terminal's."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self._printed = folder / f"printed-{time.monotonic_ns()}"
        # Wide, so that no sentence is broken; no colour; threads that do not fight over the cores of this machine.
        extra = {
            "XDG_DATA_HOME": str(folder / "home"),
            "COLUMNS": "200",
            "NO_COLOR": "1",
            "MINDSTREAM_MODEL__THREADS": "1",
        }
        with self._printed.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from edge.cli import main; main()", *arguments],
                cwd=CHECKOUT,
                env={**os.environ, **extra, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def printed(self) -> str:
        """What it has printed so far."""
        return self._printed.read_text(errors="replace")

    def wait_printed(self, text: str) -> None:
        """Wait until ``text`` was printed; fail with all that was, when it ends before."""
        wait_for(
            lambda: text in self.printed or self.process.poll() is not None, f"{text!r} was not printed", TOUR_TIMEOUT_S
        )
        assert text in self.printed, f"it ended with {self.process.poll()}:\n{self.printed}"

    def family(self) -> list[psutil.Process]:
        """Every process under it."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


@contextmanager
def started(folder: Path, *arguments: str, **environment: str) -> Iterator[Command]:
    command = Command(folder, *arguments, **environment)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.kill()  # its children go with it
        command.process.wait()


def wait_gone(processes: list[psutil.Process]) -> None:
    """Wait until none of ``processes`` runs; an ended one that init has not taken note of yet counts as gone."""

    def alive() -> list[psutil.Process]:
        found = []
        for process in processes:
            try:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    wait_for(lambda: not alive(), f"of {len(processes)} processes some are left")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for both tours: the second finds keys, memories and snapshots of the first."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.slow
def test_the_tour_proves_the_handoff_and_ends(smollm2_path: Path, home: Path) -> None:
    with started(home, "demo", "--once") as demo:
        demo.wait_printed("the model loaded on both")
        family = demo.family()
        assert len(family) >= 7, "a broker, two supervisors and their services"
        demo.wait_printed(PROVEN)
        assert demo.process.wait(READY_S) == 0, demo.printed
        wait_gone(family)
    assert_told(demo)


def assert_told(demo: Command) -> None:
    """The whole tour was told, with its timings."""
    for line in ("an embedded broker", "sprout fetches and restores it", "tomato remembers", "sprout recalls it"):
        assert re.search(rf"✓ {line}.* [\d,]+ ms", demo.printed), f"no timing of {line!r} in:\n{demo.printed}"
    assert PROVEN in demo.printed
    assert "Traceback" not in demo.printed


def test_ctrl_c_after_the_tour_ends_every_process(smollm2_path: Path, home: Path) -> None:
    with started(home, "demo") as demo:
        demo.wait_printed(STAYS)
        family = demo.family()
        assert len(family) >= 7, "a broker, two supervisors and their services"
        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(READY_S) == 0, demo.printed
        wait_gone(family)
    assert_told(demo)
    assert "every process has ended" in demo.printed


def test_kill_9_of_the_demo_leaves_no_orphan(tmp_path: Path) -> None:
    with started(tmp_path, "demo") as demo:
        # In the middle of the start: supervisors, the broker and services are there.
        wait_for(lambda: demo.process.poll() is not None or len(demo.family()) >= 7, "it did not start", READY_S)
        family = demo.family()
        assert len(family) >= 7, demo.printed
        demo.process.kill()
        demo.process.wait()
        wait_gone(family)


def test_ctrl_c_while_it_starts_ends_every_process(tmp_path: Path) -> None:
    with started(tmp_path, "demo") as demo:
        wait_for(lambda: demo.process.poll() is not None or len(demo.family()) >= 4, "it did not start", READY_S)
        family = demo.family()
        demo.process.send_signal(signal.SIGINT)
        demo.process.wait(READY_S)
        wait_gone(family)
    assert "Traceback" not in demo.printed


def test_without_its_model_the_demo_says_why_it_cannot_go_on(tmp_path: Path) -> None:
    with started(tmp_path, "demo", "--once", MINDSTREAM_MODEL__NAME="gpt-nowhere") as demo:
        assert demo.process.wait(READY_S) == 1, demo.printed
    assert "gpt-nowhere" in demo.printed
    assert "model_runner is degraded" in demo.printed
    assert "Traceback" not in demo.printed


def test_a_second_demo_in_the_same_folder_says_that_the_first_one_runs(tmp_path: Path) -> None:
    with started(tmp_path, "demo") as first:
        wait_for(lambda: first.process.poll() is not None or len(first.family()) >= 7, "it did not start", READY_S)
        with started(tmp_path, "demo", "--once") as second:
            assert second.process.wait(READY_S) == 1, second.printed
        assert first.process.poll() is None, first.printed
        assert "another" in second.printed or "already" in second.printed, second.printed
        assert "Traceback" not in second.printed


def test_up_on_a_port_that_is_taken_says_which_and_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with started(tmp_path, "up", MINDSTREAM_BROKER__PORT=str(port), MINDSTREAM_NODE__NAME="tomato") as up:
            assert up.process.wait(READY_S) not in (0, None), up.printed
    assert str(port) in up.printed
    assert "broker.port" in up.printed
    assert "Traceback" not in up.printed
