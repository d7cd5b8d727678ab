"""The endpoint as programs use it: OpenAI's own package against two real nodes."""

from __future__ import annotations

import socket
from typing import Any

import httpx2
import msgspec
import openai
import pytest

from edge.bus import Bus
from protocol.ids import uuid7
from protocol.messages import ChatMessage, ModelGenerate, RunDone
from tests.services.gateway.conftest import Site
from tests.support.nodes import wait_for

HELLO = [{"role": "user", "content": "Hello there"}]
STEADY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


def asked_directly(site: Site, text: str, node: str = "tomato", **settings: Any) -> RunDone:
    """The same question over the bus."""
    with Bus(url=site.broker_url, node="tester", client=f"asker-{uuid7()}") as bus:
        ask = ModelGenerate(f"direct-{uuid7()}", [ChatMessage("user", text)], **({"max_new_tokens": 12} | settings))
        done: RunDone = bus.ask(node, ask, ttl_ms=60_000)
        return done


# --- models ---------------------------------------------------------------------------------------------------


def test_every_nodes_model_is_listed_by_its_name_and_by_its_node(site: Site, client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    chats = {name for name in listed if "minilm" not in name}
    assert chats == {site.model, site.other, f"tomato/{site.model}", f"sprout/{site.other}"}
    assert listed[site.other].owned_by == "sprout"
    assert listed[site.model].created > 1_700_000_000
    found = client.models.retrieve(f"sprout/{site.other}")
    assert (found.id, found.object) == (f"sprout/{site.other}", "model")


def test_an_unknown_model_is_refused_with_the_known_ones(site: Site, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=f"sprout/{site.other}") as caught:
        client.chat.completions.create(model="gpt-17", messages=HELLO)  # type: ignore[arg-type]
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError, match=site.model):
        client.models.retrieve("sprout/nothing")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=f"sprout/{site.model}", messages=HELLO)  # type: ignore[arg-type]


# --- chat -----------------------------------------------------------------------------------------------------


def test_an_answer_is_the_one_that_the_bus_gives(site: Site, client: openai.OpenAI) -> None:
    direct = asked_directly(site, "Hello there")
    answer = client.chat.completions.create(model=site.model, messages=HELLO, **STEADY)
    choice = answer.choices[0]
    assert choice.message.content == direct.text
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", direct.finish_reason, 0)
    assert answer.usage is not None
    assert direct.usage is not None
    assert answer.usage.prompt_tokens == direct.usage.prompt_tokens
    assert answer.usage.completion_tokens == len(direct.tokens)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model_extra["mindstream"]["node"] == "tomato"  # type: ignore[index]


def test_a_stream_brings_the_same_answer_in_pieces_and_its_usage(site: Site, client: openai.OpenAI) -> None:
    direct = asked_directly(site, "Hello there")
    with client.chat.completions.create(
        model=site.model, messages=HELLO, stream=True, stream_options={"include_usage": True}, **STEADY
    ) as stream:
        chunks = list(stream)
    *pieces, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(direct.tokens)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == direct.text
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [direct.finish_reason]
    assert all(piece.usage is None for piece in pieces)
    assert len({chunk.id for chunk in chunks}) == 1


def test_another_nodes_model_answers_through_this_node(site: Site, client: openai.OpenAI) -> None:
    direct = asked_directly(site, "Hello there", node="sprout")
    for name in (site.other, f"sprout/{site.other}"):
        answer = client.chat.completions.create(model=name, messages=HELLO, **STEADY)
        assert answer.choices[0].message.content == direct.text
        assert answer.model_extra["mindstream"]["node"] == "sprout"  # type: ignore[index]


