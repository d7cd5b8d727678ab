"""The pages of docs/ that are made from the code: ``python -m edge.docs`` writes them, ``--check`` compares.

``configuration.md`` from the structs of edge/config.py, ``cli.md`` from the commands, ``protocol.md``
(edge/docs_protocol.py) and ``asyncapi.yaml`` (edge/docs_wire.py) from the topic and message tables and the docstrings
of their fields; into ``clients.md``, which people write, go the example clients. Nothing else is touched. With
``--check`` it exits 1 and shows what differs when a page is not what the code says.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
import typer.main
from msgspec import Meta

from edge.cli.app import app
from edge.cli.context import EXIT_CODES
from edge.config import ENV_OTHER, PATH_KEYS, SECTIONS
from edge.docs_fields import Fields
from edge.docs_protocol import protocol_page
from edge.docs_text import GENERATED, plain, sentence, table
from edge.docs_wire import asyncapi_file, clients_page
from edge.status import BrokerStatus, NodeStatus, ServiceStatus, Status

DOCS = Path(__file__).resolve().parent.parent / "docs"

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
        keys = table(("key", "type", "default", "allowed", "meaning"), rows)
        parts.append(f"## [{section}]\n{sentence(struct)}\n\n{keys}")
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


JSON_SHAPES: dict[tuple[str, ...], tuple[type[msgspec.Struct], ...]] = {
    ("mindstream", "status"): (Status, BrokerStatus, NodeStatus, ServiceStatus),
}
"""What commands print with ``--json``, where that is more than a message or a table."""

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
    codes = table(("code", "meaning"), [(str(code), meaning) for code, meaning in EXIT_CODES.items()])
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
    described = [(f"`{_argument(each)}`", plain(each.help)) for each in arguments if each.help]
    if described:
        parts.append(table(("argument", "meaning"), described))
    if options := _options(command):
        parts.append(options)
    if path in JSON_SHAPES:
        parts.append(_json_shape(JSON_SHAPES[path]))
    return "\n".join(parts)


def _json_shape(structs: Sequence[type[msgspec.Struct]]) -> str:
    """What ``--json`` prints: a table for the outermost struct, and one for each inside."""
    fields = Fields([sys.modules[structs[0].__module__]])
    head = "`--json` prints"
    parts = []
    for struct in structs:
        parts.append(f'<a id="{struct.__name__.lower()}"></a>{head} {struct.__name__}: {sentence(struct)}\n')
        parts.append(fields.table(struct))
        head = "In it,"
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
        rows.append((names, default, plain(option.help)))
    return table(("option", "default", "meaning"), rows) if rows else ""


# --- all pages --------------------------------------------------------------------------------------------

PAGES = {
    "configuration.md": configuration_page,
    "cli.md": cli_page,
    "protocol.md": protocol_page,
    "asyncapi.yaml": asyncapi_file,
    "clients.md": clients_page,
}
AS_THEY_ARE = {"clients.md"}
"""Pages in which an empty line may be part of a program."""


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or compare them; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m edge.docs", description="Make the generated pages of docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is stale")
    options = parser.parse_args(arguments)
    stale = []
    for name, render in PAGES.items():
        path = DOCS / name
        there = path.read_text(encoding="utf-8") if path.exists() else ""
        made = render() if name in AS_THEY_ARE else re.sub(r"\n{3,}", "\n\n", render())
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
