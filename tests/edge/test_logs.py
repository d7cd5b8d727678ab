"""Logs as a journal, a collector of JSON and a person read them; and that no secret is ever in them."""

from __future__ import annotations

import array
import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.embedded import EmbeddedBroker
from edge import logs
from edge.config import Config
from edge.journald import SEND_TIMEOUT_S, encode_entry
from edge.logs import JournalHandler, JsonFormatter, message_of, set_up_logging, wrapped
from protocol.errors import BadSignature, MalformedMessage, MindstreamError
from tests.support.nodes import CHECKOUT, MEMORY_SERVICES, Node, Watcher, wait_for
from tests.support.waiting import DEADLINE_S

SECRET = "correct-horse-battery-staple"


class Journal:
    """The other end of the native protocol: a real datagram socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(DEADLINE_S)

    def entry(self) -> dict[str, str]:
        """The next entry, out of the datagram or the memfd that came with it."""
        data, ancillary, _, _ = self._socket.recvmsg(1 << 20, socket.CMSG_SPACE(4))
        for level, kind, rights in ancillary:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            descriptors = array.array("i")
            descriptors.frombytes(rights[:4])
            seals = fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS)
            assert seals & fcntl.F_SEAL_WRITE
            assert seals & fcntl.F_SEAL_SHRINK
            with os.fdopen(descriptors[0], "rb") as file:
                file.seek(0)
                data = file.read()
        return decoded(data)

    def close(self) -> None:
        self._socket.close()
        self.path.unlink()


def decoded(data: bytes) -> dict[str, str]:
    """Take an entry apart, by the specification."""
    fields = {}
    while data:
        head, _, rest = data.partition(b"\n")
        name, equals, value = head.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, data = rest[8 : 8 + size], rest[8 + size + 1 :]
            assert rest[8 + size : 8 + size + 1] == b"\n"
        else:
            data = rest
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    found = Journal(tmp_path / "socket")
    yield found
    if found.path.exists():
        found.close()


@pytest.fixture
def log(journal: Journal, tmp_path: Path) -> Iterator[logging.Logger]:
    """A logger into the journal, with a file to fall back on."""
    logger = logging.getLogger("tests.logs")
    fallback = logging.FileHandler(tmp_path / "fallback")
    handler = JournalHandler("tomato", "memory_store", fallback, str(journal.path))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield logger
    logger.removeHandler(handler)
    handler.close()
    fallback.close()


@pytest.fixture
def root_logger() -> Iterator[None]:
    """What set_up_logging changes is put back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        if handler not in handlers:
            handler.close()
    root.handlers = handlers
    root.setLevel(level)
    logs._format = "text"


def config(format: str = "auto", level: str = "info") -> Config:
    found = Config()
    found.node.name = "tomato"
    found.log.format = format
    found.log.level = level
    return found


def test_an_entry_says_who_where_and_how_bad(log: logging.Logger, journal: Journal) -> None:
    log.warning("%d memories wait", 3)
    entry = journal.entry()
    assert entry["MESSAGE"] == "3 memories wait"
    assert entry["PRIORITY"] == "4"
    assert entry["SYSLOG_IDENTIFIER"] == "mindstream-memory_store"
    assert (entry["MINDSTREAM_NODE"], entry["MINDSTREAM_SERVICE"]) == ("tomato", "memory_store")
    assert entry["CODE_FILE"] == __file__
    assert entry["CODE_FUNC"] == "test_an_entry_says_who_where_and_how_bad"
    assert int(entry["CODE_LINE"]) > 100
    assert not any(name.startswith("MINDSTREAM_ERROR") for name in entry)


@pytest.mark.parametrize(
    ("level", "priority"),
    [("debug", "7"), ("info", "6"), ("warning", "4"), ("error", "3"), ("critical", "2")],
)
def test_levels_become_priorities(log: logging.Logger, journal: Journal, level: str, priority: str) -> None:
    getattr(log, level)("x")
    assert journal.entry()["PRIORITY"] == priority


def test_an_error_of_the_tree_among_the_arguments_gives_its_fields(log: logging.Logger, journal: Journal) -> None:
    error = MalformedMessage(
        "reading it", field="text", reason="not a text", topic="mindstream/v1/x", type="memory.put"
    )
    error.remote = "sprout/memory_store"
    log.warning("%s dropped a message: %s", "memory_store", error)
    entry = journal.entry()
    found = {name.removeprefix("MINDSTREAM_ERROR_"): value for name, value in entry.items() if "_ERROR_" in name}
    assert found == {
        "CODE": "malformed",
        "TOPIC": "mindstream/v1/x",
        "TYPE": "memory.put",
        "FIELD": "text",
        "REASON": "not a text",
        "REMOTE": "sprout/memory_store",
    }


def test_a_traceback_is_part_of_the_message_and_any_error_names_the_message_at_fault(
    log: logging.Logger, journal: Journal
) -> None:
    try:
        raise ZeroDivisionError("it was 0")
    except ZeroDivisionError:
        log.exception("failed on %s", "memory.put", extra={"topic": "mindstream/v1/x", "type": "memory.put"})
    entry = journal.entry()
    assert entry["MESSAGE"].startswith("failed on memory.put\nTraceback")
    assert entry["MESSAGE"].endswith("ZeroDivisionError: it was 0")
    assert entry["MINDSTREAM_ERROR_REASON"] == "ZeroDivisionError"
    assert entry["MINDSTREAM_ERROR_TOPIC"] == "mindstream/v1/x"
    try:
        raise BadSignature("checking it", reason="forged")
    except BadSignature:
        log.exception("refused")
    assert journal.entry()["MINDSTREAM_ERROR_CODE"] == "bad_signature"


def test_what_a_peer_said_cannot_add_a_field(log: logging.Logger, journal: Journal) -> None:
    log.warning("%s", "hello\nMINDSTREAM_NODE=forged\n\0PRIORITY=0")
    entry = journal.entry()
    assert entry["MINDSTREAM_NODE"] == "tomato"
    assert entry["PRIORITY"] == "4"
    assert entry["MESSAGE"] == "hello\nMINDSTREAM_NODE=forged\n\0PRIORITY=0"


@pytest.mark.parametrize("size", [10_000, 300_000, 20_000_000])
def test_an_entry_of_any_size_arrives(log: logging.Logger, journal: Journal, size: int) -> None:
    log.info("%s", "x" * size)
    assert len(journal.entry()["MESSAGE"]) == size


def test_the_bytes_are_those_of_the_specification() -> None:
    assert encode_entry({"MESSAGE": "a b", "FOO": "1\n2"}) == (
        b"MESSAGE=a b\nFOO\n\x03\x00\x00\x00\x00\x00\x00\x001\n2\n"
    )


def test_without_a_journal_entries_go_to_the_fallback_until_it_is_back(
    log: logging.Logger, journal: Journal, tmp_path: Path
) -> None:
    journal.close()
    log.error("nobody listens")
    assert "nobody listens" in (tmp_path / "fallback").read_text()
    again = Journal(journal.path)
    log.error("somebody does")
    assert again.entry()["MESSAGE"] == "somebody does"
    again.close()
    assert "somebody" not in (tmp_path / "fallback").read_text()


def test_a_journal_that_takes_nothing_does_not_hold_a_service_up(
    log: logging.Logger, journal: Journal, tmp_path: Path
) -> None:
    took_s = []
    deadline_s = time.monotonic() + DEADLINE_S
    # Nobody reads: the socket's queue fills up, one send waits for its timeout, and then none does for a while.
    while len((tmp_path / "fallback").read_bytes()) < 50_000:
        assert time.monotonic() < deadline_s
        began_s = time.monotonic()
        log.info("filling it %s", "x" * 1000)
        took_s.append(time.monotonic() - began_s)
    not_taken = (tmp_path / "fallback").read_text().count("filling it")
    assert max(took_s) > SEND_TIMEOUT_S / 2, "one of them waits"
    assert not_taken > 20
    assert sum(took_s) < not_taken / 2 * SEND_TIMEOUT_S, "the others do not, however slow this machine is"


def test_auto_takes_the_journal_only_when_stderr_is_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "from edge.config import Config\nfrom edge.logs import chosen_format\nprint(chosen_format(Config()))"
    file = tmp_path / "stream"
    with file.open("wb") as stream:
        status = os.fstat(stream.fileno())
        named = f"{status.st_dev}:{status.st_ino}"
        for journal_stream, expected in ((named, "journal"), (f"{status.st_dev}:1", "text"), ("", "text")):
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=CHECKOUT,
                env=os.environ | {"JOURNAL_STREAM": journal_stream},
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                check=True,
            )
            assert done.stdout.strip() == expected


