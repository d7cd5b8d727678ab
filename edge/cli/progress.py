"""How far something long has come: a bar on a terminal, a line now and then elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_LINE_S = 5.0
OnBytes = Callable[[int, int], None]


@contextmanager
def progress(name: str) -> Iterator[OnBytes]:
    """Bytes of one thing: what it yields is called with (done, in all); 0 in all when that is not known."""
    with phases(name) as on_phase:
        yield lambda done, total: on_phase("", done, total)


@contextmanager
def phases(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """The same of what has several phases: what it yields is called with (phase, bytes done, bytes in all)."""
    if not sys.stderr.isatty():
        yield _lines(name)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as SpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), SpeedColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, TaskID] = {}

    def draw(phase: str, done: int, total: int) -> None:
        bars.start()  # with the first bytes: a question may be asked before
        if phase not in tasks:
            tasks[phase] = bars.add_task(f"{name} {phase}".rstrip(), total=None)
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
            of = f" of {total / 1e6:,.1f} MB" if total else ""
            print(f"{name}{' ' * bool(phase)}{phase}: {done / 1e6:,.1f}{'' if total else ' MB'}{of}", file=sys.stderr)

    return line
