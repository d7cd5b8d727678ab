"""The topic table: every topic that Mindstream uses, declared once.

Subscriptions, ACLs, AsyncAPI and the docs' tables are derived from ``TOPICS``. A name writes its own branch,
``mindstream/v1/{node}/…``, and nothing else: the topic proves who spoke. One row has another root, because others
say what it must be called: Home Assistant's discovery.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from protocol.errors import WrongTopic
from protocol.ids import NAME_PATTERN

ROOT = "mindstream/v1"
KIB = 1024


@dataclass(frozen=True)
class Topic:
    """One row: a family of topics of one shape.

    Its ``pattern`` stands below ``root``; levels in braces are names, checked as such. A level may have a literal
    beginning before its name.
    """

    name: str
    pattern: str
    about: str
    max_bytes: int
    """The whole payload's limit; what is larger is refused before the client library or a decoder sees it."""
    qos: int = 1
    retain: bool = False
    format: str = "msgpack"
    """``msgpack`` (an envelope) or ``json`` (a bare object that any tool can read)."""
    every_s: float = 0.0
    """The longest that a live speaker is silent here, in seconds: an unchanged word is said again after it. 0: nothing
    is promised. Who promised, and is silent for some of these, is late (``edge/liveness.py``)."""
    root: str = ROOT
    levels: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(f"{self.root}/{self.pattern}".split("/")))

    @property
    def params(self) -> tuple[str, ...]:
        """The names in braces, in order; the first is always ``node``, the speaker."""
        return tuple(name for _, name in map(_taken_apart, self.levels) if name)

    @property
    def shown(self) -> str:
        """The pattern as people read it: with its root only where that is another one."""
        return self.pattern if self.root == ROOT else f"{self.root}/{self.pattern}"

    def format_topic(self, **names: str) -> str:
        """The concrete topic. Raises WrongTopic when a name is missing or may not stand in a topic."""
        return self._fill(names, wildcard=False)

    def filter(self, **names: str) -> str:
        """A subscription filter: ``+`` for every name not given."""
        return self._fill(names, wildcard=True)

    def _fill(self, names: dict[str, str], *, wildcard: bool) -> str:
        out = []
        for level in self.levels:
            beginning, param = _taken_apart(level)
            if not param:
                out.append(level)
                continue
            name = names.get(param, "+" if wildcard else "")
            if not (wildcard if name == "+" else NAME_PATTERN.fullmatch(name)):
                raise WrongTopic(
                    f"making a topic of {self.pattern!r}: {param} {name[:80]!r} is not a name",
                    hint="use 1 to 63 of a-z, 0-9, '-' and '_'",
                    field=param,
                    reason="not a name",
                )
            # MQTT has no wildcard for the end of a level: the whole level it is, and parse() refuses the others.
            out.append("+" if name == "+" else beginning + name)
        return "/".join(out)


@lru_cache(maxsize=256)
def _taken_apart(level: str) -> tuple[str, str]:
    """A pattern's level as its literal beginning and the name in braces; the whole level and nothing without one."""
    beginning, brace, name = level.partition("{")
    return (beginning, name[:-1]) if brace else (level, "")


@dataclass(frozen=True)
class ParsedTopic:
    """A concrete topic, taken apart."""

    topic: Topic
    node: str
    """The speaker: whose branch it is."""
    names: dict[str, str]
    raw: str
    """The whole topic."""


