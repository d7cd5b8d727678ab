"""The endpoint's paths, and who may use them: an ASGI application."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from edge.counters import Counters, Events
from edge.gateway_token import TokenCheck
from protocol.errors import MindstreamError
from services.gateway import wanted
from services.gateway.answering import Answering
from services.gateway.errors import AUTHENTICATION, RATE, SERVER, ApiError, api_error
from services.gateway.histories import Histories
from services.gateway.nodes import Runner, Runners
from services.gateway.runs import Runs
from services.gateway.vectors import Vectors

MAX_BODY_BYTES = 8 * 1024 * 1024
"""Of a request: 2,048 texts to embed fit."""
BODY_S = 30.0
"""So long a request's body may take to come."""
OPEN_PATHS = ("/healthz",)


class Endpoint:
    """What the paths do.

    Args:
        timeout_s: how long one answer may take.
        max_requests: answers under way at one time.
        max_answer_tokens: where a chat names no limit.
    """

    def __init__(
        self,
        *,
        runners: Runners,
        runs: Runs,
        vectors: Vectors,
        counters: Counters,
        timeout_s: float,
        max_requests: int,
        max_answer_tokens: int,
    ) -> None:
        self._runners = runners
        self._runs = runs
        self._vectors = vectors
        self._counters = counters
        self._ttl_ms = max(1, round(timeout_s * 1000))
        self._max_requests = max_requests
        self._max_answer_tokens = max_answer_tokens
        self.histories = Histories()

    async def health(self, _request: Request) -> Response:
        """That it is up: for a probe, without a token, and without a word of what it has."""
        return _json({"status": "ok"})

    async def models(self, _request: Request) -> Response:
        """Every name that a request may give as ``model``."""
        return _json({"object": "list", "data": [_model(name, runner) for name, runner in self._runners.names()]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        for each, runner in self._runners.names():
            if each == name:
                return _json(_model(each, runner))
        self._runners.find(name)
        raise ApiError(404, f"the model {name!r} does not exist here", param="model", code="model_not_found")

    async def chat(self, request: Request) -> Answering:
        """An answer to a conversation."""
        asked = wanted.chat(await _body(request), max_answer_tokens=self._max_answer_tokens)
        return self._answering(asked)

    async def completion(self, request: Request) -> Answering:
        """What a model says after a text."""
        return self._answering(wanted.completion(await _body(request)))

    async def embeddings(self, request: Request) -> Response:
        """Vectors of texts."""
        name, texts, as_base64 = wanted.embedding(await _body(request))
        self._counters.add("requests")
        runner = self._runners.find(name, kind="embedding")[0]
        body = await self._vectors.embed(runner.node, name, texts, as_base64=as_base64, ttl_ms=self._ttl_ms)
        return Response(body, media_type="application/json")

    def _answering(self, asked: wanted.Wanted) -> Answering:
        self._counters.add("requests")
        if self._runs.active >= self._max_requests:
            raise ApiError(
                429,
                f"{self._runs.active} answers are under way already",
                type=RATE,
                code="overloaded",
                retry_after_s=5,
            )
        return Answering(
            asked,
            self._runners.find(asked.model),
            runners=self._runners,
            runs=self._runs,
            histories=self.histories,
            counters=self._counters,
            ttl_ms=self._ttl_ms,
        )


class Guard:
    """Lets through who calls this machine by a name of its own and shows the token.

    A web page may have its own name lead to 127.0.0.1 (DNS rebinding) and then ask as if it were one of ours: its
    Host header tells. The token is compared in constant time and stands in no log.
    """

    def __init__(
        self, app: ASGIApp, *, token: TokenCheck, hosts: frozenset[str], counters: Counters, events: Events
    ) -> None:
        self._app = app
        self._token = token
        self._hosts = hosts
        self._counters = counters
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(scope)) is not None:
            await _error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = _host_name(headers.get(b"host", b"").decode("latin-1"))
        if host not in self._hosts:
            self._counters.add("refused.host")
            return ApiError(403, f"this is not {host[:100]!r}: gateway.hosts names what it is called", code="host")
        if scope["path"] in OPEN_PATHS:
            return None
        scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
        try:
            accepted = scheme.lower() == b"bearer" and self._token.accepts(shown.strip())
        except MindstreamError as error:
            return api_error(error)
        if accepted:
            return None
        self._counters.add("refused.token")
        if not shown:
            text = "no token: send `Authorization: Bearer TOKEN`; `mindstream gateway token` prints it"
            return ApiError(401, text, type=AUTHENTICATION, code="missing_token")
        client = scope.get("client") or ("", 0)
        self._events.report("wrong-token", "warning", f"a program at {client[0]} showed the endpoint a wrong token")
        text = "wrong token: `mindstream gateway token` prints the right one"
        return ApiError(401, text, type=AUTHENTICATION, code="invalid_api_key")


def application(
    endpoint: Endpoint,
    *,
    token: TokenCheck,
    hosts: Sequence[str],
    origins: Sequence[str],
    counters: Counters,
    events: Events,
) -> ASGIApp:
    """The whole of it."""
    middleware = []
    if origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(origins),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
                max_age=600,
            )
        )
    named = frozenset({"localhost", "127.0.0.1", "::1", *(_host_name(host) for host in hosts)})
    middleware.append(Middleware(Guard, token=token, hosts=named, counters=counters, events=events))

    def refused(_request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        counters.add("refused.request" if error.status < 500 else "failed.request")
        return _error_response(error)

    def not_found(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = f"{request.method} {request.url.path[:200]}: {error.detail}; there are /v1/models, /v1/chat/completions,"
        text += " /v1/completions and /v1/embeddings"
        code = "wrong_method" if error.status_code == 405 else "not_found"
        response = refused(request, ApiError(error.status_code, text, code=code))
        response.headers.update(error.headers or {})  # Allow, of 405
        return response

    def unexpected(_request: Request, _error: Exception) -> Response:
        counters.add("failed.request")
        text = "the gateway failed; its log has the details"
        return _error_response(ApiError(500, text, type=SERVER, code="internal_error"))

    return Starlette(
        routes=[
            Route("/healthz", endpoint.health),
            Route("/v1/models", endpoint.models),
            Route("/v1/models/{name:path}", endpoint.model),
            Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
            Route("/v1/completions", endpoint.completion, methods=["POST"]),
            Route("/v1/embeddings", endpoint.embeddings, methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={ApiError: refused, HTTPException: not_found, Exception: unexpected},
    )


async def _body(request: Request) -> bytes:
    """A request's body. Raises ApiError when it is too large, or does not come."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A web page may send other kinds anywhere without asking first (CORS).
        raise ApiError(415, "the body must be application/json", code="content_type")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise _too_large()

    async def read() -> bytes:
        found = bytearray()
        async for part in request.stream():
            found += part
            if len(found) > MAX_BODY_BYTES:
                raise _too_large()
        return bytes(found)

    try:
        return await asyncio.wait_for(read(), BODY_S)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not come in {BODY_S:g} s", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went before its request was whole", code="disconnected") from None


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes", code="request_too_large")


def _model(name: str, runner: Runner) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": runner.first_us // 1_000_000, "owned_by": runner.node}


def _json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def _error_response(error: ApiError) -> Response:
    headers = {}
    if error.retry_after_s:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="mindstream"'
    if error.status in (408, 413):
        headers["Connection"] = "close"  # what is left of the body is not read
    return Response(error.body(), error.status, headers, media_type="application/json")


def _host_name(host: str) -> str:
    """The name in a Host header or a configured address, without its port and brackets, in lower case."""
    name = host.strip().lower()
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        pass
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")
