"""The command table: every command of ``mindstream``, where it is, and its one line in the help.

The help of the top level is made from this table alone: it imports no command, nor typer, which takes three times as
long as all of Python before it. tests/edge/test_cli_table.py holds that the table is true.
"""

from __future__ import annotations

import os
import sys

ABOUT = "Small machines think together: shared memories, conversations that move between nodes, over MQTT."

OPTIONS = {
    "--config FILE": "mindstream.toml. Default: the first of the search path.",
    "--debug": "Log everything, and show where errors come from.",
    "--version": "Print the version and exit.",
    "-h, --help": "Show this message and exit.",
}
"""The global options, as they are shown, to what they mean."""

COMMANDS: dict[str, tuple[str, str, str]] = {
    "up": ("node", "up", "Run this node until Ctrl-C."),
    "status": ("status", "status", "Show every node and service on the bus."),
    "demo": ("node", "demo", "Tour the main job on two nodes of this machine."),
    "chat": ("model", "chat", "Talk with the model of a node."),
    "remember": ("memory", "remember", "Remember a text."),
    "recall": ("memory", "recall", "Find memories, best first."),
    "handoff": ("handoff", "handoff", "Move a conversation to another node."),
    "watch": ("watch", "watch", "Show live what is said on the bus."),
    "decode": ("decode", "decode", "Print payloads as JSON lines: topic (where it is known), bytes, message."),
    "record": ("record", "record", "Record what passes over the bus."),
    "recordings": (
        "record",
        "recordings",
        "Show what a recording holds: time, messages by topic and type, gaps, damage.",
    ),
    "replay": (
        "record",
        "replay",
        "Publish a recording again, in its order and its time, onto a live broker or a private one.",
    ),
    "snapshot": ("snapshot", "app", "Save conversations, go on from them, make them smaller, compare them."),
    "pool": ("pool", "app", "Beginnings of prompts that the site has read, and this node holds."),
    "models": ("models", "app", "List models, get them, check them, remove them."),
    "keys": ("keys", "app", "This node's key, and the keys of the nodes it trusts."),
    "broker": ("broker", "app", "Mosquitto for a device or a hub: its configuration, users and certificates."),
    "gateway": ("gateway", "app", "The OpenAI-compatible endpoint: its address and its token."),
    "doctor": ("node", "doctor", "Check this node, and say what to type next."),
    "bench": ("bench", "bench", "Measure this machine."),
    "config": ("config", "app", "The configuration in force."),
    "units": ("units", "app", "Mindstream's systemd units: what `systemd/install.sh` puts on a device."),
    "sleep": ("status", "sleep", "Say that this machine is about to be suspended."),
    "wake": ("status", "wake", "Say that this machine is awake again."),
    "version": ("node", "version", "Print versions."),
}
"""Command to module of edge/cli, its function or group (``typer.Typer``) there, and the first sentence of its help."""

MOST_COLUMNS = 80


def top_help(columns: int) -> str:
    """What ``mindstream --help`` prints on a terminal so many columns wide; it ends without a newline."""
    width = max(min(columns, MOST_COLUMNS), 50) - 2
    commands = {name: text for name, (_, _, text) in COMMANDS.items()}
    parts = ["Usage: mindstream [OPTIONS] COMMAND [ARGS]...", ""]
    parts += [f"  {line}" for line in _wrapped(ABOUT, width - 2)]
    for title, rows in (("Options:", OPTIONS), ("Commands:", commands)):
        parts += ["", title]
        left = max(map(len, rows)) + 4
        for name, text in rows.items():
            first, *more = _wrapped(text, width - left)
            parts += [f"  {name}".ljust(left) + first, *(" " * left + line for line in more)]
    return "\n".join(parts)


def print_top_help() -> None:
    """Print it as wide as the terminal is."""
    try:
        print(top_help(terminal_columns()), flush=True)
    except BrokenPipeError:
        # Whoever reads has seen enough. Python would complain once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def terminal_columns() -> int:
    """By ``COLUMNS`` or the terminal, as ``shutil.get_terminal_size`` says, whose import takes longer than all this."""
    try:
        return int(os.environ["COLUMNS"]) or MOST_COLUMNS
    except (KeyError, ValueError):
        pass
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or MOST_COLUMNS  # type: ignore[union-attr]
    except (AttributeError, ValueError, OSError):
        return MOST_COLUMNS


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines
