"""Who may write and read which topics, derived from the topic table; as Mosquitto's ACL file, and as a bridge's topics.

One pattern: a name writes its own branch. It reads the branches of all, but of what is addressed (asks, replies) only
what is addressed to it. A new row in an area that is there already needs no new ACL file.

Mosquitto puts a name into a pattern in place of ``%u`` only where ``%u`` is the whole level: 2.0 replaces it anywhere,
2.1 does not. A topic outside the root that holds the name as part of a level is therefore written out for each user.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from protocol.errors import BrokerError
from protocol.ids import NAME_PATTERN
from protocol.topics import ROOT, TOPICS, Topic

ADDRESSEE_LEVELS = frozenset({"{target}", "{asker}"})
"""Levels of a row that name who it is for: nobody else reads it."""
NOT_BRIDGED = frozenset({"blob"})
"""Rows that no bridge carries: chunks have a connection of their own, and would fill a bridge's queue."""
ROLES = ("node", "bridge", "discovery")
DISCOVERY_ROOT = "homeassistant"
BIRTH = f"{DISCOVERY_ROOT}/status"
"""Where Home Assistant says that it has started: nodes answer by saying again what it may have missed."""

_ROOT_LEVELS = ROOT.split("/")
_AREA = len(_ROOT_LEVELS) + 1
"""Place of the level after the node's name: the area of the row."""
_HEADER = """\
# Made by `mindstream broker`: change users with `mindstream broker user`, not here.
# A name writes its own branch, and reads what is said to all or addressed to it. At its start Mosquitto warns of each
# `pattern` without %u: those are what every name may read.
"""


@dataclass(frozen=True)
class User:
    """A name at the broker."""

    name: str
    password_hash: str
    role: str = "node"
    """``node``: its own branch. ``bridge``: also the ``branches`` that it carries. ``discovery``: also all under
    ``homeassistant/``, as Home Assistant itself."""
    branches: tuple[str, ...] = ()
    """Names of the nodes whose branches a bridge carries."""

    def __post_init__(self) -> None:
        for name in (self.name, *self.branches):
            check_user_name(name)
        if self.role not in ROLES:
            raise BrokerError(
                f"making user {self.name}: there is no role {self.role!r}",
                hint=f"roles are {', '.join(ROLES)}",
                field="role",
                reason="unknown role",
            )
        if bool(self.branches) != (self.role == "bridge"):
            raise BrokerError(
                f"making user {self.name} of role {self.role}: a bridge names the branches it carries, others none",
                hint="--role bridge --branch NODE",
                field="branches",
                reason="role and branches do not fit",
            )


def check_user_name(name: str) -> None:
    """Raises BrokerError unless ``name`` may stand in a topic: it is a level of every topic that it writes."""
    if not NAME_PATTERN.fullmatch(name):
        raise BrokerError(
            f"taking {name[:80]!r} as a name at the broker: it is none",
            hint="use 1 to 63 of a-z, 0-9, '-' and '_', beginning with a letter or digit",
            field="name",
            reason="not a name",
        )


def render_acl(users: Iterable[User] = ()) -> str:
    """Mosquitto's ACL file: rules for every name, then those of single users."""
    lines = [_HEADER, f"pattern readwrite {ROOT}/%u/#"]
    lines += [f"pattern read {each}" for each in read_filters("%u")]
    lines += ["pattern read $SYS/broker/#", f"pattern read {BIRTH}"]
    outside = _outside()
    for row in outside:
        lines.append(f"pattern read {_everyone(row)}")
        if _whole_level(row):
            lines.append(f"pattern write {_written_by(row, '%u')}")
    for user in users:
        own = [f"topic readwrite {ROOT}/{branch}/#" for branch in user.branches]
        own += [f"topic read {each}" for branch in user.branches for each in _addressed_to(branch)]
        if user.role == "discovery":
            own.append(f"topic readwrite {DISCOVERY_ROOT}/#")
        for row in filter(_owned, outside):
            names = (user.name, *user.branches)
            own += [
                f"topic write {_written_by(row, name)}" for name in names if name != user.name or not _whole_level(row)
            ]
        if own:
            lines += ["", f"user {user.name}", *own]
    return "\n".join(lines) + "\n"


