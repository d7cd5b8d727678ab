"""The pages of docs/ that are made from the code: ``python -m edge.docs`` writes them, ``--check`` compares.

``configuration.md`` from the structs of edge/config.py, ``cli.md`` from the commands, ``protocol.md`` from the topic
and message tables and the docstrings of their fields. Nothing else is touched. With ``--check`` it exits 1 and shows
what differs when a page is not what the code says.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
import typer.main
from msgspec import Meta

from edge.cli.app import app
from edge.cli.context import EXIT_CODES
from edge.config import ENV_OTHER, PATH_KEYS, SECTIONS
from protocol import codec, entries, errors, manifest, messages
from protocol.messages import MESSAGES
from protocol.topics import MAX_PACKET_BYTES, ROOT, TOPICS

DOCS = Path(__file__).resolve().parent.parent / "docs"
GENERATED = "<!-- Made by `python -m edge.docs`: change the code, not this page. -->"

# --- configuration ----------------------------------------------------------------------------------------

_CONFIGURATION = """\
# Configuration

{generated}

All of it is optional: without a file every key has its default. The file is the first of

1. `--config FILE`
2. `$MINDSTREAM_CONFIG`
3. `./mindstream.toml`
4. `$XDG_CONFIG_HOME/mindstream/mindstream.toml` (`~/.config/mindstream/mindstream.toml`)
5. `/etc/mindstream/mindstream.toml`

```toml
[node]
name = "tomato"

[broker]
url = "mqtts://broker.local:8883"
username = "tomato"
password_file = "broker-password"

[services]
enabled = ["memory_store", "sync_bridge"]
```

A variable `MINDSTREAM_SECTION__KEY` in the environment overrides a key, for example `MINDSTREAM_NODE__NAME=sprout` or
`MINDSTREAM_SERVICES__ENABLED='["memory_store"]'`; its value is TOML, or plain text. {others} are the only other
variables with that prefix. Unknown sections, keys and variables, wrong types and values out of range are refused: the
error names file and line (or variable), key, and the nearest key there is. `mindstream config show` prints what is in
force, `mindstream config path` the file.

Secrets are never values: a key names the file that holds one. Relative paths in {paths} are taken from the folder of
the file that they stand in.
"""


def configuration_page() -> str:
    """docs/configuration.md."""
    parts = [
        _CONFIGURATION.format(
            generated=GENERATED,
            others=" and ".join(f"`{name}`" for name in sorted(ENV_OTHER)),
            paths=", ".join(f"`{key}`" for key in PATH_KEYS),
        )
    ]
    for section, struct in SECTIONS.items():
        hints = get_type_hints(struct, include_extras=True)
        rows = []
        for field in msgspec.structs.fields(struct):
            metas = list(_metas(hints[field.name]))
            description = next((meta.description for meta in metas if meta.description), "")
            rows.append(
                (f"`{field.name}`", _config_type(hints[field.name]), _default(field), _range(metas), description)
            )
        table = _table(("key", "type", "default", "allowed", "meaning"), rows)
        parts.append(f"## [{section}]\n{_sentence(struct)}\n\n{table}")
    return "\n".join(parts)


def _metas(hint: Any) -> Iterator[Meta]:
    if get_origin(hint) is Annotated:
        yield from (each for each in hint.__metadata__ if isinstance(each, Meta))


def _config_type(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    if hint in names:
        return names[hint]
    # list[str], or list[str] | None
    return "list of texts"


def _default(field: Any) -> str:
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    return "" if value is None else f"`{msgspec.json.encode(value).decode()}`"


def _range(metas: Sequence[Meta]) -> str:
    bounds = {
        name: getattr(meta, name) for meta in metas for name in ("gt", "ge", "le") if getattr(meta, name) is not None
    }
    low = f"above {bounds['gt']:,}" if "gt" in bounds else f"{bounds['ge']:,}" if "ge" in bounds else ""
    high = f"{bounds['le']:,}" if "le" in bounds else ""
    if low and high:
        return f"{low} to {high}" if "ge" in bounds else f"{low}, to {high}"
    return f"from {low}" if low and "ge" in bounds else low or (f"to {high}" if high else "")


# --- the command line -------------------------------------------------------------------------------------

_CLI = """\
# Command line

{generated}

`mindstream [--config FILE] [--debug] COMMAND`. What `--json` prints is for scripts and stays as it is from the first
release on, but for new fields. Errors are one line on stderr and a hint, with `--debug` a traceback.

