"""A whole node as a user runs it: a supervisor, the real model, the command line, OpenAI's own package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.embedded import EmbeddedBroker
from tests.services.gateway.conftest import TIMEOUT_S
from tests.support.nodes import CHECKOUT, Node, Watcher, wait_for
from tests.support.ports import free_port

openai = pytest.importorskip("openai", reason="openai is not installed: make install (extra `dev`)")

pytestmark = pytest.mark.model

SERVICES = ("model_runner", "gateway")


@pytest.fixture(scope="module")
def node(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Watcher]]:
    folder = tmp_path_factory.mktemp("node")
    toml = f"[model]\nthreads = 1\n[gateway]\nport = {free_port()}\n"
    with EmbeddedBroker() as broker:
        found = Node(folder, "tomato", broker.url, SERVICES, toml)
        watcher = Watcher(broker.url)
        found.start()
        try:
            watcher.wait_ready("tomato", SERVICES, 120)
            yield found, watcher
        finally:
            watcher.bus.stop()
            found.stop()


def command(node: Node, *words: str) -> Any:
    """What `mindstream gateway WORDS --json` prints."""
    code = "import sys; from edge.cli import main; sys.exit(main())"
    arguments = [sys.executable, "-c", code, "--config", str(node.config), "gateway", *words, "--json"]
    done = subprocess.run(arguments, cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    return json.loads(done.stdout)


def test_a_program_that_is_given_address_and_token_talks_with_the_model(node: tuple[Node, Watcher]) -> None:
    tomato, watcher = node
    url, token = command(tomato, "url")["url"], command(tomato, "token")["token"]
    client = openai.OpenAI(base_url=url, api_key=token, max_retries=0, timeout=120)
    wait_for(lambda: client.models.list().data, "the endpoint has not heard of the model runner")
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
    arguments: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 32}
    first = client.chat.completions.create(messages=messages, **arguments)
    assert "Paris" in (first.choices[0].message.content or "")
    messages += [first.choices[0].message, {"role": "user", "content": "And of Italy?"}]
    text, usage = "", None
    for chunk in client.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **arguments
    ):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert "Rome" in text
    assert first.usage is not None
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    # The first turn and its answer were in the KV cache, all but the pending token.
    held = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert usage.prompt_tokens_details.cached_tokens == held
    assert token not in tomato.log
    for service in SERVICES:
        assert token not in tomato.service_log(service)
    assert token not in repr(watcher.services)


@pytest.mark.slow
def test_an_answer_goes_on_when_the_model_runner_is_killed_in_the_middle(node: tuple[Node, Watcher]) -> None:
    tomato, watcher = node
    url, token = command(tomato, "url")["url"], command(tomato, "token")["token"]
    client = openai.OpenAI(base_url=url, api_key=token, max_retries=0, timeout=120)
    arguments: dict[str, Any] = {
        "model": "tomato/smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "Tell me a story about a robot in Paris."}],
        "temperature": 0,
        "max_tokens": 48,
    }
    whole = client.chat.completions.create(**arguments).choices[0].message.content
    text, killed = "", False
    for chunk in client.chat.completions.create(**arguments, stream=True):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        if len(text) > 40 and not killed:
            killed = True
            watcher.kill_service("tomato", "model_runner")
    assert killed
    assert text == whole
