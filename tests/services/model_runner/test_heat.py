"""Backing off while the device is throttled: background work rests, a person's runs go on, and all comes back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from edge.config import load_config
from edge.db import Database
from edge.keys import Peers, load_or_create_identity
from edge.service import Context
from edge.thermal import Thermometer
from protocol.ids import uuid7
from protocol.messages import ChatMessage, Event, ModelGenerate, ServiceState
from services.model_runner import heat, rounds
from services.model_runner.answers import Run
from services.model_runner.chat import ChatFormat
from services.model_runner.conversations import Conversations
from services.model_runner.rounds import Loaded
from services.model_runner.scheduler import Scheduler, Work
from services.model_runner.transformers_engine import TransformersEngine
from services.model_runner.worker import Worker
from tests.support.sysfs import BOARD, SLOWED, lay_out
from tests.support.waiting import DEADLINE_S, TTL_MS, wait_for

FOR_EVER_S = 1e6

# --- when ------------------------------------------------------------------------------------------------------


class Watch:
    """A watch on a device that is laid out in a folder, and the time."""

    def __init__(self, root: Path) -> None:
        self.root, self.now_s = root, 0.0
        self.said: list[bool] = []
        self.why = ""
        lay_out(root, BOARD)
        self.watch = heat.HeatWatch(Thermometer(root), self._changed, lambda: self.now_s)

    def _changed(self, throttled: bool, why: str) -> None:
        self.said.append(throttled)
        self.why = why

    def looks(self, count: int, *, slowed: bool) -> bool:
        lay_out(self.root, BOARD | SLOWED if slowed else BOARD)
        for _ in range(count):
            self.now_s += heat.LOOK_S
            self.watch.look()
        return self.watch.throttled


def test_one_look_begins_nothing_and_two_in_a_row_do(tmp_path: Path) -> None:
    it = Watch(tmp_path)
    assert not it.looks(1, slowed=True)
    assert not it.looks(1, slowed=False)
    assert not it.looks(1, slowed=True)
    assert it.looks(1, slowed=True)
    assert "cpufreq-cpu0 slows it down, step 5 of 14" in it.why
    assert it.watch.last.hottest_c == 86.5


def test_it_ends_by_itself_after_half_a_minute_without_a_sign_and_each_change_is_said_once(tmp_path: Path) -> None:
    it = Watch(tmp_path)
    it.looks(4, slowed=True)
    cool_looks = int(heat.COOL_S / heat.LOOK_S)
    assert it.looks(cool_looks - 1, slowed=False)
    assert it.looks(1, slowed=True)  # once more: the half minute begins anew
    assert it.looks(cool_looks - 1, slowed=False)
    assert not it.looks(1, slowed=False)
    assert not it.looks(3, slowed=False)
    assert it.said == [True, False]


def test_a_device_that_says_nothing_is_not_watched(tmp_path: Path) -> None:
    watch = heat.HeatWatch(Thermometer(tmp_path), lambda _throttled, _why: None)
    watch.start()
    assert "heat watch" not in {thread.name for thread in threading.enumerate()}
    watch.stop()


def test_a_rest_is_nine_rounds_long_and_a_minute_at_most() -> None:
    assert heat.rest_s(0.1) == pytest.approx(0.9)
    assert heat.rest_s(30.0) == 60.0


# --- who waits -------------------------------------------------------------------------------------------------


def test_no_round_is_for_background_work_while_it_rests() -> None:
    scheduler = Scheduler(max_batch=8)
    job, read = Work("b", "1", True, "decoding"), Work("b", "2", True, "reading", 100)
    scheduler.add(job)
    scheduler.add(read)
    scheduler.background_rests = True
    assert not scheduler.busy
    person = Work("a", "3", False, "decoding")
    scheduler.add(person)
    assert scheduler.busy
    for _ in range(50):
        assert scheduler.next_round() == (None, [person])
    scheduler.background_rests = False
    done = [scheduler.next_round() for _ in range(16)]
    assert any(job in each.step for each in done)
    assert any(each.read is read for each in done)


class Runner:
    """A worker on a small model, on a device whose heat the test decides."""

    def __init__(self, db: Database, engine: TransformersEngine, folder: Path) -> None:
        self.throttled = False
        conversations = Conversations(db, engine, in_memory=20, now_us=lambda: 0, on_evict=lambda _name, _left: None)
        loaded = Loaded(engine, ChatFormat.load(folder), conversations, 1024, "")
        self.worker = Worker(lambda: loaded, lambda _run, _token: None, throttled=lambda: self.throttled)
        self.worker.start()

    def set(self, throttled: bool) -> None:
        self.throttled = throttled
        self.worker.wake()

    def submit(self, conversation: str, *, background: bool, count: int = 30) -> Run:
        ask = ModelGenerate(
            conversation,
            [ChatMessage("user", "what is basalt?")],
            max_new_tokens=count,
            ignore_eos=True,
            priority="background" if background else "person",
        )
        run = Run(uuid7(), f"tester/{uuid7()}", ask, Future(), asker=f"tester/{background}")
        self.worker.submit(run)
        return run

    def wait_resting(self) -> None:
        wait_for(lambda: self.worker._scheduler.background_rests, "background work rests")


@pytest.fixture
def runner(db: Database, engine: TransformersEngine, small_models: dict[str, Path]) -> Iterator[Runner]:
    found = Runner(db, engine, small_models["llama"])
    yield found
    found.worker.stop()


def test_while_it_is_throttled_a_persons_run_goes_on_and_a_background_run_waits_for_its_end(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = runner.submit("before", background=False).done.result(DEADLINE_S).tokens
    monkeypatch.setattr(rounds, "rest_s", lambda _took_s: FOR_EVER_S)
    runner.set(True)
    job = runner.submit("job", background=True)
    runner.wait_resting()
    assert runner.submit("person", background=False).done.result(DEADLINE_S).tokens == expected
    runner.worker.between_tokens(lambda loaded: loaded.conversations.get("job")).result(DEADLINE_S)
    assert not job.done.done()
    runner.set(False)
    assert job.done.result(DEADLINE_S).tokens == expected


def test_a_device_that_stays_throttled_starves_nobody(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []

    def rest_s(took_s: float) -> float:
        rests.append(took_s)
        return 0.001

    monkeypatch.setattr(rounds, "rest_s", rest_s)
    runner.set(True)
    assert runner.submit("job", background=True).done.result(DEADLINE_S).finish_reason == "length"
    assert len(rests) >= 30, "a rest after each round"
    assert all(took_s > 0 for took_s in rests)


def test_a_run_that_rests_is_stopped_at_once(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "rest_s", lambda _took_s: FOR_EVER_S)
    runner.set(True)
    job = runner.submit("job", background=True)
    runner.wait_resting()
    assert runner.worker.cancel(job.identifier)
    assert job.done.result(DEADLINE_S).finish_reason == "cancelled"


# --- the service -----------------------------------------------------------------------------------------------


class Node:
    """A model runner in this process, on a device that is laid out in a folder."""

    def __init__(self, cleanup: ExitStack, folder: Path, model: Path, toml: str = "") -> None:
        from services.model_runner.service import ModelRunner

        self.states: list[ServiceState] = []
        self.events: list[Event] = []
        url = cleanup.enter_context(EmbeddedBroker()).url
        path = folder / "mindstream.toml"
        path.write_text(
            f'[node]\nname = "tomato"\ndata_dir = "{folder / "data"}"\n[broker]\nurl = "{url}"\n'
            f'[model]\nname = "{model}"\nthreads = 1\ndevice = "cpu"\n{toml}'
        )
        identity = load_or_create_identity(folder / "data", "tomato")
        peers = Peers(folder / "data", identity)
        self.bus = cleanup.enter_context(Bus(url=url, node="sprout", client="cli-1"))
        self.bus.hear(ServiceState, lambda message: self.states.append(message.data), service="model_runner")
        self.bus.hear(Event, lambda message: self.events.append(message.data))
        self.bus.wait_subscribed(DEADLINE_S)
        self.service = ModelRunner(Context(load_config(path, {}), identity, peers, folder / "runner", url))
        thread = threading.Thread(target=self.service.run, name="tomato/model_runner")
        thread.start()

        def end() -> None:
            self.service.stop()
            thread.join(DEADLINE_S)
            assert not thread.is_alive()

        cleanup.callback(end)

    def details(self) -> dict[str, Any]:
        return dict(self.states[-1].details) if self.states else {}

    def heard(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its root; looked at a hundred times a second."""
    root = tmp_path / "root"
    lay_out(root, BOARD)
    monkeypatch.setattr("services.model_runner.service.Thermometer", lambda: Thermometer(root))
    monkeypatch.setattr(heat, "LOOK_S", 0.01)
    monkeypatch.setattr(heat, "COOL_S", 0.0)
    return root


