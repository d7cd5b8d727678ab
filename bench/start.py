"""`mindstream bench start`: how long the help takes, and a node without a model until it is ready.

Both are whole processes, as a user starts them: the interpreter's own start is in the figures, and stands beside them
as ``python_ms``, the baseline. Runs of the help and of the bare interpreter alternate; medians are given.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench.report import Figures, Progress, file_system, machine, silent, versions
from broker.child import spawn
from edge.bus import Bus
from edge.node_lock import running_in
from protocol.codec import Received
from protocol.errors import NotConnected
from protocol.messages import NodeState

READY_TIMEOUT_S = 60.0
_HELP = ["-c", "from edge.cli import main; main(['--help'])"]
_NOTHING = ["-c", "pass"]


def run(*, quick: bool = False, progress: Progress = silent) -> Figures:
    """Measure. Raises NotConnected when a node does not become ready in a minute."""
    rounds, starts = (2, 1) if quick else (15, 5)
    _time_ms(_HELP)  # the first one reads files from the disk and may write byte code
    help_ms, python_ms = [], []
    for _ in range(rounds):
        python_ms.append(_time_ms(_NOTHING))
        help_ms.append(_time_ms(_HELP))
    progress(f"mindstream --help: {statistics.median(help_ms):.0f} ms")
    ready_s = []
    with tempfile.TemporaryDirectory(prefix="mindstream-bench-") as folder:
        for number in range(starts):
            # A new folder each time: keys and databases are made, as at a node's first start.
            ready_s.append(_time_up(Path(folder) / str(number)))
            progress(f"mindstream up, start {number + 1}: ready after {ready_s[-1]:.2f} s")
        disk = file_system(Path(folder))
    return {
        "help_ms": statistics.median(help_ms),
        "help_max_ms": max(help_ms),
        "python_ms": statistics.median(python_ms),
        "up_ready_s": statistics.median(ready_s),
        "up_ready_max_s": max(ready_s),
        "services": "presence memory_store sync_bridge, embedded broker",
        "machine": f"{machine()}, data on {disk}",
        "versions": versions("typer", "msgspec", "paho-mqtt", "iotcore"),
        "baseline": "python_ms: the interpreter running nothing; up_ready_s is from the start of the process to a"
        " retained node state `ready`",
    }


def _time_ms(arguments: list[str]) -> float:
    started_s = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=_checkout())
    return (time.perf_counter() - started_s) * 1000


def _time_up(folder: Path) -> float:
    """Seconds from starting ``mindstream up`` in an empty folder to the node's retained ``ready``."""
    folder.mkdir()
    config = folder / "mindstream.toml"
    config.write_text(
        f'[node]\nname = "bench"\ndata_dir = "{folder / "data"}"\n[broker]\nport = 0\n'
        '[services]\nenabled = ["memory_store", "sync_bridge"]\n'
    )
    program = f"from edge.cli import main; main(['--config', {str(config)!r}, 'up'])"
    log_path = folder / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MINDSTREAM_")}
    with log_path.open("wb") as log:
        started_s = time.perf_counter()
        process = spawn([sys.executable, "-c", program], stdout=log, stderr=log, cwd=_checkout(), env=environment)
    try:
        return _wait_ready(process, folder / "data", started_s)
    except NotConnected as error:
        error.hint = log_path.read_text(errors="replace")[-2000:]
        raise
    finally:
        process.terminate()
        process.wait()


def _wait_ready(process: subprocess.Popen[bytes], data_dir: Path, started_s: float) -> float:
    ready = threading.Event()
    took_s = 0.0

    def hear(message: Received) -> None:
        nonlocal took_s
        if message.data.state == "ready" and not ready.is_set():
            took_s = time.perf_counter() - started_s
            ready.set()

    deadline_s = started_s + READY_TIMEOUT_S
    while (running := running_in(data_dir)) is None:
        if process.poll() is not None or time.perf_counter() > deadline_s:
            raise NotConnected("measuring `mindstream up`: it has no broker", reason="not started")
        time.sleep(0.005)
    bus = Bus(url=running.broker_url, node="bench", client="bench")
    bus.hear(NodeState, hear, node="bench")
    try:
        bus.start(READY_TIMEOUT_S)
        if not ready.wait(max(0.0, deadline_s - time.perf_counter())):
            raise NotConnected(f"measuring `mindstream up`: not ready after {READY_TIMEOUT_S:.0f} s", reason="slow")
    finally:
        bus.stop()
    return took_s


def _checkout() -> Path:
    return Path(__file__).resolve().parent.parent