def test_json_has_the_same_fields_one_object_a_line(
    root_logger: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up_logging(config("json"), "sync_bridge")
    try:
        raise MindstreamError("comparing", reason="no answer")
    except MindstreamError as error:
        logging.getLogger("x").exception("failed: %s", error)
    logging.getLogger("x").debug("not said at info")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert entry["MESSAGE"].startswith("failed: comparing\nTraceback")
    assert entry["MINDSTREAM_ERROR_REASON"] == "no answer"
    assert entry["MINDSTREAM_SERVICE"] == "sync_bridge"
    assert abs(int(entry["__REALTIME_TIMESTAMP"]) / 1e6 - time.time()) < 600
    assert message_of(line) == "failed: comparing"


def test_text_is_a_line_for_people(root_logger: None, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(config("text"), "supervisor", prefix=True)
    logging.getLogger("x").warning("hello")
    line = capsys.readouterr().err
    assert line.startswith("  supervisor | ")
    assert line.endswith(" WARNING hello\n")


def test_a_line_that_is_no_entry_becomes_one() -> None:
    entry = json.loads(wrapped("Segmentation fault", "tomato", "model_runner"))
    assert (entry["MESSAGE"], entry["MINDSTREAM_SERVICE"]) == ("Segmentation fault", "model_runner")
    record = logging.LogRecord("x", logging.INFO, "file", 1, "said", None, None)
    line = JsonFormatter("tomato", "model_runner").format(record)
    assert wrapped(line, "tomato", "model_runner") is line
    assert message_of("{not json") == "{not json"
    assert message_of("plain") == "plain"


def test_a_node_that_logs_json_prints_nothing_else_and_says_why_a_service_ended(tmp_path: Path) -> None:
    with EmbeddedBroker() as broker:
        toml = '[log]\nformat = "json"\n[supervisor]\nrestart_limit = 0\n'
        node = Node(tmp_path, "tomato", broker.url, ("memory_store",), toml)
        (node.data_dir / "memory_store").write_text("a file where a folder is wanted")
        node.start()
        wait_for(lambda: "is not started again" in node.log or "restart_limit" in node.log, "it is not given up")
        node.stop()
    entries = [json.loads(line) for line in node.log.splitlines()]
    assert {entry["MINDSTREAM_SERVICE"] for entry in entries} >= {"supervisor", "memory_store"}
    ends = [entry for entry in entries if entry.get("MINDSTREAM_ERROR_CODE") == "storage"]
    assert ends[0]["MINDSTREAM_SERVICE"] == "memory_store"
    given_up = next(entry["MESSAGE"] for entry in entries if "restart_limit" in entry["MESSAGE"])
    assert "File exists" in given_up
    assert "{" not in given_up


def test_a_password_is_in_no_log_no_command_line_and_no_output(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text(SECRET)
    password.chmod(0o600)
    toml = '[log]\nlevel = "debug"\n'
    with EmbeddedBroker() as broker:
        watcher = Watcher(broker.url)
        node = Node(tmp_path, "tomato", broker.url, MEMORY_SERVICES, toml)
        text = node.config.read_text()
        login = f'username = "tomato"\npassword_file = "{password}"\n'
        node.config.write_text(text.replace("[services]", f"{login}[services]"))
        node.start()
        try:
            watcher.wait_ready("tomato", MEMORY_SERVICES)
            lines = _command_lines(node)
            shown = [_run(node, *words) for words in (["config", "show"], ["doctor", "--json"], ["remember", "x"])]
        finally:
            node.stop()
            watcher.bus.stop()
    shown.append(_run(node, "status"))  # nobody answers any more: an error, and where it comes from
    found = "".join(path.read_text(errors="replace") for path in (node.data_dir / "logs").iterdir())
    assert str(password) in shown[0]
    assert "DEBUG" in found or "INFO" in found
    assert len(lines) >= 3
    assert SECRET not in "".join([node.log, found, *shown, *lines])


def test_an_unreadable_password_is_an_error_that_does_not_repeat_it(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text(SECRET)
    password.chmod(0o604)
    node = Node(tmp_path, "tomato", "mqtt://127.0.0.1:1", MEMORY_SERVICES)
    text = node.config.read_text().replace("[services]", f'password_file = "{password}"\n[services]')
    node.config.write_text(text)
    shown = _run(node, "status")
    assert "chmod" in shown
    assert SECRET not in shown


def _run(node: Node, *words: str) -> str:
    """What a command prints, on both streams, with everything logged."""
    command: list[Any] = [sys.executable, "-c", "from edge.cli import main; main()", "--config", str(node.config)]
    done = subprocess.run(
        [*command, "--debug", *words],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    return done.stdout + done.stderr


def _command_lines(node: Node) -> list[str]:
    """Of the node's processes: what every user of the machine can read."""
    import psutil

    assert node.process is not None
    supervisor = psutil.Process(node.process.pid)
    return [" ".join(process.cmdline()) for process in (supervisor, *supervisor.children(recursive=True))]
