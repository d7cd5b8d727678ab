"""Two nodes in this process, each with a small model of random weights, and the endpoint of one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broker.embedded import EmbeddedBroker
from tests.support.nodes import Watcher, wait_for
from tests.support.ports import free_port
from tests.support.services import run_service

pytest.importorskip("starlette", reason="starlette is not installed: make install (extra `gateway`)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: make install (extra `gateway`)")

TIMEOUT_S = 60.0


@dataclass
class Site:
    """What the tests speak with."""

    broker_url: str
    url: str
    """Of tomato's endpoint, up to ``/v1``."""
    token: str
    model: str
    """Tomato's model."""
    other: str
    """Sprout's model, which tomato has not."""
    gateway: Any
    runner: Any
    """Tomato's."""
    sprout_runner: Any
    watcher: Watcher

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2].partition("/")[0])

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def counter(self, name: str) -> int:
        return int(self.gateway.bus.counters[name])


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As the model runner's own tests have them."""
    pytest.importorskip("torch", reason="torch is not installed: make install (extra `model`)")
    pytest.importorskip("transformers", reason="transformers is not installed: make install (extra `model`)")
    from tests.services.model_runner import conftest

    return conftest.make_small_models(tmp_path_factory)


@pytest.fixture(scope="session")
def site(small_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Tomato with model and endpoint, sprout with another model."""
    from edge.gateway_token import read_token, token_file
    from services.gateway.service import Gateway
    from services.model_runner.service import ModelRunner

    folder = tmp_path_factory.mktemp("site")
    port = free_port()
    with ExitStack() as cleanup:
        broker = cleanup.enter_context(EmbeddedBroker())
        watcher = Watcher(broker.url)
        cleanup.callback(watcher.bus.stop)
        runners = {}
        for node, family in (("tomato", "llama"), ("sprout", "qwen2")):
            toml = (
                f'[model]\nname = "{small_models[family]}"\nthreads = 1\nconversations_in_memory = 4\ndevice = "cpu"\n'
            )
            runners[node] = run_service(cleanup, ModelRunner, folder, node, broker.url, toml)
        for node in runners:
            watcher.wait_ready(node, ("model_runner",), TIMEOUT_S)
        gateway = run_service(cleanup, Gateway, folder, "tomato", broker.url, f"[gateway]\nport = {port}\n")
        watcher.wait_ready("tomato", ("gateway",), TIMEOUT_S)
        wait_for(lambda: len(gateway.runners.all()) == 2, "the gateway has not heard of both runners", TIMEOUT_S)
        yield Site(
            broker_url=broker.url,
            url=f"http://127.0.0.1:{port}/v1",
            token=read_token(token_file(gateway.config)),
            model=small_models["llama"].name,
            other=small_models["qwen2"].name,
            gateway=gateway,
            runner=runners["tomato"],
            sprout_runner=runners["sprout"],
            watcher=watcher,
        )


@pytest.fixture
def client(site: Site) -> Iterator[Any]:
    """OpenAI's own package, as a program uses it."""
    openai = pytest.importorskip("openai", reason="openai is not installed: make install (extra `dev`)")
    with openai.OpenAI(base_url=site.url, api_key=site.token, max_retries=0, timeout=TIMEOUT_S) as found:
        yield found
