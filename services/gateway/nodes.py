"""Which node runs which model: from what every model runner says of itself."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import PurePath

from protocol.codec import Received
from protocol.messages import ServiceState
from services.gateway.errors import ApiError

GONE = ("lost", "disconnected", "failed")


@dataclass(frozen=True)
class Runner:
    """A model runner as it was heard last."""

    node: str
    model: str
    """The model's name; of one that is named by a folder, the folder's name alone."""
    embedding: str
    """The embedding model that it has; empty without one."""
    ready: bool
    there: bool
    """Not lost, and not stopped."""
    reason: str
    """What it lacks when it is not ready."""
    queued: int
    tokens_per_s: float
    since_s: float
    """When it was last there and ready, ``time.monotonic()``."""
    first_us: int
    """When it was heard first, Unix microseconds."""


class Runners:
    """Every model runner on the broker. Thread-safe.

    Args:
        node: this node, preferred where several have a model.
    """

    def __init__(self, node: str) -> None:
        self._node = node
        self._lock = threading.Lock()
        self._runners: dict[str, Runner] = {}
        self.heard = threading.Event()
        """Some runner was heard."""

    def hear(self, message: Received) -> None:
        """Take note of a model runner's state."""
        state: ServiceState = message.data
        details = state.details
        there = state.state not in GONE
        now_s = time.monotonic()
        with self._lock:
            known = self._runners.get(message.node)
            if "model" not in details and known is None:
                return
            model = str(details.get("model") or (known.model if known else ""))
            # The broker's own word for one that is lost has no details: what it had is remembered.
            self._runners[message.node] = Runner(
                node=message.node,
                model=PurePath(model).name,
                embedding=str(details.get("embedding", "")) if there else (known.embedding if known else ""),
                ready=state.state == "ready",
                there=there,
                reason=state.reason or state.state,
                queued=_number(details.get("queued")),
                tokens_per_s=float(_number(details.get("tokens_per_s"))),
                since_s=now_s if state.state == "ready" or known is None else known.since_s,
                first_us=known.first_us if known else state.time_us,
            )
        self.heard.set()

    def all(self) -> list[Runner]:
        """Those that are there, this node's first, then by name."""
        with self._lock:
            there = [runner for runner in self._runners.values() if runner.there]
        return sorted(there, key=lambda runner: (runner.node != self._node, runner.node))

    def away_s(self, node: str) -> float:
        """For how long the runner of ``node`` has not been ready; 0.0 while it is."""
        with self._lock:
            runner = self._runners.get(node)
        if runner is None or runner.ready:
            return 0.0
        return time.monotonic() - runner.since_s

    def names(self) -> list[tuple[str, Runner]]:
        """Every name that a model can be asked for by, with a runner that has it: ``MODEL``, then ``NODE/MODEL``."""
        runners = [runner for runner in self.all() if runner.ready]
        named: dict[str, Runner] = {}
        for kind in ("model", "embedding"):
            for runner in runners:
                if model := getattr(runner, kind):
                    named.setdefault(model, runner)
        for kind in ("model", "embedding"):
            for runner in runners:
                if model := getattr(runner, kind):
                    named[f"{runner.node}/{model}"] = runner
        return list(named.items())

    def find(self, name: str, *, kind: str = "model") -> list[Runner]:
        """The runners that may answer for ``name``, the best first: this node's, then the one with least to do.

        Args:
            name: ``MODEL`` or ``NODE/MODEL``.
            kind: ``model`` or ``embedding``.

        Raises ApiError: 404 for a name that nobody has, 503 while no runner that has it is ready.
        """
        node, slash, model = name.partition("/")
        found = [
            runner
            for runner in self.all()
            if getattr(runner, kind)
            and (getattr(runner, kind) == name or (slash and (runner.node, getattr(runner, kind)) == (node, model)))
        ]
        ready = [runner for runner in found if runner.ready]
        if ready:
            return sorted(
                ready, key=lambda runner: (runner.node != self._node, runner.queued, -runner.tokens_per_s, runner.node)
            )
        if found:
            waiting = "; ".join(f"{runner.node}: {runner.reason}" for runner in found)
            raise ApiError(
                503,
                f"the model {name!r} is not ready: {waiting}",
                type="server_error",
                param="model",
                code="model_unavailable",
                retry_after_s=5,
            )
        raise self._unknown(name, kind)

    def _unknown(self, name: str, kind: str) -> ApiError:
        known = [each for each, runner in self.names() if getattr(runner, kind) in (each, each.partition("/")[2])]
        text = f"the model {name!r} does not exist here"
        if kind == "embedding" and any(name == each for each, _ in self.names()):
            text = f"the model {name!r} makes no embeddings"
        if known:
            text += f"; there {'is' if len(known) == 1 else 'are'} {', '.join(known)}"
        elif kind == "embedding":
            text += "; no node has an embedding model: `mindstream models pull all-minilm-l6-v2` gets one"
        else:
            text += "; no node has a model that is ready: `mindstream status` shows what they lack"
        return ApiError(404, text, param="model", code="model_not_found")


def _number(value: object) -> int:
    return round(value) if isinstance(value, (int, float)) else 0
