"""How far something long has come: a bar on a terminal, a line now and then elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_LINE_S = 5.0
OnBytes = Callable[[int, int], None]
OF_TOKENS = frozenset({"read", "look", "test"})
"""Phases of a snapshot that count tokens, not bytes."""


@contextmanager
def progress(name: str) -> Iterator[OnBytes]:
    """Bytes of one thing: what it yields is called with (done, in all); 0 in all when that is not known."""
    with phases(name) as on_phase:
        yield lambda done, total: on_phase("", done, total)


@contextmanager
def phases(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """The same of what has several phases: what it yields is called with (phase, done, in all): bytes, or tokens of
    phases ``OF_TOKENS``."""
    if not sys.stderr.isatty():
        yield _lines(name)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class Size(DownloadColumn):
        """How much is done of how much."""

        def render(self, task: Task) -> Text:
            if not task.completed and not task.total:
                return Text("")
            if not task.fields["tokens"]:
                return super().render(task)
            return Text(_tokens(int(task.completed), int(task.total or 0)), style="progress.download")

    class Speed(ProgressColumn):
        """Of bytes."""

        def __init__(self) -> None:
            super().__init__()
            self._speed = TransferSpeedColumn()

        def render(self, task: Task) -> Text:
            return Text("") if task.fields["tokens"] or not task.completed else self._speed.render(task)

    columns = (TextColumn("{task.description}"), BarColumn(), Size(), Speed(), TimeRemainingColumn())
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, TaskID] = {}

    def draw(phase: str, done: int, total: int) -> None:
        bars.start()  # with the first bytes: a question may be asked before
        if phase not in tasks:
            tasks[phase] = bars.add_task(f"{name} {phase}".rstrip(), total=None, tokens=phase in OF_TOKENS)
        for other, task in tasks.items():
            bars.update(task, visible=other == phase)  # one after another: the last one is under way
        bars.update(tasks[phase], completed=done, total=total or None)

    try:
        yield draw
    finally:
        bars.stop()


def _lines(name: str) -> Callable[[str, int, int], None]:
    last_s = time.monotonic()

    def line(phase: str, done: int, total: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= PLAIN_LINE_S:
            last_s = time.monotonic()
            said = _tokens(done, total) if phase in OF_TOKENS else _megabytes(done, total)
            print(f"{name}{' ' * bool(phase)}{phase}" + (f": {said}" if done or total else ""), file=sys.stderr)

    return line


def _tokens(done: int, total: int) -> str:
    return f"{done:,} of {total:,} tokens" if total else f"{done:,} tokens"


def _megabytes(done: int, total: int) -> str:
    return f"{done / 1e6:,.1f}" + (f" of {total / 1e6:,.1f} MB" if total else " MB")
