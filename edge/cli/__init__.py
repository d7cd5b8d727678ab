"""The command ``mindstream``.

Its modules import nothing heavy at their top: no torch, no rich tables, no bus, so that ``--help`` answers at once.
A command imports what it needs when it runs.
"""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """The entry point: run the command and exit with its code (docs/cli.md lists them)."""
    from edge.cli.app import app
    from edge.cli.context import exit_code, print_error, settings
    from protocol.errors import MindstreamError

    try:
        app(args=arguments, prog_name="mindstream")
    except MindstreamError as error:
        if settings.debug:
            raise
        print_error(error)
        sys.exit(exit_code(error))


__all__ = ["main"]
