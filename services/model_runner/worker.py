"""The worker: one thread that owns the engine and all conversations.

It loads the model, then makes one round after another (rounds.py) for as long as there are runs. Between two rounds
the state of every conversation is whole, so jobs that must not wait for the end of a run (saving, resuming) are done
there. This module knows nothing of the bus: it is given functions to call.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from protocol.errors import Cancelled, MindstreamError, ModelUnavailable
from protocol.messages import RunToken
from services.model_runner.answers import Run
from services.model_runner.rounds import Loaded, Report, Rounds
from services.model_runner.scheduler import Scheduler, Work

log = logging.getLogger(__name__)

T = TypeVar("T")


class Worker:
    """Loads the model, then answers runs.

    Args:
        load: loads the model; may raise ModelUnavailable, and is then tried again with backoff.
        say_token: called on the worker's thread with a run's id and each of its tokens: it must not take long.
        report: called on any thread with the name of a counter, and what happened, to be said (or nothing).
        throttled: whether the device is slowed down now (heat.py); ``wake`` the worker when that changes.
    """

    RETRY_FIRST_S, RETRY_MAX_S = 5.0, 300.0
    ROUNDS_A_PIECE = 4
    """While somebody is being answered, a long job gets one piece in so many rounds."""

    def __init__(
        self,
        load: Callable[[], Loaded],
        say_token: Callable[[str, RunToken], None],
        report: Report = lambda _counter, _text: None,
        throttled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._load = load
        self._say_token = say_token
        self._report = report
        self._throttled = throttled
        self._wake = threading.Condition()
        self._scheduler = Scheduler()
        self._runs: dict[Work, Run] = {}
        self._jobs: deque[tuple[Callable[[Loaded], Any], Future[Any]]] = deque()
        self._long_jobs: deque[_LongJob] = deque()
        self._rounds_since_piece = 0
        self._stopping = False
        self.loaded: Loaded | None = None
        self.rounds: Rounds | None = None
        self.unavailable: MindstreamError | None = None
        """Why there is no model; None while it is being loaded, and once it is."""
        self._thread = threading.Thread(target=self._main, name="model worker", daemon=True)

    def start(self) -> None:
        """Begin to load the model."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the current round; what has not ended is left to the journal."""
        with self._wake:
            self._stopping = True
            waiting = [done for _, done in self._jobs] + [each.done for each in self._long_jobs]
            self._jobs.clear()
            self._long_jobs.clear()
            self._wake.notify_all()
        for done in waiting:
            done.set_exception(_stopped())
        if self._thread.is_alive():
            self._thread.join(10.0)

    def wake(self) -> None:
        """Let it look again at what there is to do; on any thread."""
        with self._wake:
            self._wake.notify_all()

    @property
    def died(self) -> bool:
        """Whether its thread was started and has ended without being asked to."""
        return self._thread.ident is not None and not self._thread.is_alive() and not self._stopping

    @property
    def queued(self) -> int:
        """Runs that have not begun."""
        return self._scheduler.count("waiting")

    @property
    def running(self) -> list[str]:
        """The conversations that are being answered now."""
        return self.rounds.answering if self.rounds is not None else []

    def submit(self, run: Run) -> None:
        """Queue a run; its future resolves with its end. Raises ModelUnavailable when there is no model."""
        work = Work(run.asker, run.ask.conversation, background=run.ask.priority == "background")
        with self._wake:
            self._check_available()
            self._runs[work] = run
            self._scheduler.add(work)
            self._wake.notify_all()

    def cancel(self, identifier: str) -> bool:
        """Stop a run, begun or not; whether there was one."""
        with self._wake:
            found = next((work for work, run in self._runs.items() if run.identifier == identifier), None)
            if found is None:
                return False
            run = self._runs[found]
            if found.stage != "waiting":
                run.cancelled.set()
                self._scheduler.changed = True  # It may be resting.
                self._wake.notify_all()
                return True
            self._scheduler.remove(found)
            del self._runs[found]
        run.done.set_result(run.not_begun())
        return True

    def between_tokens(self, job: Callable[[Loaded], T]) -> Future[T]:
        """Do ``job`` on the worker thread as soon as the state is whole. Raises ModelUnavailable, or Cancelled at
        the end of the service; the future too."""
        done: Future[T] = Future()
        with self._wake:
            self._check_available()
            if self._stopping:
                raise _stopped()
            self._jobs.append((job, done))
            self._wake.notify_all()
        return done

    def in_pieces(self, job: Callable[[Loaded], Generator[None, None, T]]) -> Future[T]:
        """Do ``job`` on the worker thread in short pieces, each up to its next ``yield``: all at once while nobody is
        being answered, else one piece every so many rounds, so that no answer waits for more than that. The state is
        whole between pieces, and may have gone on. Raises as ``between_tokens``."""
        done: Future[T] = Future()
        with self._wake:
            self._check_available()
            if self._stopping:
                raise _stopped()
            self._long_jobs.append(_LongJob(job, done))
            self._wake.notify_all()
        return done

    def _check_available(self) -> None:
        if self.unavailable is not None:
            # Without its traceback, which would grow with each asker that it is raised for.
            raise self.unavailable.with_traceback(None)

    # --- on the worker thread -------------------------------------------------------------------------------

    def _main(self) -> None:
        loaded = self._load_with_backoff()
        if loaded is None:
            return
        rounds = self.rounds = Rounds(
            loaded, self._scheduler, self._runs, self._wake, self._say_token, self._report, self._throttled
        )
        while not self._stopping:
            with self._wake:
                rest_s = rounds.rest()
                while not (
                    self._scheduler.busy or self._scheduler.changed or self._jobs or self._long_jobs or self._stopping
                ):
                    self._wake.wait(rest_s)
                    rest_s = rounds.rest()
            self._do_jobs(loaded)
            self._do_piece(loaded)
            rounds.end_cancelled()
            rounds.begin_waiting()
            if self._scheduler.busy and not self._stopping:
                rounds.round()
        rounds.stop()

    def _load_with_backoff(self) -> Loaded | None:
        wait_s = self.RETRY_FIRST_S
        while not self._stopping:
            try:
                self.loaded = self._load()
                self.unavailable = None
                return self.loaded
            except Exception as raised:
                error = raised if isinstance(raised, MindstreamError) else _broken_model(raised)
                if error is raised:
                    log.error("%s", error)
                else:
                    log.exception("%s", error)
                with self._wake:
                    self.unavailable = error
                    waiting = [run.done for run in self._runs.values()] + [done for _, done in self._jobs]
                    waiting += [each.done for each in self._long_jobs]
                    for work in tuple(self._runs):
                        self._scheduler.remove(work)
                    self._runs.clear()
                    self._jobs.clear()
                    self._long_jobs.clear()
                for future in waiting:
                    future.set_exception(error.with_traceback(None))
                with self._wake:
                    self._wake.wait_for(lambda: self._stopping, wait_s)
                wait_s = min(self.RETRY_MAX_S, wait_s * 2)
        return None

    def _do_jobs(self, loaded: Loaded) -> None:
        while True:
            with self._wake:
                if not self._jobs:
                    return
                job, done = self._jobs.popleft()
            try:
                done.set_result(job(loaded))
            except Exception as error:  # noqa: BLE001 - it is the job's outcome, and the asker is told
                done.set_exception(error)

    def _do_piece(self, loaded: Loaded) -> None:
        self._rounds_since_piece += 1
        with self._wake:
            if not self._long_jobs or (self._scheduler.busy and self._rounds_since_piece < self.ROUNDS_A_PIECE):
                return
            job = self._long_jobs.popleft()
        self._rounds_since_piece = 0
        try:
            if job.pieces is None:
                job.pieces = job.make(loaded)
            next(job.pieces)
        except StopIteration as end:
            job.done.set_result(end.value)
        except Exception as error:  # noqa: BLE001 - it is the job's outcome, and the asker is told
            job.done.set_exception(error)
        else:
            with self._wake:
                if not self._stopping:
                    self._long_jobs.append(job)  # several take turns
                    return
            job.pieces.close()
            job.done.set_exception(_stopped())


@dataclass
class _LongJob:
    make: Callable[[Loaded], Generator[None, None, Any]]
    done: Future[Any]
    pieces: Generator[None, None, Any] | None = None


def _stopped() -> Cancelled:
    return Cancelled(
        "waiting for the model: the model runner is stopping", hint="ask again when it is back", reason="stopping"
    )


def _broken_model(error: Exception) -> ModelUnavailable:
    """For what a library raised that nobody foresaw: the service goes on, says so, and tries again."""
    return ModelUnavailable(
        f"loading the model: unexpected {type(error).__name__}: {error}",
        hint="install the model again; the log of the model runner has the details",
        reason=type(error).__name__,
    )
