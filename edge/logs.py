"""Logs: one line an entry, to stderr.

Whoever starts a process keeps what it prints: the supervisor passes it on with the service's name before it and
writes it to ``DATA_DIR/logs/NAME.log`` (bounded), tracebacks and the words of native libraries included; systemd
keeps a journal. So a log file has one writer.
"""

from __future__ import annotations

import logging
import sys

from edge.config import Config


def set_up_logging(config: Config, name: str = "") -> None:
    """Log to stderr at ``log.level``; ``name`` stands before each line where no supervisor puts it there."""
    prefix = f"{name:>12} | " if name else ""
    logging.basicConfig(
        level=config.log.level.upper(),
        format=f"{prefix}%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
        force=True,
    )
