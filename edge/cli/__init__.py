"""The command ``mindstream``.

Its modules import nothing heavy at their top: no torch, no rich tables, no bus. A command imports what it needs when it
runs, the program imports a command when it is called for (edge/cli/table.py), and ``--help`` imports none.
"""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """The entry point: run the command and exit with its code (docs/cli.md lists them)."""
    words = sys.argv[1:] if arguments is None else arguments
    if words in (["--help"], ["-h"]):
        from edge.cli.table import print_top_help

        print_top_help()
        sys.exit(0)
    from edge.cli.app import app
    from edge.cli.context import exit_code, print_error, settings

    try:
        app(args=words, prog_name="mindstream")
    except Exception as error:
        from protocol.errors import MindstreamError  # with what it brings, which most commands need and help does not

        if settings.debug or not isinstance(error, MindstreamError):
            raise
        print_error(error)
        sys.exit(exit_code(error))


__all__ = ["main"]
