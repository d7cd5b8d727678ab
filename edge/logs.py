"""Logs: one line an entry, to stderr and to a bounded file in the data folder; and the version in them."""

from __future__ import annotations

import importlib.metadata
import logging
import logging.handlers
import sys

from edge.config import Config
from edge.files import storage_errors

MAX_LOG_BYTES = 4 * 1024 * 1024
KEPT_LOGS = 2


def version() -> str:
    """Mindstream's version; ``unknown`` when it runs from a checkout that is not installed."""
    try:
        return importlib.metadata.version("mindstream")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def set_up_logging(config: Config, name: str) -> None:
    """Log to stderr and to ``DATA_DIR/logs/NAME.log``, at most 12 MB of it. Raises StorageError."""
    folder = config.node.folder() / "logs"
    with storage_errors(f"making the log folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.handlers.RotatingFileHandler(
            folder / f"{name}.log", maxBytes=MAX_LOG_BYTES, backupCount=KEPT_LOGS, encoding="utf-8"
        )
    logging.basicConfig(
        level=config.log.level.upper(),
        format=f"%(asctime)s {config.node.name}/{name} %(levelname)s %(message)s",
        handlers=[logging.StreamHandler(sys.stderr), file],
        force=True,
    )