def test_log_probabilities_come_whole_and_in_a_stream(site: Site, client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": site.model, "messages": HELLO, "logprobs": True, **STEADY}
    whole = client.chat.completions.create(**arguments).choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    assert len(whole.content) == 12
    assert all(token.logprob <= 0 for token in whole.content)
    likeliest = client.chat.completions.create(**arguments, top_logprobs=3).choices[0].logprobs
    assert likeliest is not None
    for token in likeliest.content or []:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
    streamed = [
        token
        for chunk in client.chat.completions.create(**arguments, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content or []
    ]
    assert [(token.token, token.logprob) for token in streamed] == [
        (token.token, token.logprob) for token in whole.content
    ]


def test_a_seed_gives_the_same_answer_again_and_no_seed_another(site: Site, client: openai.OpenAI) -> None:
    def answer(**arguments: Any) -> str:
        done = client.chat.completions.create(model=site.model, messages=HELLO, max_tokens=12, **arguments)  # type: ignore[arg-type]
        return done.choices[0].message.content or ""

    assert answer(seed=5) == answer(seed=5)
    assert answer(seed=-5) == answer(seed=-5)
    assert len({answer() for _ in range(4)}) > 1


def test_several_answers_to_one_question_have_seeds_of_their_own(site: Site, client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": site.model, "messages": HELLO, "max_tokens": 12, "seed": 3, "n": 3}
    whole = [choice.message.content for choice in client.chat.completions.create(**arguments).choices]
    assert len(set(whole)) > 1
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**arguments, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == whole


def test_parts_of_text_and_the_developers_role_are_taken(site: Site, client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(
        model=site.model,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one\ntwo"}],
        **STEADY,
    )
    parts = client.chat.completions.create(
        model=site.model,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        ],
        **STEADY,
    )
    assert parts.choices[0].message.content == plain.choices[0].message.content


def test_an_answer_meets_its_json_schema(site: Site, client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed: make install (extra `model`)")
    schema = {
        "type": "object",
        "properties": {"sunny": {"type": "boolean"}, "degrees": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["sunny", "degrees"],
        "additionalProperties": False,
    }
    wrapped = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}
    for stream in (False, True):
        arguments: dict[str, Any] = {"model": site.model, "messages": HELLO, "max_tokens": 200, "seed": 4}
        answer = client.chat.completions.create(**arguments, response_format=wrapped, stream=stream)
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            text = answer.choices[0].message.content or ""
        found = msgspec.json.decode(text)
        assert isinstance(found["sunny"], bool)
        assert found["degrees"] in range(10)
    broken = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=site.model, messages=HELLO, response_format=broken)  # type: ignore[call-overload]


# --- what is remembered between requests ----------------------------------------------------------------------


def test_the_next_turn_reads_only_what_is_new(site: Site, client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": f"A long beginning {uuid7()} {'word ' * 40}"}]
    first = client.chat.completions.create(model=site.model, messages=messages, **STEADY)
    messages += [first.choices[0].message, {"role": "user", "content": "And then?"}]
    held = site.counter("histories_held")
    second = client.chat.completions.create(model=site.model, messages=messages, **STEADY)
    assert site.counter("histories_held") == held + 1
    assert cached(second) >= cached(first)
    # The same turn once more: the history was taken out, so that two cannot mix, and is read again.
    client.chat.completions.create(model=site.model, messages=messages, **STEADY)
    assert site.counter("histories_held") == held + 1


def test_a_history_that_the_runner_forgot_is_read_again(site: Site, client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "user", "content": f"Once {uuid7()}"},
        {"role": "assistant", "content": "upon a time"},
        {"role": "user", "content": "And then?"},
    ]
    read = client.chat.completions.create(model=site.model, messages=messages, **STEADY)
    history = [ChatMessage(message["role"], message["content"]) for message in messages]
    forgotten = site.counter("histories_forgotten")
    site.gateway.endpoint.histories.note("tomato", site.model, history[:2], f"gone-{uuid7()}")
    again = client.chat.completions.create(model=site.model, messages=messages, **STEADY)
    assert site.counter("histories_forgotten") == forgotten + 1
    assert again.choices[0].message.content == read.choices[0].message.content


def cached(answer: Any) -> int:
    return int(answer.usage.prompt_tokens_details.cached_tokens)


# --- completions ----------------------------------------------------------------------------------------------


def test_a_text_goes_on_as_it_does_over_the_bus(site: Site, client: openai.OpenAI) -> None:
    with Bus(url=site.broker_url, node="tester", client="completer") as bus:
        ask = ModelGenerate(f"text-{uuid7()}", prompt="Once upon", max_new_tokens=12)
        direct: RunDone = bus.ask("tomato", ask, ttl_ms=60_000)
    arguments: dict[str, Any] = {"model": site.model, "prompt": "Once upon", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**arguments)
    assert (whole.object, whole.choices[0].text) == ("text_completion", direct.text)
    streamed = list(client.completions.create(**arguments, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == direct.text
    assert streamed[-1].choices[0].finish_reason == direct.finish_reason
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(b"Once upon")  # every byte is a token of this model
    tokens = client.completions.create(**(arguments | {"prompt": list(b"abc")}))
    assert tokens.usage is not None
    assert tokens.usage.prompt_tokens == 3


def test_several_prompts_are_several_choices_with_log_probabilities(site: Site, client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": site.model, "max_tokens": 5, "temperature": 0, "logprobs": 2}
    both = client.completions.create(prompt=["One", "Another"], **arguments)
    alone = [client.completions.create(prompt=prompt, **arguments).choices[0] for prompt in ("One", "Another")]
    assert [choice.index for choice in both.choices] == [0, 1]
    assert [choice.text for choice in both.choices] == [choice.text for choice in alone]
    logprobs = both.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.token_logprobs or []) == 5
    assert "".join(logprobs.tokens or []) == both.choices[0].text
    assert len((logprobs.top_logprobs or [{}])[0]) <= 2


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["x", ""]}, "prompt"),
        ({"prompt": ["x", 5]}, "prompt"),
        ({"prompt": ["x"] * 20}, "prompt"),
        ({"prompt": [10_000]}, "prompt_tokens"),
    ],
)
def test_completions_that_are_not_supported_are_refused(
    site: Site, client: openai.OpenAI, arguments: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**({"model": site.model, "prompt": "x", "max_tokens": 2} | arguments))
    assert caught.value.param == param


# --- embeddings -----------------------------------------------------------------------------------------------


def test_embeddings_come_as_numbers_and_as_bytes(site: Site, client: openai.OpenAI) -> None:
    if not site.runner.embeddings.name:
        pytest.skip("the embedding model is not installed: mindstream models pull all-minilm-l6-v2")
    assert "all-minilm-l6-v2" in {model.id for model in client.models.list()}
    texts = ["A man is eating food.", "A man eats something.", "The stock market fell today."] * 40
    found = client.embeddings.create(model="all-minilm-l6-v2", input=texts)  # base64, unpacked by the package
    assert [each.index for each in found.data] == list(range(120))
    vectors = [each.embedding for each in found.data]
    assert {len(vector) for vector in vectors} == {384}
    assert vectors[0] == vectors[117]

    def similarity(one: int, other: int) -> float:
        return sum(a * b for a, b in zip(vectors[one], vectors[other], strict=True))

    assert similarity(0, 1) > 0.7
    assert similarity(0, 2) < 0.3
    floats = client.embeddings.create(model="sprout/all-minilm-l6-v2", input=texts[1], encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(vectors[1], abs=1e-6)
    assert floats.usage.prompt_tokens == 7
    long = client.embeddings.create(model="all-minilm-l6-v2", input=["short", "word " * 5000])
    assert long.model_extra["mindstream"]["truncated"] == [1]  # type: ignore[index]


def test_embeddings_that_cannot_be_made_say_why(site: Site, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="embedding"):
        client.embeddings.create(model=site.model, input="x")
    for arguments, param in (
        ({"input": [1, 2]}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": "x", "dimensions": 64}, "dimensions"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(**({"model": "all-minilm-l6-v2"} | arguments))  # type: ignore[arg-type]
        assert caught.value.param == param


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logit_bias": {"5": 3}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"extra_body": {"mirostat": 2}}, "mirostat"),
        ({"extra_body": {"conversation": "Not A Name"}}, "conversation"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ada"}]}, "messages[0].name"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    site: Site, client: openai.OpenAI, arguments: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**({"model": site.model, "messages": HELLO} | arguments))
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_parameters_that_ask_for_nothing_are_taken(site: Site, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model=site.model,
        messages=HELLO,  # type: ignore[arg-type]
        max_tokens=2,
        frequency_penalty=0,
        presence_penalty=0,
        tools=[],
        user="somebody",
        metadata={"a": "b"},
        store=False,
        response_format={"type": "text"},
        service_tier="auto",
    )


def test_a_prompt_longer_than_the_context_is_refused_also_in_a_stream(site: Site, client: openai.OpenAI) -> None:
    long: list[Any] = [{"role": "user", "content": "word " * 3000}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=site.model, messages=long, stream=stream)
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"model": 5}', b'{"messages": [{}]}'])
def test_a_body_that_is_no_request_is_refused(site: Site, body: bytes) -> None:
    headers = {**site.headers, "content-type": "application/json"}
    for path in ("chat/completions", "completions"):
        reply = httpx2.post(f"{site.url}/{path}", content=body, headers=headers)
        assert reply.status_code == 400
        assert reply.json()["error"]["type"] == "invalid_request_error"


def test_a_path_that_is_not_there_or_is_asked_in_another_way_is_told_apart(site: Site) -> None:
    nothing = httpx2.get(f"{site.url}/nothing", headers=site.headers)
    assert (nothing.status_code, nothing.json()["error"]["code"]) == (404, "not_found")
    wrong = httpx2.get(f"{site.url}/chat/completions", headers=site.headers)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "wrong_method")
    assert wrong.headers["allow"] == "POST"


# --- who may use it -------------------------------------------------------------------------------------------


def test_without_the_token_there_is_nothing_but_health(site: Site) -> None:
    root = site.url.removesuffix("/v1")
    for headers in ({}, {"Authorization": f"Bearer {site.token}x"}, {"Authorization": f"Basic {site.token}"}):
        for path in ("/v1/models", "/v1/models/x", "/v1/nothing", "/"):
            reply = httpx2.get(root + path, headers=headers)
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"].startswith("Bearer")
            assert site.token not in reply.text
        assert httpx2.post(f"{site.url}/chat/completions", json={}, headers=headers).status_code == 401
    health = httpx2.get(f"{root}/healthz")
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=site.url, api_key="sk-wrong", max_retries=0).models.list()
    wait_for(lambda: site.watcher.events_of("tomato", "wrong-token"), "nobody said that a wrong token was shown")


def test_a_host_name_that_is_not_this_machines_is_refused(site: Site) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        reply = httpx2.get(f"{site.url}/models", headers={**site.headers, "Host": host})
        assert reply.status_code in (400, 403), host
    for host in ("localhost", "LOCALHOST:99", "127.0.0.1", "[::1]:8650"):
        assert httpx2.get(f"{site.url}/models", headers={**site.headers, "Host": host}).status_code == 200


def test_a_web_page_of_elsewhere_may_not_use_it(site: Site) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx2.options(f"{site.url}/chat/completions", headers=asked)
    assert preflight.status_code in (401, 405)
    assert "access-control-allow-origin" not in preflight.headers
    simple = {**site.headers, "content-type": "text/plain", "Origin": "https://evil.example"}
    body = msgspec.json.encode({"model": site.model, "messages": HELLO})
    assert httpx2.post(f"{site.url}/chat/completions", content=body, headers=simple).status_code == 415


# --- clients that go, and clients that are many ---------------------------------------------------------------


def test_a_client_that_goes_in_the_middle_cancels_its_run(site: Site) -> None:
    cancelled = site.counter("runs_cancelled")
    body = msgspec.json.encode(
        {"model": site.model, "messages": HELLO, "stream": True, "max_tokens": 1800, "temperature": 0}
    )
    with socket.create_connection(("127.0.0.1", site.port)) as connection:
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {site.token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        received = b""
        while received.count(b"data: ") < 3:
            part = connection.recv(4096)
            assert part, f"the connection was closed after {received!r}"
            received += part
        assert received.startswith(b"HTTP/1.1 200 ")
    wait_for(lambda: site.counter("runs_cancelled") == cancelled + 1, "the run was not cancelled", 60)
    wait_for(lambda: site.runner.bus.counters["runs.cancelled"] >= 1, "the runner has not heard of it", 60)
    wait_for(lambda: site.gateway.runs.active == 0, "the run is still under way", 60)


def test_closing_the_stream_of_the_package_cancels_too(site: Site, client: openai.OpenAI) -> None:
    before = site.runner.bus.counters["runs.cancelled"]
    stream = client.chat.completions.create(model=site.model, messages=HELLO, stream=True, max_tokens=1800)  # type: ignore[arg-type]
    next(iter(stream))
    stream.close()
    wait_for(lambda: site.runner.bus.counters["runs.cancelled"] > before, "it was not cancelled", 60)


def test_a_hundred_requests_at_once_are_all_answered(site: Site) -> None:
    import asyncio

    client = openai.AsyncOpenAI(base_url=site.url, api_key=site.token, max_retries=0, timeout=120)

    async def one(index: int) -> tuple[int, str, str]:
        messages: list[Any] = [{"role": "user", "content": f"Number {index % 10}"}]
        arguments: dict[str, Any] = {"model": site.model, "messages": messages, "temperature": 0, "max_tokens": 3}
        if index % 2:
            text = ""
            async for chunk in await client.chat.completions.create(**arguments, stream=True):
                text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            return index % 10, "stream", text
        answer = await client.chat.completions.create(**arguments)
        return index % 10, "whole", answer.choices[0].message.content or ""

    async def all_of_them() -> list[tuple[int, str, str]]:
        async with client:
            return await asyncio.gather(*(one(index) for index in range(100)))

    answers = asyncio.run(all_of_them())
    assert len(answers) == 100
    for number in range(10):
        assert len({text for each, _, text in answers if each == number}) == 1
    wait_for(lambda: site.gateway.runs.active == 0, "a run is still under way")