## Exit codes
{codes}
"""


def cli_page() -> str:
    """docs/cli.md."""
    codes = _table(("code", "meaning"), [(str(code), meaning) for code, meaning in EXIT_CODES.items()])
    root: Any = typer.main.get_command(app)
    parts = [_CLI.format(generated=GENERATED, codes=codes), f"## Global options\n{_options(root)}"]
    parts += [_command_section(path, command) for path, command in commands(root)]
    return "\n".join(parts)


def commands(command: Any = None, path: tuple[str, ...] = ("mindstream",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below ``command`` (default: the whole program) with its words, groups included."""
    command = typer.main.get_command(app) if command is None else command
    for name, child in getattr(command, "commands", {}).items():
        yield (*path, name), child
        yield from commands(child, (*path, name))


def _command_section(path: tuple[str, ...], command: Any) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    words = [_argument(parameter) for parameter in arguments]
    if hasattr(command, "commands"):
        words.append("COMMAND")
    usage = " ".join([*path, *words])
    about = textwrap.dedent(command.help or "").strip().replace("\n\n", "\n")
    parts = [f"{'#' * min(4, len(path))} {' '.join(path)}\n{about}\n\n`{usage}`\n"]
    described = [(f"`{_argument(each)}`", _plain(each.help)) for each in arguments if each.help]
    if described:
        parts.append(_table(("argument", "meaning"), described))
    if options := _options(command):
        parts.append(options)
    return "\n".join(parts)


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return str(name if parameter.required else f"[{name.strip('[]')}]")


def _options(command: Any) -> str:
    rows = []
    for option in command.params:
        if option.param_type_name != "option":
            continue
        names = ", ".join(f"`{name}`" for name in option.opts)
        given = option.default
        default = "" if option.is_flag or given in (None, "", ()) or callable(given) else f"`{given}`"
        rows.append((names, default, _plain(option.help)))
    return _table(("option", "default", "meaning"), rows) if rows else ""


# --- the wire ---------------------------------------------------------------------------------------------

_PROTOCOL = """\
# Protocol

{generated}

What crosses the bus, for clients in any language. Everything is below `{root}/`, in lowercase.

- **A node writes its own branch and nothing else.** The first level below the root is the node that speaks; the
  `source` of its envelopes begins with that name, and what does not is refused.
- **Names** (levels in braces, and fields of type *name*) are 1 to 63 of `a-z`, `0-9`, `-` and `_`, first a letter
  or digit.
- **Payloads** are one msgpack map, the envelope below, whose `data` is the message. Topics of format JSON carry a bare
  JSON object instead, so that any tool can read who is there.
- Unknown fields are ignored, unknown types are counted. Missing or ill-typed fields are an error that names topic,
  type, field and reason. Fields carry their units in their names. From the first release on a message only grows.
- **Asks** go out in the asker's branch (`{{asker}}/ask/{{target}}/{{service}}/{{verb}}`) with `reply_to` (the asker's
  client name) and `ttl_ms`, always; the answer comes in the responder's branch
  (`{{responder}}/reply/{{asker}}/{{client}}`) with the ask's id as its `correlation`. Age is judged by monotonic clocks
  and the broker's own message expiry, never by wall clocks. An ask repeated with the same id is carried out once.
- **QoS 1 everywhere.** A PUBACK means that the broker has it, nothing more.
- No packet is above {max_packet:,} bytes; each topic and type has a limit of its own.

## Envelope
{envelope}

## Topics
{topics}

## Messages
Types in the order of the table. *Durable* asks are written to disk before they are acknowledged, and carried out after
a crash of the service.
"""

_SOURCES: tuple[ModuleType, ...] = (messages, entries, manifest, errors, codec)


