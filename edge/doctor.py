"""`mindstream doctor`: what this node has, what it lacks, and what to type next. Changes nothing it can help.

Each check stands alone: one that fails does not hide the next. A check that cannot be made says so.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import queue
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from broker import check as broker_check
from broker.base import answers_connect
from edge.clock_sync import read_clock_synced
from edge.config import Config, find_config, load_config
from edge.files import storage_errors
from edge.hardware import describe
from edge.model_pull import pulled_bytes
from edge.model_registry import default_cache_folder, model_named
from edge.models import check_sizes, find, is_path
from edge.node_lock import running_in
from edge.pool_files import PoolFiles, open_files
from edge.pool_store import ENTRIES, LEAST_FREE_BYTES
from edge.power import find_meter, visible_gpu
from edge.process import free_bytes
from edge.service_table import BY_NAME, SERVICES, missing_packages
from edge.supervisor import MIN_FREE_BYTES
from edge.thermal import Thermometer
from protocol.errors import BrokerError, MindstreamError, ModelUnavailable, NotConnected, StorageError
from protocol.identity import fingerprint_of
from protocol.ids import uuid7

OK, WARNING, FAILED = "ok", "warning", "failed"
LOW_FREE_BYTES = 1024**3
POOL_WAIT_S = 15.0
"""Snapshots are tens of megabytes each: with less than this a node is soon full."""
CONVERTED_RATIO = 3
"""A converted model's size to its GGUF's: 2.8 measured for SmolLM2's Q4_1, 2.3 for Gemma's Q4_K_M."""
BROKER_TIMEOUT_S = 5.0
LOOK_IT_UP = "docs/troubleshooting.md"
CORE_PACKAGES = (
    "apsw",
    "blake3",
    "cryptography",
    "iotcore",
    "msgpack",
    "msgspec",
    "paho",
    "prometheus_client",
    "psutil",
    "rich",
    "typer",
)
EXTRAS = {
    "model": ("accelerate", "gguf", "numpy", "safetensors", "torch", "transformers"),
    "edge": ("cv2", "numpy", "onnxruntime", "sounddevice"),
}
"""Extra of pyproject.toml to what it must make importable."""


class Check(msgspec.Struct):
    """What was looked at."""

    name: str
    verdict: str
    """``ok``, ``warning`` (the node runs without it) or ``failed`` (it does not)."""
    found: str
    next_step: str = ""
    """What to type or to change; empty when nothing is wrong."""


def examine(config_path: Path | None = None) -> list[Check]:
    """All checks, in the order in which they are best mended."""
    checks = [_python(), _core(), *_extras()]
    try:
        config = load_config(config_path)
    except MindstreamError as error:
        return [*checks, Check("configuration", FAILED, error.message, error.hint or LOOK_IT_UP)]
    path = config_path or find_config()
    checks.append(Check("configuration", OK, str(path) if path else "no file: the defaults"))
    for name, check in _CHECKS.items():
        try:
            checks.append(check(config))
        except MindstreamError as error:
            checks.append(Check(name, FAILED, error.message, error.hint or LOOK_IT_UP))
        except OSError as error:
            checks.append(Check(name, FAILED, f"the check cannot be made: {error}", "look at that file's permissions"))
    return checks


def _python() -> Check:
    found = f"Python {platform.python_version()}, {sys.executable}"
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Check("python", OK, found)
    return Check("python", FAILED, found, "make install PYTHON=python3.11 (3.10 to 3.13 are supported)")


def _core() -> Check:
    missing = [name for name in CORE_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return Check("packages", FAILED, f"missing: {', '.join(missing)}", "make install, or pip install -e .")
    return Check("packages", OK, "the core's are all here")


def _extras() -> list[Check]:
    checks = []
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        needed_by = [row.name for row in SERVICES if row.extra == extra and missing_packages(row)]
        without = f"; without them no {', '.join(needed_by)}" if needed_by else ""
        if missing:
            found = f"missing: {', '.join(missing)}{without}"
            checks.append(Check(f"extra {extra}", WARNING, found, f"make install EXTRAS={extra},dev"))
        else:
            checks.append(Check(f"extra {extra}", OK, "all here"))
    return checks


def _data_folder(config: Config) -> Check:
    folder = config.node.folder()
    # The folder may not be there yet: then its nearest parent must let it be made.
    place = next(path for path in (folder, *folder.parents) if path.exists())
    with (
        storage_errors(f"writing into {place} (for the data folder {folder})"),
        tempfile.TemporaryFile(dir=place) as file,
    ):
        file.write(b"\0" * 4096)
        file.flush()
        os.fsync(file.fileno())
    free = free_bytes(place)
    found = f"{folder}, {free / 1e9:.1f} GB free"
    if free < MIN_FREE_BYTES:
        return Check("data folder", FAILED, found, "free some space there, or set node.data_dir to another disk")
    if free < LOW_FREE_BYTES:
        return Check("data folder", WARNING, found, "free some space: snapshots are tens of megabytes each")
    return Check("data folder", OK, found)


def _node(config: Config) -> Check:
    from edge import units

    running = running_in(config.node.folder())
    if running is None and (units.UNIT_DIR / units.TEMPLATE).exists():
        states = units.states(config.service_names())
        if waiting := [f"{name} is {state}" for name, state in states.items() if state != "active"]:
            unit = units.instance(next(name for name, state in states.items() if state != "active"))
            return Check("node", WARNING, f"under systemd: {', '.join(waiting)}", f"journalctl --unit {unit}")
        if states:
            return Check("node", OK, f"{config.node.name} runs under systemd: {', '.join(states)}")
    if running is None:
        return Check("node", WARNING, f"{config.node.name} is not running", "mindstream up")
    return Check("node", OK, f"{running.node} runs, process {running.pid}")


def _units(config: Config) -> Check:
    from edge import units

    if not (units.UNIT_DIR / units.TEMPLATE).exists():
        return Check("units", OK, "no systemd units of Mindstream here: this node runs by `mindstream up`")
    wrong = [each for each in units.check(units.UNIT_DIR, wanted=config.service_names()) if each.verdict != "ok"]
    if wrong:
        found = ", ".join(f"{each.file} is {each.verdict}" for each in wrong)
        return Check("units", WARNING, found, wrong[0].next_step if len(wrong) == 1 else "mindstream units check")
    return Check("units", OK, f"those in {units.UNIT_DIR} are as rendered")


def _broker(config: Config) -> Check:
    settings = config.broker
    if settings.url:
        return _configured_broker(config)
    running = running_in(config.node.folder())
    if running is not None:
        host, _, port = running.broker_url.removeprefix("mqtt://").partition(":")
        if answers_connect(host, int(port)):
            return Check("broker", OK, f"embedded, answers at {running.broker_url}")
        return Check("broker", FAILED, f"embedded, does not answer at {running.broker_url}", "mindstream status")
    if settings.port and answers_connect("127.0.0.1", settings.port, timeout_s=2.0):
        return Check(
            "broker",
            FAILED,
            f"broker.port {settings.port} is taken: another MQTT broker answers there",
            f'set broker.url = "mqtt://127.0.0.1:{settings.port}" to use it, or broker.port = 0',
        )
    if settings.port and (why := _cannot_listen(settings.port)):
        return Check(
            "broker",
            FAILED,
            f"broker.port {settings.port} cannot be listened on: {why}",
            f"set broker.port to another, or to 0 for any; `ss -ltnp sport = {settings.port}` names who has it",
        )
    return Check("broker", OK, f"embedded, will be started on port {settings.port or 'any'} by `mindstream up`")


def _cannot_listen(port: int) -> str:
    """Why an embedded broker could not listen on ``port``; empty when it could."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _configured_broker(config: Config) -> Check:
    import logging

    from edge.bus import Bus

    settings = config.broker
    logging.getLogger("edge.connection").setLevel(logging.CRITICAL)
    try:
        bus = Bus(
            url=settings.url,
            node=config.node.name,
            client=f"doctor-{os.getpid()}",
            username=settings.username,
            password=settings.password(),
            ca_file=settings.ca_file,
            protocol=settings.protocol,
        )
        started_s = time.monotonic()
        try:
            bus.start(BROKER_TIMEOUT_S)
        finally:
            bus.stop()
    except NotConnected as error:
        # "Ask the doctor" is no advice of the doctor's.
        hint = "" if "mindstream doctor" in error.hint else error.hint
        return Check("broker", FAILED, error.message, hint or "start it, or correct broker.url; services wait for it")
    took_ms = (time.monotonic() - started_s) * 1000
    return Check("broker", OK, f"{settings.url} answered in {took_ms:.0f} ms (MQTT {bus.protocol})")


def _broker_configuration(config: Config) -> Check:
    name = "broker configuration"
    path = Path(config.broker.config_file) if config.broker.config_file else broker_check.installed_config()
    if path is None:
        found = "the embedded broker needs none" if not config.broker.url else "none of ours on this machine"
        return Check(name, OK, found, "" if not config.broker.url else "mindstream broker render device, or hub")
    try:
        findings = broker_check.check(path)
    except BrokerError as error:
        return Check(name, WARNING, error.message, error.hint)
    worst = broker_check.worst(findings)
    if worst == OK:
        return Check(name, OK, f"{path}: nothing is wrong")
    first = next(each for each in findings if each.verdict == worst)
    more = sum(each.verdict != OK for each in findings) - 1
    also = f", and {more} more: `mindstream broker check {path}`" if more else ""
    return Check(name, worst, f"{path}: {first.name}: {first.found}{also}", first.next_step)


def _keys(config: Config) -> Check:
    from edge.keys import Peers, load_or_create_identity

    folder = config.node.folder()
    if not (folder / "keys").exists():
        return Check("keys", WARNING, "this node has no key yet", "mindstream keys show makes one")
    identity = load_or_create_identity(folder, config.node.name)
    peers = Peers(folder, identity).table()
    found = f"{fingerprint_of(identity.public_key)}, {len(peers)} peers trusted"
    if not peers:
        return Check("keys", OK, found, "to work with others: mindstream keys trust NODE FINGERPRINT")
    return Check("keys", OK, found)


def _model(config: Config) -> Check:
    if "model_runner" not in config.service_names():
        return Check("model", OK, "no model runner on this node: it needs none")
    name, cache = config.model.name, default_cache_folder()
    try:
        files = find(name, [Path(folder) for folder in config.model.folders], cache)
        if files is not None:
            check_sizes(files)
    except ModelUnavailable as error:
        return Check("model", WARNING, error.message, error.hint)
    if files is None:
        if is_path(name):
            return Check("model", WARNING, f"{name} holds no config.json with safetensors", "correct model.name")
        model = model_named(name, cache)
        terms = f", terms to accept: {model.licence.url}" if model.licence.terms else ""
        begun = f"; {pulled_bytes(cache, name) / 1e6:.0f} MB of it are pulled" if pulled_bytes(cache, name) else ""
        found = f"{name} is not on this machine ({model.size_bytes / 1e6:.0f} MB, {model.licence.name}{terms}){begun}"
        return Check("model", WARNING, found, model.how_to_get)
    found = f"{files.name} in {files.folder}, {files.reason}" + (f", {files.licence}" if files.licence else "")
    if is_path(name):
        return Check("model", OK, found)
    if files.ready:
        return Check("model", OK, found, f"to read it again, byte for byte: mindstream models verify {name}")
    place = next(path for path in (cache, *cache.parents) if path.exists())
    needed, free = CONVERTED_RATIO * model_named(name, cache).size_bytes, free_bytes(place)
    if free < needed + MIN_FREE_BYTES:
        found += f": it cannot be converted, {free / 1e6:.0f} MB are free in {place}, {needed / 1e6:.0f} MB are needed"
        return Check("model", WARNING, found, "free some space there, or set XDG_CACHE_HOME to another disk")
    return Check("model", OK, f"{found}: converted at the first start", f"mindstream models prepare {name}")


def _gateway(config: Config) -> Check:
    from edge.gateway_token import base_url, read_token, token_file

    settings = config.gateway
    if not settings.port:
        return Check("endpoint", OK, "off: gateway.port is 0, no program uses models through this node")
    if missing := missing_packages(BY_NAME["gateway"]):
        found = f"gateway.port is {settings.port}, and missing: {', '.join(missing)}"
        return Check("endpoint", WARNING, found, "make install EXTRAS=gateway,dev")
    if "gateway" not in config.service_names():
        found = f"gateway.port is {settings.port}, and services.enabled does not name the service"
        return Check("endpoint", WARNING, found, 'add "gateway" to services.enabled')
    path = token_file(config)
    if path.exists():
        read_token(path)
    running = running_in(config.node.folder()) is not None
    if not running and (why := _cannot_listen(settings.port)):
        found = f"gateway.port {settings.port} cannot be listened on: {why}"
        return Check("endpoint", WARNING, found, "set gateway.port to another")
    told = f"token in {path}" if path.exists() else "its token is made at the first start"
    return Check("endpoint", OK, f"{base_url(settings)}, {told}")


def _hardware(_config: Config) -> Check:
    found = describe()
    memory = f", {found.memory_bytes / 1e9:.0f} GB" if found.memory_bytes else ""
    gpu = "CUDA" if found.cuda else f"no CUDA ({found.cuda_reason})"
    bf16 = f"bfloat16 by {found.bf16}" if found.bf16 else "no bfloat16 arithmetic"
    return Check("machine", OK, f"{found.cpu_model or found.arch}, {found.cores} CPUs{memory}, {bf16}, {gpu}")


