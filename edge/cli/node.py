"""Commands about a node as a whole: up, demo, doctor, version."""

from __future__ import annotations

from typing import Annotated

import typer

from edge.cli.context import (
    EXIT_FAILED,
    JsonOption,
    print_json,
    settings,
)


def up() -> None:
    """Run this node until Ctrl-C.

    It starts the node's services, and an embedded broker when broker.url is empty, and keeps them running.
    """
    from edge.config import find_config, load_config
    from edge.logs import set_up_logging
    from edge.supervisor import supervise

    path = settings.config_path or find_config()
    config = load_config(path)
    set_up_logging(config, "supervisor", prefix=True)
    supervise(config, path)


def demo(
    once: Annotated[bool, typer.Option("--once", help="End after the tour instead of staying up.")] = False,
) -> None:
    """Tour the main job on two nodes of this machine.

    Then both stay up, with a live view, until Ctrl-C.
    """
    from edge.demo import main

    raise typer.Exit(main(once=once))


def doctor(json: JsonOption = False) -> None:
    """Check this node, and say what to type next.

    Looks at packages, configuration, data folder, broker, keys, model and clock.
    """
    from edge.doctor import examine

    checks = examine(settings.config_path)
    if json:
        print_json(checks)
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{check.verdict:8} {check.name:{width}} {check.found}")
            if check.next_step:
                print(f"{'':{width + 9}} next: {check.next_step}")
    if any(check.verdict == "failed" for check in checks):
        raise typer.Exit(EXIT_FAILED)


def version(json: JsonOption = False) -> None:
    """Print versions."""
    import platform

    from edge.text import mindstream_version
    from protocol.codec import VERSION
    from protocol.topics import ROOT

    found = {
        "mindstream": mindstream_version(),
        "envelope": VERSION,
        "topics": ROOT,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    if json:
        print_json(found)
    else:
        for name, value in found.items():
            print(f"{name} {value}")