STATE = Topic(
    "state",
    "{node}/state",
    "whether the node is there: retained, and its will",
    8 * KIB,
    retain=True,
    format="json",
    every_s=10.0,
)
SERVICE_STATE = Topic(
    "service_state",
    "{node}/service/{service}/state",
    "a service's state, counters and queues: retained, and its will",
    32 * KIB,
    retain=True,
    format="json",
    every_s=10.0,
)
EVENT = Topic(
    "event", "{node}/event/{service}", "what was dropped, lost or refused, and other things to know", 16 * KIB
)
MEMORY_LOG = Topic("memory_log", "{node}/memory/log", "new entries of the node's own log", 1000 * KIB)
MEMORY_HAVE = Topic(
    "memory_have", "{node}/memory/have", "digest of all the entries that the node holds", 1 * KIB, retain=True
)
RUN_TOKEN = Topic("run_token", "{node}/model/run/{run}/token", "tokens of a run as they are generated", 16 * KIB)
RUN_DONE = Topic("run_done", "{node}/model/run/{run}/done", "the end of a run, with its text and usage", 512 * KIB)
SNAPSHOT_ANNOUNCE = Topic("snapshot_announce", "{node}/snapshot/announce", "a snapshot that the node holds", 8 * KIB)
POOL_HAVE = Topic(
    "pool_have",
    "{node}/pool/have",
    "the pool's entries that the node holds, told to its site alone",
    72 * KIB,
    retain=True,
)
POOL_WITNESS = Topic(
    "pool_witness",
    "{node}/pool/witness",
    "whether the node agrees with an entry of the pool that it has read itself",
    4 * KIB,
)
SNAPSHOT_PROGRESS = Topic(
    "snapshot_progress", "{node}/snapshot/run/{run}/progress", "how far a save or a fetch is", 1 * KIB
)
BLOB = Topic("blob", "{node}/blob/{transfer}", "chunks of a blob on the way to the one who pulled it", 516 * KIB)
ASK = Topic(
    "ask",
    "{node}/ask/{target}/{service}/{verb}",
    "a question or command to another node's service",
    1000 * KIB,
)
REPLY = Topic("reply", "{node}/reply/{asker}/{client}", "the answer to an ask", 1000 * KIB)
HOME_ASSISTANT = Topic(
    "home_assistant",
    "device/mindstream-{node}/config",
    "the node's health as a device of Home Assistant (its MQTT discovery)",
    64 * KIB,
    retain=True,
    format="json",
    root="homeassistant",
)

TOPICS: tuple[Topic, ...] = (
    STATE,
    SERVICE_STATE,
    EVENT,
    MEMORY_LOG,
    MEMORY_HAVE,
    RUN_TOKEN,
    RUN_DONE,
    SNAPSHOT_ANNOUNCE,
    POOL_HAVE,
    POOL_WITNESS,
    SNAPSHOT_PROGRESS,
    BLOB,
    ASK,
    REPLY,
    HOME_ASSISTANT,
)

MAX_PACKET_BYTES = 1024 * KIB
"""What brokers are configured to carry: above every topic's limit, with room for topic and properties."""

_LEVEL = re.compile(NAME_PATTERN.pattern)
_BY_SHAPE: dict[tuple[int, str], list[Topic]] = {}
_ELSEWHERE = [topic for topic in TOPICS if topic.root != ROOT]
for _topic in TOPICS:
    if _topic.root == ROOT:
        _BY_SHAPE.setdefault((len(_topic.levels), _topic.levels[3]), []).append(_topic)


@lru_cache(maxsize=4096)
def parse(topic: str) -> ParsedTopic:
    """Take a concrete topic apart. Raises WrongTopic when no row of the table has its shape."""
    levels = topic.split("/")
    if len(topic) <= 512 and len(levels) > 3:
        if f"{levels[0]}/{levels[1]}" == ROOT:
            rows = _BY_SHAPE.get((len(levels), levels[3]), ())
        else:
            rows = [row for row in _ELSEWHERE if len(row.levels) == len(levels)]
        for row in rows:
            names: dict[str, str] = {}
            for pattern, level in zip(row.levels, levels, strict=True):
                beginning, param = _taken_apart(pattern)
                if not param:
                    if pattern != level:
                        break
                elif level.startswith(beginning) and _LEVEL.fullmatch(level, len(beginning)):
                    names[param] = level[len(beginning) :]
                else:
                    break
            else:
                return ParsedTopic(row, names["node"], names, topic)
    raise WrongTopic(
        f"reading the topic {topic[:120]!r}: no row of the topic table has this shape",
        hint="docs/protocol.md lists them",
        topic=topic[:512],
        field="topic",
        reason="not in the table",
    )
