"""The command group units: Mindstream's systemd units, on devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge.cli.context import EXIT_FAILED, JsonOption, load, print_json, print_table

app = typer.Typer(
    help="Mindstream's systemd units: what `systemd/install.sh` puts on a device.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_UNIT_DIR = Path("/etc/systemd/system")


@app.command()
def render(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write into.")] = _UNIT_DIR,
) -> None:
    """Write the units, made from the service table.

    A file that was edited by hand is kept beside as .orig: changes belong into a drop-in (`systemctl edit`).
    """
    from edge import units

    lines = units.write(out)
    print("\n".join(lines) if lines else f"the units in {out} are as they should be")


@app.command()
def check(
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where the units are.")] = _UNIT_DIR,
    json: JsonOption = False,
) -> None:
    """Say which unit files differ from what this version renders, and what to type."""
    from edge import units

    findings = units.check(folder, wanted=load().service_names())
    if json:
        print_json(findings)
    else:
        print_table(("file", "verdict", "next"), [[each.file, each.verdict, each.next_step] for each in findings])
    if any(each.verdict != "ok" for each in findings):
        raise typer.Exit(EXIT_FAILED)


@app.command("list")
def list_units(json: JsonOption = False) -> None:
    """List the units that this node's configuration wants, in the order in which they are started."""
    from edge import units

    names = [units.instance(name) for name in load().service_names()]
    if json:
        print_json(names)
    else:
        print("\n".join(names))
