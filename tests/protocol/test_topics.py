"""The topic table: topics are made and taken apart by it, and what is not in it is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from protocol.errors import WrongTopic
from protocol.messages import MESSAGES
from protocol.topics import ASK, MAX_PACKET_BYTES, MEMORY_LOG, ROOT, RUN_TOKEN, STATE, TOPICS, Topic, parse

NAMES = st.from_regex(r"[a-z0-9][a-z0-9_\-]{0,62}", fullmatch=True)
by_name = pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)


@by_name
@given(data=st.data())
def test_a_topic_made_of_names_is_taken_apart_into_them(topic: Topic, data: st.DataObject) -> None:
    names = {param: data.draw(NAMES) for param in topic.params}
    parsed = parse(topic.format_topic(**names))
    assert (parsed.topic, parsed.names, parsed.node) == (topic, names, names["node"])


@by_name
def test_the_speaker_stands_first_below_the_root(topic: Topic) -> None:
    assert topic.params[0] == "node"
    assert topic.pattern.startswith("{node}/") or topic.root != ROOT


@by_name
def test_a_filter_matches_its_topics_as_mqtt_says(topic: Topic) -> None:
    names = {param: f"{param}-1" for param in topic.params}
    concrete = topic.format_topic(**names)
    assert topic_matches_sub(topic.filter(), concrete)
    assert topic_matches_sub(topic.filter(**names), concrete)
    if topic.root == ROOT:
        assert topic.filter(node="other") == "/".join(["mindstream", "v1", "other", *topic.filter().split("/")[3:]])
    assert not topic_matches_sub(topic.filter(node="other"), concrete)


@by_name
def test_no_topics_filter_matches_anothers_topics(topic: Topic) -> None:
    for other in TOPICS:
        if other is not topic:
            concrete = other.format_topic(**dict.fromkeys(other.params, "x"))
            assert not topic_matches_sub(topic.filter(), concrete), other.name


@by_name
def test_limits_fit_into_a_packet(topic: Topic) -> None:
    assert 0 < topic.max_bytes < MAX_PACKET_BYTES
    assert topic.qos == 1
    assert all(row.max_bytes <= topic.max_bytes for row in MESSAGES.values() if row.topic is topic)


@pytest.mark.parametrize("name", ["", "+", "#", "a/b", "A", "a b", "\0", "..", "x" * 64])
def test_a_topic_is_not_made_of_what_is_no_name(name: str) -> None:
    with pytest.raises(WrongTopic) as caught:
        MEMORY_LOG.format_topic(node=name)
    assert caught.value.field == "node"
    if name != "+":
        with pytest.raises(WrongTopic):
            MEMORY_LOG.filter(node=name)


def test_a_missing_name_is_named() -> None:
    with pytest.raises(WrongTopic) as caught:
        RUN_TOKEN.format_topic(node="tomato")
    assert caught.value.field == "run"


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "/",
        "mindstream",
        "mindstream/v1",
        "mindstream/v1/",
        "mindstream/v1/tomato",
        "mindstream/v1/tomato/",
        "mindstream/v1//state",
        "mindstream/v2/tomato/state",
        "Mindstream/v1/tomato/state",
        "mindstream/v1/Tomato/state",
        "mindstream/v1/+/state",
        "mindstream/v1/#",
        "mindstream/v1/tomato/state/",
        "mindstream/v1/tomato/state\n",
        "mindstream/v1/tomato/state/more",
        "mindstream/v1/../state",
        "mindstream/v1/tomato\0/state",
        "mindstream/v1/" + "x" * 64 + "/state",
        "mindstream/v1/tomato/ask/sprout/memory_store",
        "mindstream/v1/tomato/ask/+/memory_store/put",
        "mindstream/v1/tomato/ask/sprout/memory_store/put/x",
        "$SYS/broker/uptime",
        "/".join("a" * 30_000),
        "\ud800",
    ],
)
def test_a_hostile_topic_is_refused_by_name_and_cut_to_size(raw: str) -> None:
    with pytest.raises(WrongTopic) as caught:
        parse(raw)
    assert (caught.value.field, caught.value.reason) == ("topic", "not in the table")
    assert len(caught.value.topic) <= 512
    assert len(caught.value.message) < 1000


@given(st.text(max_size=300))
def test_any_text_is_a_topic_of_the_table_or_refused(raw: str) -> None:
    for text in (raw, f"mindstream/v1/{raw}", f"mindstream/v1/{raw}/state"):
        try:
            parsed = parse(text)
        except WrongTopic:
            continue
        assert parsed.topic.format_topic(**parsed.names) == text


def test_asks_and_states_are_told_apart() -> None:
    ask = parse("mindstream/v1/tomato/ask/sprout/memory_store/put")
    assert ask.topic is ASK
    assert ask.names == {"node": "tomato", "target": "sprout", "service": "memory_store", "verb": "put"}
    assert parse("mindstream/v1/tomato/state").topic is STATE