def test_a_node_says_that_it_backs_off_and_that_it_is_over(
    device: Path, tmp_path: Path, small_models: dict[str, Path]
) -> None:
    with ExitStack() as cleanup:
        node = Node(cleanup, tmp_path, small_models["llama"])
        wait_for(lambda: node.details().get("throttled") is False, "the runner is ready")
        wait_for(lambda: node.details().get("hottest_c") == 55, "its temperature is shown")
        lay_out(device, SLOWED)
        wait_for(
            lambda: "cpufreq-cpu0" in node.details().get("throttled_reason", "") and node.heard("throttled-begun"),
            "it says that it backs off",
        )
        assert node.details()["throttled"] is True
        assert "cpufreq-cpu0" in node.heard("throttled-begun")[0].text
        assert node.states[-1].state == "ready"
        ask = ModelGenerate("job", [ChatMessage("user", "hello")], max_new_tokens=4, priority="background")
        assert node.bus.ask("tomato", ask, ttl_ms=TTL_MS).tokens, "slowly, but it is answered"
        lay_out(device, BOARD)
        wait_for(
            lambda: not node.details().get("throttled") and node.heard("resumed-background"), "it says that it is over"
        )
        wait_for(lambda: node.states[-1].counters.get("throttled.begun", 0) >= 1, "it is counted")


def test_a_node_that_shall_not_back_off_does_not_look(
    device: Path, tmp_path: Path, small_models: dict[str, Path]
) -> None:
    lay_out(device, SLOWED)
    with ExitStack() as cleanup:
        node = Node(cleanup, tmp_path, small_models["llama"], "back_off_when_throttled = false\n")
        wait_for(lambda: "throttled" in node.details(), "the runner is ready")
        assert "heat watch" not in {thread.name for thread in threading.enumerate()}
        assert node.details()["throttled"] is False
