"""The command line as a user and a script meet it: whole processes, a real node, exit codes, JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.embedded import EmbeddedBroker
from edge.cli.context import EXIT_CODES, exit_code
from edge.cli.watch import readable
from edge.text import printable
from protocol import errors
from protocol.errors import AskExpired, ConfigError, ConversationUnknown, MindstreamError, NotConnected
from protocol.identity import Identity
from protocol.messages import RunToken
from tests.support.nodes import CHECKOUT, MEMORY_SERVICES, Node, Watcher, wait_for
from tests.support.terminal import Terminal
from tests.support.waiting import DEADLINE_S

PROGRAM = [sys.executable, "-c", "from edge.cli import main; main()"]
MODEL_READY_S = 150.0


def mindstream(*arguments: str, config: Path | None = None, stdin: str = "", timeout_s: float = 150) -> Any:
    """Run the command to its end."""
    options = ["--config", str(config)] if config else []
    return subprocess.run(
        [*PROGRAM, *options, *arguments],
        cwd=CHECKOUT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A running node with a memory and no model."""
    folder = tmp_path_factory.mktemp("cli")
    with EmbeddedBroker() as broker:
        found = Node(folder, "tomato", broker.url, MEMORY_SERVICES)
        watcher = Watcher(broker.url)
        found.start()
        watcher.wait_node_ready("tomato", ("presence", *MEMORY_SERVICES))
        yield found
        watcher.bus.stop()
        assert found.stop() == 0


@pytest.fixture
def lonely(tmp_path: Path) -> Path:
    """The configuration of a node that does not run."""
    path = tmp_path / "mindstream.toml"
    path.write_text(f'[node]\nname = "sprout"\ndata_dir = "{tmp_path / "data"}"\n[broker]\nport = 0\n')
    return path


def test_what_is_remembered_is_recalled(node: Node) -> None:
    stored = json.loads(mindstream("remember", "basalt is a dark rock", "--json", config=node.config).stdout)
    assert stored["node"] == "tomato"
    found = mindstream("recall", "dark rock", "--json", config=node.config)
    assert found.returncode == 0
    hits = json.loads(found.stdout)["hits"]
    assert [hit["text"] for hit in hits if hit["id"] == stored["id"]] == ["basalt is a dark rock"]
    assert "basalt is a dark rock" in mindstream("recall", "basalt", config=node.config).stdout


def test_text_from_standard_input_is_remembered(node: Node) -> None:
    assert mindstream("remember", "-", config=node.config, stdin="granite has big grains\n").returncode == 0
    assert "granite" in mindstream("recall", "grains", config=node.config).stdout


def test_a_recall_that_finds_nothing_says_so_and_succeeds(node: Node) -> None:
    done = mindstream("recall", "zeppelin", config=node.config)
    assert (done.returncode, done.stdout.strip()) == (0, "nothing found")


def test_recalled_text_does_not_move_the_cursor(node: Node) -> None:
    mindstream("remember", "escape \x1b[2J and \x07 bell", config=node.config)
    shown = mindstream("recall", "escape bell", config=node.config).stdout
    assert "\x1b[2J" not in shown
    assert "\x07" not in shown
    assert "escape" in shown


def test_status_shows_every_service(node: Node) -> None:
    done = mindstream("status", "--json", config=node.config)
    assert done.returncode == 0
    found = json.loads(done.stdout)["nodes"]["tomato"]
    assert found["state"] == "ready"
    assert {name: state["state"] for name, state in found["services"].items()} == dict.fromkeys(
        ("presence", *MEMORY_SERVICES), "ready"
    )
    text = mindstream("status", config=node.config).stdout
    assert all(service in text for service in MEMORY_SERVICES)


