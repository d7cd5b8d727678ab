"""`mindstream decode`: payloads of any origin as JSON lines, and a clear word about those that are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from edge.cli.app import app
from edge.cli.decode import LINE_BYTES, READ_BYTES
from protocol.messages import MESSAGES
from protocol.topics import MAX_PACKET_BYTES
from tests.golden import make, values
from tests.support.nodes import CHECKOUT
from tests.support.waiting import DEADLINE_S

PROGRAM = [sys.executable, "-c", "from edge.cli import main; main()", "decode"]
ALL = values.all_golden()
PUT, EVENT = ALL["memory.put"], ALL["event"]


class Done:
    """What one call printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.err = code, err
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]
        self.messages = [line["message"] for line in self.lines]


def decode(path: Path, content: bytes, *options: str) -> Done:
    """Decode a file of ``content``, in this process."""
    path.write_bytes(content)
    result = CliRunner().invoke(app, ["decode", str(path), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "payloads"


def line_of(type: str) -> bytes:
    made = ALL[type]
    return f"{made.topic} {made.payload.hex()}\n".encode()


# --- what it reads ----------------------------------------------------------------------------------------


def test_one_payload_is_one_line(path: Path) -> None:
    done = decode(path, PUT.payload)
    assert (done.code, done.err) == (0, "")
    assert done.lines == [{"bytes": len(PUT.payload), "message": msgpack.unpackb(PUT.payload)}]


def test_payloads_in_a_row_are_told_apart(path: Path) -> None:
    made = [each for each in ALL.values() if each.row.topic.format == "msgpack"] * 3
    done = decode(path, b"".join(each.payload for each in made))
    assert sum(len(each.payload) for each in made) > READ_BYTES // 4
    assert [message["type"] for message in done.messages] == [each.row.type for each in made]
    assert [line["bytes"] for line in done.lines] == [len(each.payload) for each in made]


def test_lines_of_topic_and_hexadecimal_are_read_and_checked(path: Path) -> None:
    done = decode(path, b"".join(map(line_of, MESSAGES)))
    assert (done.code, done.err) == (0, "")
    assert [line["topic"] for line in done.lines] == [each.topic for each in ALL.values()]
    assert done.messages[list(MESSAGES).index("node.state")]["state"] == "ready"


def test_lines_of_json_are_read(path: Path) -> None:
    made = ALL["node.state"]
    done = decode(path, made.payload + b"\r\n" + made.payload, "--topic", made.topic)
    assert done.code == 0
    assert done.messages == [json.loads(made.payload)] * 2


def test_a_retained_message_taken_back_is_null(path: Path) -> None:
    done = decode(path, f"{ALL['node.state'].topic} \n".encode())
    assert (done.code, done.lines) == (0, [{"topic": ALL["node.state"].topic, "bytes": 0, "message": None}])


def test_topics_of_others_are_shown_unchecked(path: Path) -> None:
    done = decode(path, b"zigbee2mqtt/living room/lamp 7b226f6e223a747275657d\n")
    assert done.lines == [{"topic": "zigbee2mqtt/living room/lamp", "bytes": 11, "message": {"on": True}}]


def test_what_is_signed_is_opened_and_with_full_left_as_it_stands(path: Path) -> None:
    (entry, _) = decode(path, ALL["memory.entries"].payload).messages[0]["data"]["entries"]
    assert entry["content"]["text"] == values.FIRST_CONTENT.text
    assert entry["header"]["seq"] == 1
    assert entry["signature"].startswith("<64 bytes ")
    (entry, _) = decode(path, ALL["memory.entries"].payload, "--full").messages[0]["data"]["entries"]
    assert entry["header"] == values.FIRST.header.hex()
    assert entry["signature"] == values.FIRST.signature.hex()


def test_a_number_that_json_has_not_is_text(path: Path) -> None:
    assert decode(path, msgpack.packb({"a": float("nan")})).messages == [{"a": "nan"}]


def test_nothing_is_nothing(path: Path) -> None:
    done = decode(path, b"")
    assert (done.code, done.lines, done.err) == (0, [], "")


# --- what it refuses --------------------------------------------------------------------------------------


def test_a_payload_cut_at_its_end_is_said_and_those_before_it_are_shown(path: Path) -> None:
    done = decode(path, PUT.payload + EVENT.payload[:-1])
    assert (done.code, len(done.lines)) == (1, 1)
    assert f"began at byte {len(PUT.payload)}, after {len(EVENT.payload) - 1} bytes" in done.err


@pytest.mark.parametrize("foreign", [b"\x07", b"\xc1", b"plain text", b"\x93\x01\x02\x03", b"\xff\xfe"])
def test_foreign_bytes_end_a_row_of_payloads(path: Path, foreign: bytes) -> None:
    done = decode(path, PUT.payload + foreign + EVENT.payload)
    assert (done.code, len(done.lines)) == (1, 1)
    assert f"at byte {len(PUT.payload)}" in done.err


def test_foreign_bytes_within_a_map_end_it(path: Path) -> None:
    done = decode(path, b"\x81\xa1a\xc1")
    assert (done.code, done.lines) == (1, [])
    assert "byte 0" in done.err


@pytest.mark.parametrize("line", [b"hello", b"hello world", b"topic 123", b"\xc3\x28 00", b"{broken", b"{}{}"])
def test_a_bad_line_is_left_out_and_named(path: Path, line: bytes) -> None:
    done = decode(path, line_of("event") + line + b"\n" + line_of("memory.put"), "--lines")
    assert done.code == 1
    assert [message["type"] for message in done.messages] == ["event", "memory.put"]
    assert "line 2" in done.err


def test_a_message_on_the_wrong_topic_is_refused_by_name(path: Path) -> None:
    done = decode(path, f"mindstream/v1/sprout/memory/log {PUT.payload.hex()}\n".encode() + line_of("event"))
    assert (done.code, [message["type"] for message in done.messages]) == (1, ["event"])
    assert "memory.put" in done.err


def test_with_a_topic_fields_and_speaker_are_checked(path: Path) -> None:
    assert decode(path, PUT.payload, "--topic", PUT.topic).code == 0
    broken = msgpack.unpackb(PUT.payload)
    broken["data"]["text"] = 7
    done = decode(path, msgpack.packb(broken) + PUT.payload, "--topic", PUT.topic)
    assert (done.code, len(done.lines)) == (1, 1)
    assert "data.text" in done.err or "text" in done.err
    assert "tomato" in decode(path, PUT.payload, "--topic", PUT.topic.replace("/tomato/", "/basil/")).err
    assert decode(path, PUT.payload, "--topic", "home/lamp").code == 1


def test_what_is_too_large_is_not_held(path: Path) -> None:
    endless = b"\x81\xa1a\xc6" + (2**30).to_bytes(4, "big") + bytes(3 * MAX_PACKET_BYTES)
    done = decode(path, endless)
    assert (done.code, done.lines) == (1, [])
    assert "above" in done.err or "no msgpack" in done.err
    done = decode(path, b"t " + b"0" * LINE_BYTES)
    assert (done.code, done.lines) == (1, [])
    assert "above" in done.err


@settings(max_examples=40)
@given(data=st.data())
def test_damaged_input_never_breaks_it(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = ALL[data.draw(st.sampled_from(list(MESSAGES)))]
    content = bytearray(made.payload if data.draw(st.booleans()) else line_of(made.row.type))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path = tmp_path_factory.getbasetemp() / "damaged"
    done = decode(path, bytes(content), *data.draw(st.sampled_from([[], ["--raw"], ["--lines"], ["--full"]])))
    assert done.code in (0, 1)
    assert bool(done.err) == (done.code == 1)


# --- as a program in a pipe -------------------------------------------------------------------------------


def test_each_payload_is_printed_as_it_comes() -> None:
    with subprocess.Popen(PROGRAM, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        for _ in range(3):
            program.stdin.write(PUT.payload)
            program.stdin.flush()
            assert json.loads(program.stdout.readline())["message"]["type"] == "memory.put"
        program.stdin.close()
        assert program.wait(DEADLINE_S) == 0


def test_a_reader_that_has_seen_enough_ends_it_quietly() -> None:
    with subprocess.Popen(
        PROGRAM, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.close()
        program.stdin.write(PUT.payload * 10)
        program.stdin.close()
        assert program.wait(DEADLINE_S) == 0
        assert program.stderr.read() == b""


def test_it_imports_no_bus_and_no_database() -> None:
    # It stands in pipes that scripts start by the dozen.
    code = (
        "import sys; from edge.cli import main\n"
        "try: main(['decode', sys.argv[1]])\n"
        "except SystemExit: pass\n"
        "print(sorted({'paho', 'apsw', 'rich', 'torch', 'cryptography'} & set(sys.modules)), file=sys.stderr)"
    )
    file = make.FOLDER / "memory.put.msgpack"
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"
