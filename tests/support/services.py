"""Services in threads of the test's own process."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edge.config import load_config
from edge.keys import Peers, load_or_create_identity
from edge.service import Context, Service


def run_service(cleanup: ExitStack, kind: type[Service], folder: Path, node: str, url: str, toml: str = "") -> Any:
    """A service of ``node`` in a thread, stopped at the end; its configuration stands in ``folder``."""
    data_dir = folder / node
    path = folder / f"{node}-{kind.name}.toml"
    path.write_text(
        f'[node]\nname = "{node}"\ndata_dir = "{data_dir}"\n[broker]\nurl = "{url}"\n'
        f'[services]\nenabled = ["model_runner", "gateway"]\n{toml}'
    )
    config = load_config(path, {})
    identity = load_or_create_identity(data_dir, node)
    service = kind(Context(config, identity, Peers(data_dir, identity), data_dir / kind.name, url))
    thread = threading.Thread(target=service.run, name=f"{node}/{kind.name}")
    thread.start()

    def end() -> None:
        service.stop()
        thread.join(30)
        assert not thread.is_alive()

    cleanup.callback(end)
    return service
