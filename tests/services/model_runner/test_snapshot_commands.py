"""`mindstream snapshot` as a person and a script meet it: real processes that ask two nodes with small models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from edge.keys import Peers, load_or_create_identity
from protocol.ids import uuid7
from protocol.messages import ChatMessage, ModelGenerate, ModelSnapshot, RunDone, SnapshotProgress
from services.model_runner.service import ModelRunner
from tests.support.nodes import CHECKOUT, Watcher
from tests.support.services import run_service
from tests.support.terminal import Terminal
from tests.support.waiting import DEADLINE_S, TTL_MS, wait_for

PROGRAM = [sys.executable, "-c", "from edge.cli import main; main()"]
TEXT = "the key lies under the pot by the door, and the pot by the door stands under the window"


@dataclass
class Site:
    """Tomato and sprout, with one model, each trusting the other."""

    folder: Path
    bus: Bus
    runners: dict[str, Any]

    def command(self, *arguments: str, node: str = "tomato") -> list[str]:
        return [*PROGRAM, "--config", str(self.folder / f"{node}-model_runner.toml"), "snapshot", *arguments]

    def run(self, *arguments: str, node: str = "tomato", stdin: str = "", code: int = 0) -> tuple[str, str]:
        done = subprocess.run(
            self.command(*arguments, node=node),
            cwd=CHECKOUT,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout, done.stderr

    def json(self, *arguments: str, node: str = "tomato") -> Any:
        return json.loads(self.run(*arguments, "--json", node=node)[0])

    def say(self, conversation: str, text: str = "", node: str = "tomato", count: int = 8) -> RunDone:
        messages = [ChatMessage("user", text)] if text else []
        ask = ModelGenerate(conversation, messages, max_new_tokens=count, ignore_eos=True)
        done: RunDone = self.bus.ask(node, ask, ttl_ms=TTL_MS)
        return done


@pytest.fixture(scope="module")
def site(small_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    identities = {node: load_or_create_identity(folder / node, node) for node in ("tomato", "sprout")}
    for node, identity in identities.items():
        for other in identities.values():
            if other is not identity:
                Peers(folder / node, identity).trust(other.node, other.fingerprint)
    toml = f'[model]\nname = "{small_models["llama"]}"\nthreads = 1\ndevice = "cpu"\nmax_batch = 1\n'
    with ExitStack() as cleanup:
        broker = cleanup.enter_context(EmbeddedBroker())
        watcher = Watcher(broker.url)
        cleanup.callback(watcher.bus.stop)
        runners = {node: run_service(cleanup, ModelRunner, folder, node, broker.url, toml) for node in identities}
        for node in runners:
            watcher.wait_ready(node, ("model_runner",))
        bus = Bus(url=broker.url, node="tester", client="talker")
        bus.start()
        cleanup.callback(bus.stop)
        yield Site(folder, bus, runners)


def new(name: str) -> str:
    return f"{name}-{uuid7()}"


# --- saving, resuming -----------------------------------------------------------------------------------------


def test_a_saved_conversation_goes_on_under_another_name_and_on_another_node(site: Site) -> None:
    name, branch = new("garden"), new("branch")
    site.say(name, "hello")
    saved = site.json("save", name)
    assert (saved["conversation"], saved["tokens"] > 8) == (name, True)
    # A branch is a resume under another name: both go on alike.
    resumed = site.json("resume", saved["snapshot"][:12], "--as", branch)
    assert (resumed["conversation"], resumed["how"], resumed["tokens"]) == (branch, "exact", saved["tokens"])
    assert [each["snapshot"] for each in site.json("timeline", branch)["moments"]] == [saved["snapshot"]]
    there = site.json("resume", saved["snapshot"], "--from", "tomato", node="sprout")
    assert (there["conversation"], there["how"]) == (name, "exact")
    ours = site.say(name).tokens
    assert site.say(branch).tokens == ours
    assert site.say(name, node="sprout").tokens == ours


def test_what_was_done_is_said_in_words_with_sizes(site: Site) -> None:
    name = new("garden")
    site.say(name, "hello")
    said, told = site.run("save", name)
    identifier = re.match("[0-9a-f]{12}", said)
    assert identifier is not None
    assert f"{name}: " in said
    assert re.search(r"tokens.*\d MB.*in \d+ ms", said)
    assert "\x1b" not in said + told, "no bar where there is no terminal"
    said, _ = site.run("resume", name, "--as", new("branch"))
    assert "exact" in said
    assert "go on: mindstream chat" in said


def test_a_bar_is_drawn_on_a_terminal_and_the_answer_comes_after_it(site: Site) -> None:
    name = new("garden")
    site.say(name, "hello")
    with Terminal(site.command("save", name)) as terminal:
        terminal.expect(f"{name}: ")
        terminal.expect("MB")
        assert terminal.process.wait(DEADLINE_S) == 0


def test_a_checkpoint_has_a_label_and_is_returned_to_from_either_node(site: Site) -> None:
    name = new("garden")
    site.say(name, "hello")
    first = site.json("save", name, "--label", "before the frost")
    site.say(name, "and then?")
    second = site.json("save", name, "--codec", "lossless")
    assert (first["label"], second["codec"], second["ratio"] > 1) == ("before the frost", "lossless", True)
    moments = site.json("timeline", name)["moments"]
    assert [each["snapshot"] for each in moments] == [first["snapshot"], second["snapshot"]]
    text, _ = site.run("timeline", name)
    assert "before the frost" in text
    back = site.json("resume", f"{name}@before the frost", "--as", new("branch"))
    assert (back["tokens"], back["snapshot"]) == (first["tokens"], first["snapshot"])
    there = site.json("resume", f"{name}@before the frost", "--from", "tomato", node="sprout")
    assert (there["tokens"], there["how"]) == (first["tokens"], "exact")
    assert f"{name}@before the frost" in site.run("list")[0]
    assert "label         before the frost" in site.run("show", first["snapshot"])[0]


def test_another_snapshot_is_made_of_one_and_says_of_which(site: Site) -> None:
    name = new("garden")
    site.say(name, "x" * 300)
    source = site.json("save", name)
    made = site.json("transcode", name, "--codec", "int8", "--most-kl", "9", "--least-top1", "0")
    assert (made["codec"], made["conversation"]) == ("int8", name)
    assert made["fidelity"]["measured"] == ["mean_kl", "top1"]
    found = site.json("diff", source["snapshot"], made["snapshot"])
    assert found["relation"] == "the first is the parent of the second"
    assert found["second"]["provenance"] == ["created by tomato", "transcoded by tomato"]
    assert found["tokens"]["common"] == source["tokens"]
    said, _ = site.run("transcode", source["snapshot"], "--codec", "tokens")
    assert "tokens" in said
    refused = site.run("transcode", source["snapshot"], "--codec", "int8", "--most-kl", "0", code=1)
    assert "error:" in refused[1]


def test_a_pruned_one_is_smaller_says_so_and_goes_on(site: Site) -> None:
    name = new("garden")
    site.say(name, TEXT * 4)
    source = site.json("save", name)
    pruned = site.json(
        "prune", source["snapshot"], "last:64", "--label", "short", "--most-kl", "9", "--least-top1", "0"
    )
    assert 64 <= pruned["kept_tokens"] < source["tokens"] / 2
    assert pruned["size_bytes"] < source["size_bytes"]
    assert "of them kept" in site.run("show", pruned["snapshot"])[0]
    assert "pruned by tomato" in site.run("diff", source["snapshot"], pruned["snapshot"])[0]
    back = site.json("resume", f"{name}@short", "--as", new("branch"), "--lossy", "--most-kl", "9", "--least-top1", "0")
    assert (back["how"], back["tokens"]) == ("lossy", source["tokens"])
    out, err = site.run("explore", name, "--json", stdin="p last:64\n\nq\n")
    begun, after, step = steps_of(out)
    assert (after["tokens"], step["tokens"]) == (begun["tokens"], begun["tokens"] + 1)
    assert "pruned to" in err


def test_how_far_it_is_is_said_to_who_asks(site: Site) -> None:
    name, run = new("garden"), uuid7()
    site.say(name, "x" * 300)
    told: list[SnapshotProgress] = []
    stop_hearing = site.bus.hear(SnapshotProgress, lambda message: told.append(message.data), node="tomato", run=run)
    site.bus.wait_subscribed(DEADLINE_S)
    site.bus.ask("tomato", ModelSnapshot(name, run=run), ttl_ms=TTL_MS)
    wait_for(lambda: told and told[-1].done_bytes == told[-1].total_bytes > 0, "nothing was said")
    stop_hearing()
    assert {each.phase for each in told} == {"wait", "write"}


def test_ctrl_c_stops_a_save_and_nothing_of_it_stays(site: Site) -> None:
    name, busy = new("garden"), threading.Event()
    site.say(name, "hello")
    saving = site.runners["tomato"].saving
    before = saving.later(lambda: busy.wait(DEADLINE_S))
    try:
        with Terminal(site.command("save", name)) as terminal:
            terminal.expect("wait")
            terminal.type("\x03")
            wait_for(lambda: any(each.is_set() for each in list(saving._asked.values())), "it was not cancelled")
            busy.set()
            terminal.expect("stopped, nothing")
            assert terminal.process.wait(DEADLINE_S) == 130
    finally:
        busy.set()
    assert before.result(DEADLINE_S)
    assert site.json("timeline", name)["moments"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["save", "nowhere"], 4, "none of that name"),
        (["save", "garden", "--codec", "zip"], 2, "none of auto"),
        (["save", "garden", "--budget", "small"], 2, "no ratio"),
        (["save", "garden", "--budget", "0.5x"], 2, "no ratio from 1x"),
        (["save", "Garden!"], 2, "no conversation's name"),
        (["resume", "garden", "--as", "Garden!"], 2, "no conversation's name"),
        (["prune", "abc"], 2, "which positions"),
        (["resume", "feed" * 16], 4, "does not hold it"),
        (["resume", "garden@nothing"], 4, "does not hold it"),
        (["resume", "abc", "--node", "sprout", "--from", "sprout"], 4, "sprout has none of that name"),
        (["resume", "abc", "--way", "by post"], 2, "none of chunks"),
        (["transcode", "No Name", "--codec", "int8", "--node", "sprout"], 2, "an id of 64 digits"),
        (["explore", "nowhere"], 4, "none of that name"),
    ],
)
def test_what_cannot_be_done_has_an_exit_code_and_a_reason(
    site: Site, arguments: list[str], code: int, said: str
) -> None:
    assert said in site.run(*arguments, code=code)[1]


# --- comparing ------------------------------------------------------------------------------------------------


def test_diff_says_where_two_part_and_what_they_share(site: Site) -> None:
    name, branch = new("garden"), new("branch")
    site.say(name, "x" * 600)
    base = site.json("save", name)["snapshot"]
    site.json("resume", base, "--as", branch)
    site.say(name, "the one says this")
    site.say(branch, "the other says that")
    first, second = site.json("save", name), site.json("save", branch)
    found = site.json("diff", first["snapshot"], second["snapshot"])
    assert found["tokens"]["first"] == first["tokens"]
    assert base not in (first["snapshot"], second["snapshot"])
    assert found["tokens"]["common"] < min(first["tokens"], second["tokens"])
    assert found["tokens"]["common"] >= 600
    assert found["shared"]["blocks"] == 2  # of 256 whole positions each
    assert found["shared"]["chunks"] >= 2
    assert found["relation"] == f"both have the parent {base[:12]}"
    assert found["text"]["where"].startswith("message 3, letter")
    assert "one says this" in found["text"]["first"]
    assert found["differs"] == {}
    text, _ = site.run("diff", base, first["snapshot"])
    assert "the first is the parent of the second" in text
    assert "exact" in text
    same, _ = site.run("diff", base, base)
    assert "tokens  the same" in same


# --- exploring ------------------------------------------------------------------------------------------------


def steps_of(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_a_script_explores_by_a_pipe_and_reads_a_step_a_line(site: Site) -> None:
    typed = f"{TEXT}\n\n\n2\nb\n by the wall\nb 3\nq\n"
    out, _ = site.run("explore", "--json", "--top", "5", stdin=typed)
    first, second, third, other, back, text, begun = steps_of(out)
    assert first["text"] == TEXT
    assert len(first["choices"]) == 5
    assert second["tokens"] == first["tokens"] + 1
    assert other["tokens"] == third["tokens"] + 1
    assert back == third
    assert text["text"].endswith(" by the wall")
    assert begun == first
    # The sampler's way is the answer's way.
    assert second["text"] == TEXT + first["choices"][0]["text"]


def test_a_conversation_is_explored_as_a_copy_and_saved_from_there(site: Site) -> None:
    name, branch = new("garden"), new("branch")
    site.say(name, "hello")
    out, err = site.run("explore", name, "--json", stdin="n 3\ns\nq\n")
    begun, third, saved = steps_of(out)
    assert third["tokens"] == begun["tokens"] + 3
    assert saved["tokens"] == third["tokens"]
    assert "resume" in err
    rest = site.say(name, count=6).tokens
    site.json("resume", saved["snapshot"], "--as", branch)
    assert site.say(branch, count=3).tokens == rest[3:]
    assert [each for each in site.runners["tomato"].worker.loaded.conversations.names() if "explore" in each] == []


def test_a_snapshot_is_explored_and_another_gone_to(site: Site) -> None:
    name = new("garden")
    site.say(name, "hello")
    one = site.json("save", name)
    site.say(name, "and then?")
    other = site.json("save", name)
    out, err = site.run("explore", one["snapshot"][:16], "--json", stdin=f"\nr {other['snapshot']}\n\nq\n")
    begun, step, gone, further = steps_of(out)
    assert (begun["tokens"], step["tokens"]) == (one["tokens"], one["tokens"] + 1)
    assert (gone["tokens"], further["tokens"]) == (other["tokens"], other["tokens"] + 1)
    assert err.count("exact") == 2
    assert not any("explore" in each for each in site.runners["tomato"].worker.loaded.conversations.names())


def test_a_script_is_told_that_its_last_command_did_not_do(site: Site) -> None:
    _, err = site.run("explore", stdin=f"{TEXT}\n99\n", code=1)
    assert "99 is none of the 10" in err
    _, err = site.run("explore", stdin=f"{TEXT}\nb\n?\n")
    assert "no more than 0 commands can be taken back" in err


def test_a_person_explores_on_a_terminal(site: Site) -> None:
    with Terminal(site.command("explore")) as terminal:
        terminal.expect("begin with a text:")
        terminal.expect("> ")
        terminal.type(TEXT + "\n")
        terminal.expect(f"  {len(TEXT)} tokens, entropy")
        terminal.expect(" *  1 ")
        terminal.expect("> ")
        terminal.type("\n")
        terminal.expect(f"  {len(TEXT) + 1} tokens, entropy")
        terminal.expect("> ")
        terminal.type("b\n")
        terminal.expect(f"  {len(TEXT)} tokens, entropy")
        terminal.expect("> ")
        terminal.type("r abc\n")
        terminal.expect("error:")
        terminal.expect("> ")
        terminal.type("?\n")
        terminal.expect("take back the last command")
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.process.wait(DEADLINE_S) == 0