def test_watch_makes_messages_readable(node: Node) -> None:
    watching = subprocess.Popen(
        [*PROGRAM, "--config", str(node.config), "watch", "tomato/#", "--json", "--seconds", "150"],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    try:
        json.loads(watching.stdout.readline())  # a retained message: it is subscribed
        mindstream("remember", "seen by watch", config=node.config)
        while True:
            line = json.loads(watching.stdout.readline())
            if line["topic"].endswith("/memory_store/put"):
                break
        assert line["message"]["type"] == "memory.put"
        assert line["message"]["data"]["text"] == "seen by watch"
    finally:
        watching.send_signal(signal.SIGINT)
        watching.wait(DEADLINE_S)
        watching.stdout.close()
    assert watching.returncode == 0


def test_watch_ends_after_a_count(node: Node) -> None:
    done = mindstream("watch", "--count", "1", config=node.config)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1


def test_a_service_that_is_not_there_is_said_at_once(node: Node) -> None:
    started_s = time.monotonic()
    done = mindstream("chat", "hello", config=node.config)
    assert done.returncode == 3
    assert "model_runner of node tomato" in done.stderr
    assert "hint: " in done.stderr
    assert time.monotonic() - started_s < 150  # not the ten minutes that an answer may take
    assert mindstream("handoff", "talk", "--from", "tomato", "--to", "sprout", config=node.config).returncode == 3
    assert mindstream("remember", "x", "--node", "nowhere", config=node.config).returncode == 3


def test_doctor_finds_a_healthy_node(node: Node) -> None:
    done = mindstream("doctor", "--json", config=node.config)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    for name in ("python", "packages", "configuration", "data folder", "keys", "node", "broker"):
        assert checks[name]["verdict"] == "ok", checks[name]
    assert all(check["next_step"] for check in checks.values() if check["verdict"] != "ok")


def test_without_a_node_commands_say_how_to_start_one(lonely: Path) -> None:
    for command in (["status"], ["recall", "x"], ["watch"]):
        done = mindstream(*command, config=lonely)
        assert done.returncode == 3
        assert "mindstream up" in done.stderr
        assert "Traceback" not in done.stderr


def test_an_unreachable_broker_is_exit_code_3_and_a_finding_of_doctor(lonely: Path) -> None:
    broker = EmbeddedBroker()
    broker.start()
    broker.stop()
    lonely.write_text(lonely.read_text().replace("port = 0", f'url = "{broker.url}"'))
    done = mindstream("status", config=lonely)
    assert done.returncode == 3
    assert broker.url in done.stderr
    checked = mindstream("doctor", config=lonely)
    assert checked.returncode == 1
    assert "failed   broker" in checked.stdout


def test_a_wrong_configuration_is_exit_code_2_with_the_nearest_key(lonely: Path) -> None:
    lonely.write_text("[node]\nnmae = 'x'\n")
    for command in (["config", "show"], ["up"], ["status"]):
        done = mindstream(*command, config=lonely)
        assert done.returncode == 2
        assert "node.name" in done.stderr
        assert f"{lonely}, line 2" in done.stderr
        assert "Traceback" not in done.stderr
    assert "failed   configuration" in mindstream("doctor", config=lonely).stdout
    assert "Traceback" in mindstream("--debug", "config", "show", config=lonely).stderr


def test_a_wrong_command_line_is_exit_code_2() -> None:
    for command in (
        ["nonsense"],
        ["recall"],
        ["recall", "x", "--limit", "0"],
        ["bench", "nonsense"],
        ["chat", "--seed", "x"],
        ["chat", "--json-schema", "/no/such/schema.json", "hello"],
        ["chat", "--min-p", "2", "hello"],
    ):
        assert mindstream(*command).returncode == 2, command


def test_config_show_prints_what_can_be_read_back(lonely: Path, tmp_path: Path) -> None:
    printed = mindstream("config", "show", config=lonely)
    again = tmp_path / "again.toml"
    again.write_text(printed.stdout)
    assert mindstream("config", "show", config=again).stdout == printed.stdout
    assert json.loads(mindstream("config", "show", "--json", config=lonely).stdout)["node"]["name"] == "sprout"
    assert mindstream("config", "path", config=lonely).stdout.strip() == str(lonely)


def test_keys_are_shown_trusted_listed_and_forgotten(lonely: Path) -> None:
    own = json.loads(mindstream("keys", "show", "--json", config=lonely).stdout)
    other = Identity.generate("tomato").fingerprint
    assert mindstream("keys", "trust", "tomato", other, config=lonely).returncode == 0
    assert json.loads(mindstream("keys", "list", "--json", config=lonely).stdout) == {
        "sprout": own["fingerprint"],
        "tomato": other,
    }
    newer = Identity.generate("tomato").fingerprint
    refused = mindstream("keys", "trust", "tomato", newer, config=lonely)
    assert refused.returncode == 1
    assert "--replace" in refused.stderr
    assert mindstream("keys", "trust", "tomato", newer, "--replace", config=lonely).returncode == 0
    assert mindstream("keys", "forget", "tomato", config=lonely).returncode == 0
    assert mindstream("keys", "forget", "tomato", config=lonely).returncode == 4


def test_models_are_listed_and_an_unknown_one_is_exit_code_4(lonely: Path) -> None:
    listed = mindstream("models", "list", "--json", config=lonely)
    assert listed.returncode == 0
    assert "smollm2-135m-instruct" in {each["model"]["name"] for each in json.loads(listed.stdout)}
    assert "smollm2-135m-instruct" in mindstream("models", config=lonely).stdout
    unknown = mindstream("models", "path", "smollm2-135m-instrct", config=lonely)
    assert unknown.returncode == 4
    assert "smollm2-135m-instruct" in unknown.stderr


def test_versions_are_printed() -> None:
    assert json.loads(mindstream("version", "--json").stdout)["topics"] == "mindstream/v1"
    assert mindstream("--version").stdout.startswith("mindstream ")


def test_up_runs_a_node_until_ctrl_c_and_others_find_its_broker(lonely: Path) -> None:
    lonely.write_text(lonely.read_text() + '[services]\nenabled = ["memory_store"]\n')
    with (lonely.parent / "log").open("wb") as log:
        up = subprocess.Popen([*PROGRAM, "--config", str(lonely), "up"], cwd=CHECKOUT, stdout=log, stderr=log)
    try:
        wait_for(lambda: "sprout is ready" in (lonely.parent / "log").read_text(), "not ready")

        # The supervisor's services are ready; presence says so of the node a moment later.
        def shown() -> str:
            nodes = json.loads(mindstream("status", "--json", config=lonely).stdout or "{}").get("nodes", {})
            return str(nodes.get("sprout", {}).get("state"))

        wait_for(lambda: shown() == "ready", "the node does not say that it is ready")
        up.send_signal(signal.SIGINT)
        assert up.wait(DEADLINE_S) == 0
    finally:
        up.kill()
        up.wait()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (NotConnected("x"), 3),
        (AskExpired("x"), 3),
        (ConversationUnknown("x"), 4),
        (errors.NotFound("x"), 4),
        (errors.StorageError("x"), 1),
        (MindstreamError("x"), 1),
    ],
)
def test_errors_have_the_documented_exit_codes(error: MindstreamError, code: int) -> None:
    assert exit_code(error) == code
    assert code in EXIT_CODES