def read_filters(reader: str, *, bridged: bool = False) -> list[str]:
    """What ``reader`` reads of all nodes below the root, as subscription filters; ``%u`` makes patterns of them.

    ``bridged`` leaves out what no bridge carries.
    """
    return [each.replace("{}", reader) for each in _filters("+", bridged=bridged)]


def write_filters(writer: str) -> list[str]:
    """What a bridge carries of ``writer``'s own: its branch without what no bridge carries, and its topics outside."""
    below = [each.replace("{}", "+") for each in _filters(writer, bridged=True)]
    return below + [_written_by(row, writer) for row in _outside() if _owned(row)]


def retained_filters(node: str) -> list[str]:
    """What a broker may hold of ``node``'s own branch and give to a bridge that connects again."""
    return [row.filter(node=node) for row in _below_root() if row.retain]


def rules_of(text: str) -> list[str]:
    """The rules of an ACL file, without comments; each names what it is for, so their order does not count."""
    return [line.strip() for line in text.splitlines() if line.startswith(("pattern ", "topic "))]


def roles_of(text: str) -> Mapping[str, tuple[str, tuple[str, ...]]]:
    """Users with a role other than ``node`` in an ACL file made by ``render_acl``: role and branches of each."""
    roles: dict[str, tuple[str, tuple[str, ...]]] = {}
    user = ""
    for line in text.splitlines():
        if line.startswith("user "):
            user = line[5:].strip()
        elif user and (match := re.fullmatch(rf"topic readwrite {re.escape(ROOT)}/([^/+#]+)/#", line.strip())):
            roles[user] = ("bridge", (*roles.get(user, ("", ()))[1], match.group(1)))
        elif user and line.strip() == f"topic readwrite {DISCOVERY_ROOT}/#":
            roles[user] = ("discovery", ())
    return roles


def _below_root() -> list[Topic]:
    return [row for row in TOPICS if list(row.levels[: len(_ROOT_LEVELS)]) == _ROOT_LEVELS]


def _outside() -> list[Topic]:
    return [row for row in TOPICS if list(row.levels[: len(_ROOT_LEVELS)]) != _ROOT_LEVELS]


def _filters(node: str, *, bridged: bool) -> list[str]:
    """Filters in the branch of ``node`` (or ``+``), one an area where that is right; ``{}`` stands for the reader."""
    rows = [row for row in _below_root() if not (bridged and row.name in NOT_BRIDGED)]
    # Where an area holds addressed rows, or rows that must stay behind, no wildcard may cover it whole.
    mixed = {row.levels[_AREA] for row in _below_root() if _addressee(row) or (bridged and row.name in NOT_BRIDGED)}
    found: dict[str, None] = {}
    for row in rows:
        area = row.levels[_AREA]
        start = [*_ROOT_LEVELS, node]
        at = _addressee(row)
        if at:
            rest = [_free(level) for level in row.levels[_AREA:at]] + ["{}"]
            rest += ["#"] if len(row.levels) > at + 1 else []
        elif area in mixed or area.startswith("{") or len(row.levels) == _AREA + 1:
            rest = [_free(level) for level in row.levels[_AREA:]]
        else:
            rest = [area, "#"]
        found["/".join([*start, *rest])] = None
    return list(found)


def _addressed_to(reader: str) -> list[str]:
    return [each.replace("{}", reader) for each in _filters("+", bridged=False) if "{}" in each]


def _addressee(row: Topic) -> int:
    """Place of the level that says whom the row is for; 0 when it is for all."""
    return next((place for place, level in enumerate(row.levels) if level in ADDRESSEE_LEVELS), 0)


def _free(level: str) -> str:
    return "+" if "{" in level else level


def _whole_level(row: Topic) -> bool:
    return "{node}" in row.levels


def _owned(row: Topic) -> bool:
    """Whether the topic says who speaks: otherwise it is nobody's own, and no name may write it."""
    return any("{node}" in level for level in row.levels)


def _everyone(row: Topic) -> str:
    return "/".join(_free(level) for level in row.levels)


def _written_by(row: Topic, name: str) -> str:
    return "/".join(_free(level.replace("{node}", name)) for level in row.levels)