def _pool(config: Config) -> Check:
    if not config.pool.enabled or "model_runner" not in config.service_names():
        return Check("pool", OK, "not used here")
    folder = config.node.folder() / "model_runner" / "pool"
    files = open_files(config.pool.url, folder)
    try:
        entries = _try_pool(files, None if config.pool.url else folder)
    except MindstreamError as error:
        # Nothing depends on it: prompts are read.
        return Check("pool", WARNING, error.message, error.hint or LOOK_IT_UP)
    found = (
        f"{files.where}: {len(entries)} entries, {sum(entries.values()) / 1e6:.1f} MB of {config.pool.most_mib:,} MiB"
    )
    if not config.pool.url:
        free = free_bytes(next(path for path in (folder, *folder.parents) if path.exists()))
        if free < LEAST_FREE_BYTES:
            return Check(
                "pool",
                WARNING,
                f"{found}; {free / 1e6:.0f} MB of the disk are free, and it leaves {LEAST_FREE_BYTES / 1e6:.0f} MB",
                "free some space there, or set pool.url to another place",
            )
    return Check("pool", OK, found)


def _try_pool(files: PoolFiles, folder: Path | None) -> dict[str, int]:
    """Names and sizes of the pool's entries, once a file was written, read and removed there. Raises StorageError.

    ``folder``: where it is on this machine; it may still have to be made.
    """
    if folder is not None:
        place = next(path for path in (folder, *folder.parents) if path.exists())
        doing = f"writing into {place} (for the pool)"
        with storage_errors(doing), tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0" * 4096)
            file.flush()
        return files.list(ENTRIES)
    answers: queue.SimpleQueue[dict[str, int] | BaseException] = queue.SimpleQueue()

    def ask() -> None:
        name = str(uuid7())
        try:
            files.write("checks", name, [b"mindstream doctor"])
            files.read("checks", name)
            files.remove("checks", name)
            answers.put(files.list(ENTRIES))
        except BaseException as error:  # noqa: BLE001 - raised by who waits
            answers.put(error)

    # Some backends wait for minutes. The thread ends with the process.
    threading.Thread(target=ask, name="pool check", daemon=True).start()
    try:
        found = answers.get(timeout=POOL_WAIT_S)
    except queue.Empty:
        raise StorageError(
            f"trying the pool at {files.where}: nothing was answered for {POOL_WAIT_S:g} s",
            hint="is pool.url right and reachable? prompts are read meanwhile",
            reason="no answer",
        ) from None
    if isinstance(found, MindstreamError):
        raise found
    if isinstance(found, BaseException):
        raise StorageError(
            f"trying the pool at {files.where}: {found}", hint="is pool.url right?", reason=str(found)
        ) from found
    return found


def _energy(_config: Config) -> Check:
    meter = find_meter(gpu=visible_gpu(0) if describe().cuda else None)
    if meter.sensor:
        return Check("energy", OK, f"measured by {meter.sensor}")
    next_step = "let the node's user read that file, by a udev rule or its group" if "root only" in meter.reason else ""
    return Check("energy", OK, f"not measured: {meter.reason}", next_step)


def _heat(_config: Config) -> Check:
    thermometer = Thermometer()
    if not thermometer.sources:
        return Check("heat", OK, "this device has no file that says whether it is throttled")
    heat = thermometer.look()
    hottest = f"{heat.hottest_zone} {heat.hottest_c:.0f} °C, " if heat.hottest_c is not None else ""
    before = f"; {heat.before}" if heat.before else ""
    if not heat.throttled:
        return Check("heat", OK, f"{hottest}not throttled ({thermometer.sources}){before}")
    found = f"{hottest}throttled: {'; '.join(heat.reasons)}{before}"
    if heat.for_want_of_power:
        return Check("heat", WARNING, found, "give it a power supply and a cable of the current that the board wants")
    return Check("heat", WARNING, found, "give it air, a heat sink or a fan, or a lower power mode; it mends itself")


def _clock(_config: Config) -> Check:
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    if read_clock_synced():
        return Check("clock", OK, f"{now}, synchronised")
    next_step = "timedatectl set-ntp true" if shutil.which("timedatectl") else "install chrony or another NTP client"
    return Check("clock", WARNING, f"{now}, not known to be synchronised: entries say so", next_step)


_CHECKS: dict[str, Callable[[Config], Check]] = {
    "data folder": _data_folder,
    "keys": _keys,
    "node": _node,
    "units": _units,
    "broker": _broker,
    "broker configuration": _broker_configuration,
    "model": _model,
    "endpoint": _gateway,
    "pool": _pool,
    "machine": _hardware,
    "energy": _energy,
    "heat": _heat,
    "clock": _clock,
}