@pytest.mark.parametrize(
    ("payload", "shown"),
    [
        (b"", None),
        (b'{"a": 1}', {"a": 1}),
        (b"\x81\xa1a\xc4\x03xyz", {"a": "<3 bytes 78797a>"}),
        (b"\x82\x01\x02", "<3 bytes 820102>"),
        (b"\xff" * 20, "<20 bytes ffffffffffffffff…>"),
        (b"[" * 100_000, f"<100000 bytes {'5b' * 8}…>"),
    ],
)
def test_any_payload_can_be_shown(payload: bytes, shown: object) -> None:
    assert readable(payload) == shown


def test_printable_text_keeps_words_and_loses_commands() -> None:
    assert printable("grüße, 你好 👩‍🚀\n\tok") == "grüße, 你好 👩‍🚀\n\tok"
    assert printable("a\x1b]0;title\x07b\u202ec\x9b2J\r") == "a�]0;title�b�c�2J�"


@pytest.mark.slow
@pytest.mark.model
def test_a_conversation_in_a_terminal_is_stopped_by_ctrl_c_and_goes_on(
    tmp_path: Path, embedded_broker: EmbeddedBroker, smollm2_path: Path
) -> None:
    node = Node(tmp_path, "tomato", embedded_broker.url, ["model_runner"])
    watcher = Watcher(embedded_broker.url)
    tokens: list[str] = []
    node.start()
    try:
        watcher.wait_ready("tomato", ["model_runner"], MODEL_READY_S)
        done = mindstream("chat", "Say hello.", "--max-new-tokens", "8", "--json", config=node.config, timeout_s=120)
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["tokens"]) <= 8

        schema = tmp_path / "schema.json"
        schema.write_text('{"enum": [{"said": "hello"}]}')
        done = mindstream(
            *("chat", "Say hello.", "--json-schema", str(schema), "--logprobs", "2", "--stats"),
            config=node.config,
            timeout_s=120,
        )
        assert done.returncode == 0, done.stderr
        answer, end = json.JSONDecoder().raw_decode(done.stdout)
        assert answer == {"said": "hello"}
        lines = done.stdout[end:].strip().splitlines()
        assert len(lines) >= 5
        assert all(len(line.split()) >= 7 for line in lines), "a token, its figures, two rivals with theirs"
        assert "tokens/s" in done.stderr
        assert "energy" in done.stderr or " J" in done.stderr

        watcher.bus.hear(RunToken, lambda message: tokens.append(message.data.text))
        watcher.bus.wait_subscribed(DEADLINE_S)
        with Terminal([*PROGRAM, "--config", str(node.config), "chat", "--max-new-tokens", "4000"]) as chat:
            chat.expect("> ")
            chat.type("Count from one to ten thousand, in words.\n")
            wait_for(lambda: tokens, "it says nothing")
            chat.type("\x03")
            chat.expect("[stopped]")
            chat.expect("> ")
            chat.type("\x03")  # at the prompt it ends nothing
            chat.expect("> ")
            chat.type("\x04")
            assert chat.process.wait(DEADLINE_S) == 0
        assert node.stop() == 0
    finally:
        watcher.bus.stop()
        if node.process is not None and node.process.poll() is None:
            node.kill()
