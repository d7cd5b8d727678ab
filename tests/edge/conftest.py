"""Buses that end with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from broker.base import Broker
from edge.bus import Bus
from tests.edge.bus_support import Child, RawClient

OpenBus = Callable[..., Bus]


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def make_bus(broker: Broker, closing: ExitStack) -> OpenBus:
    """``make_bus(node, client, **options)``: a bus, not started, stopped at the end."""

    def make(node: str, client: str, **options: Any) -> Bus:
        bus = Bus(url=broker.url, node=node, client=client, **options)
        closing.callback(bus.stop, timeout_s=2.0)
        return bus

    return make


@pytest.fixture
def open_bus(make_bus: OpenBus) -> OpenBus:
    """The same, started."""

    def make(node: str, client: str, **options: Any) -> Bus:
        bus = make_bus(node, client, **options)
        bus.start()
        return bus

    return make


@pytest.fixture
def raw(broker: Broker, closing: ExitStack) -> RawClient:
    client = RawClient(broker)
    closing.callback(client.close)
    return client


@pytest.fixture
def start_child(broker: Broker, closing: ExitStack) -> Callable[..., Child]:
    """``start_child(mode, *arguments)``: bus_child.py on the test's broker, killed at the end."""

    def start(mode: str, *arguments: object) -> Child:
        child = Child(mode, broker.url, *map(str, arguments))
        closing.callback(child.kill)
        return child

    return start