class _Fields:
    """Fields of every struct of the protocol, with the text of their types and their docstrings."""

    def __init__(self) -> None:
        self._classes: dict[str, ast.ClassDef] = {}
        for module in _SOURCES:
            tree = ast.parse(inspect.getsource(module))
            self._classes.update({node.name: node for node in tree.body if isinstance(node, ast.ClassDef)})
        self.named: dict[str, str] = {}
        """Structs that a type names, in the order in which they were met."""

    def table(self, struct: type[msgspec.Struct]) -> str:
        body = self._classes[struct.__name__].body
        rows = []
        for position, node in enumerate(body):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            follows = body[position + 1] if position + 1 < len(body) else None
            text = (
                follows.value.value if isinstance(follows, ast.Expr) and isinstance(follows.value, ast.Constant) else ""
            )
            default = f"`{ast.unparse(node.value)}`" if node.value is not None else "required"
            rows.append((f"`{node.target.id}`", self._type(node.annotation), default, _plain(str(text))))
        return _table(("field", "type", "default", "meaning"), rows) if rows else "No fields."

    def _type(self, node: ast.expr) -> str:
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and isinstance(node.slice, ast.Tuple):
            if node.value.id == "Annotated":
                base, *rest = node.slice.elts
                return ", ".join([self._type(base), *filter(None, map(self._constraint, rest))])
            return f"map of {self._type(node.slice.elts[0])} to {self._type(node.slice.elts[1])}"
        if isinstance(node, ast.Subscript):
            return f"list of {self._type(node.slice)}"
        if isinstance(node, ast.BinOp):
            return f"{self._type(node.left)} or {self._type(node.right)}"
        name = ast.unparse(node)
        if name in self._classes:
            self.named.setdefault(name, name)
            return f"[{name}](#{name.lower()})"
        return _WIRE_TYPES.get(name, name)

    @staticmethod
    def _constraint(node: ast.expr) -> str:
        words = {"ge": "≥", "gt": ">", "le": "≤", "min_length": "length ≥", "max_length": "length ≤", "pattern": "like"}
        if not isinstance(node, ast.Call):
            return ""
        return ", ".join(
            f"{words[each.arg]} `{ast.unparse(each.value)}`" for each in node.keywords if each.arg in words
        )


_WIRE_TYPES = {
    "str": "text",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "bytes": "binary",
    "None": "nil",
    "Any": "any",
    "Name": "name",
    "Digest": "binary of 32 bytes",
    "Count": "integer ≥ 0",
    "msgspec.Raw": "any",
}


def protocol_page() -> str:
    """docs/protocol.md."""
    fields = _Fields()
    topics = _table(
        ("topic", "what", "limit in bytes", "format", "retained"),
        [
            (f"`{row.pattern}`", row.about, f"{row.max_bytes:,}", row.format, "yes" if row.retain else "")
            for row in TOPICS
        ],
    )
    parts = [
        _PROTOCOL.format(
            generated=GENERATED,
            root=ROOT,
            max_packet=MAX_PACKET_BYTES,
            envelope=fields.table(codec.Envelope),
            topics=topics,
        )
    ]
    structs_of_rows = {row.struct.__name__ for row in MESSAGES.values()}
    for row in MESSAGES.values():
        lines = [
            f"### `{row.type}`",
            f'<a id="{row.struct.__name__.lower()}"></a>{_plain(inspect.getdoc(row.struct) or "")}',
        ]
        if row.ask is not None:
            marks = "; durable" * row.ask.durable + "; of the node's own programs only" * row.ask.own_node_only
            lines.append(
                f"\nAsked of `{row.ask.service}` as `{row.ask.verb}`, answered with `{row.ask.reply}`; time to live at"
                f" most {row.ask.ttl_max_ms:,} ms{marks}."
            )
        lines.append(f"\nOn `{row.topic.pattern}`, at most {row.max_bytes:,} bytes.\n")
        lines.append(fields.table(row.struct))
        parts.append("\n".join(lines))
    # Structs inside messages name others in turn: the list grows while it is walked.
    parts.append("## Structures inside messages\n")
    done: set[str] = set()
    while todo := [name for name in fields.named if name not in done and name not in structs_of_rows]:
        for name in todo:
            done.add(name)
            struct = next(getattr(module, name) for module in _SOURCES if hasattr(module, name))
            parts.append(f"### {name}\n{_plain(inspect.getdoc(struct) or '')}\n\n{fields.table(struct)}")
    return "\n".join(parts)


# --- all pages --------------------------------------------------------------------------------------------

PAGES = {"configuration.md": configuration_page, "cli.md": cli_page, "protocol.md": protocol_page}


def _sentence(struct: type) -> str:
    return _plain(inspect.getdoc(struct) or "")


def _plain(text: str | None) -> str:
    """One line, with Markdown's code marks in place of reST's."""
    return " ".join((text or "").split()).replace("``", "`")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or compare them; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m edge.docs", description="Make the generated pages of docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is stale")
    options = parser.parse_args(arguments)
    stale = []
    for name, render in PAGES.items():
        path = DOCS / name
        there = path.read_text(encoding="utf-8") if path.exists() else ""
        made = re.sub(r"\n{3,}", "\n\n", render())
        if made == there:
            continue
        stale.append(name)
        if options.check:
            difference = difflib.unified_diff(there.splitlines(), made.splitlines(), f"docs/{name}", "the code", n=1)
            print("\n".join(difference))
        else:
            path.write_text(made, encoding="utf-8")
            print(f"docs/{name} written")
    if stale and options.check:
        print(f"stale: {', '.join(stale)}; `python -m edge.docs` writes them", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
