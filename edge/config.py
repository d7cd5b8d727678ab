"""mindstream.toml: every key declared once, with its meaning, unit and default.

``docs/configuration.md`` is generated from these structs. Unknown keys, wrong types and values out of range are
refused with file, key and the nearest valid key. ``MINDSTREAM_SECTION__KEY`` in the environment overrides a key.
Secrets are never values: a key names the file that holds one.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from edge.service_table import BY_NAME, SERVICES, missing_packages
from protocol.errors import ConfigError
from protocol.ids import NAME_PATTERN

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENV_PREFIX = "MINDSTREAM_"
ENV_OTHER = frozenset({"MINDSTREAM_CONFIG", "MINDSTREAM_MODELS"})
"""Variables with the prefix that are no overrides."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

Seconds = Annotated[float, Meta(gt=0, le=86_400)]


def default_data_home() -> Path:
    """Where nodes keep their data: systemd's state directory, or the user's data home."""
    state = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if state:
        return Path(state)
    home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(home).expanduser() / "mindstream"


def default_node_name() -> str:
    """This machine's name, made fit for a topic."""
    name = re.sub(r"[^a-z0-9_-]+", "-", socket.gethostname().split(".")[0].lower()).strip("-_")[:63]
    return name or "node"


class NodeConfig(msgspec.Struct, forbid_unknown_fields=True):
    """Who this node is and where it keeps what it knows."""

    name: Annotated[
        str, Meta(pattern=f"^(?:{NAME_PATTERN.pattern})?$", description="Name of this node. Empty: the machine's name.")
    ] = ""
    data_dir: Annotated[
        str,
        Meta(description="Folder for keys, memories and snapshots. Empty: `~/.local/share/mindstream/NAME`."),
    ] = ""

    def folder(self) -> Path:
        """The data folder."""
        return Path(self.data_dir).expanduser() if self.data_dir else default_data_home() / self.name


class BrokerConfig(msgspec.Struct, forbid_unknown_fields=True):
    """The MQTT broker."""

    url: Annotated[
        str,
        Meta(
            description="`mqtt://host:port`, or `mqtts://host:port` for TLS, which every host but this one needs. "
            "Empty: an embedded broker on loopback, started by `mindstream up`."
        ),
    ] = ""
    port: Annotated[int, Meta(ge=0, le=65_535, description="Port of the embedded broker; 0 takes a free one.")] = 1883
    username: Annotated[str, Meta(description="Name at the broker. Empty: none.")] = ""
    password_file: Annotated[
        str,
        Meta(description="File with the password. Empty: systemd's credential `broker-password` if there is one."),
    ] = ""
    ca_file: Annotated[str, Meta(description="CA certificates for `mqtts://`. Empty: the system's.")] = ""

    def password(self) -> str:
        """The password, read from its file. Raises ConfigError."""
        path = Path(self.password_file).expanduser() if self.password_file else _credential("broker-password")
        if path is None:
            return ""
        try:
            return path.read_text().strip()
        except OSError as error:
            raise ConfigError(
                f"reading the broker's password from {path}: {error.strerror}",
                hint="broker.password_file names it",
                field="broker.password_file",
            ) from None


class ServicesConfig(msgspec.Struct, forbid_unknown_fields=True):
    """Which services run here."""

    enabled: Annotated[
        list[str] | None,
        Meta(description="Services to run. Left out: all whose packages are installed."),
    ] = None

    def names(self) -> list[str]:
        """The services to run, in the table's order."""
        if self.enabled is None:
            return [row.name for row in SERVICES if not missing_packages(row)]
        return [row.name for row in SERVICES if row.name in self.enabled]


class SupervisorConfig(msgspec.Struct, forbid_unknown_fields=True):
    """How `mindstream up` keeps services alive."""

    restart_limit: Annotated[
        int,
        Meta(ge=0, le=1000, description="Restarts of one service within the window; one more stops it, loudly."),
    ] = 5
    restart_window_s: Annotated[Seconds, Meta(description="The window, in seconds.")] = 60.0
    backoff_first_s: Annotated[
        Seconds, Meta(description="Wait before the first restart, in seconds; then doubled.")
    ] = 0.2
    backoff_max_s: Annotated[Seconds, Meta(description="Longest wait before a restart, in seconds.")] = 10.0
    stop_timeout_s: Annotated[
        Seconds, Meta(description="How long a service may take to stop before it is killed, in seconds.")
    ] = 10.0


class BusConfig(msgspec.Struct, forbid_unknown_fields=True):
    """Connections to the broker."""

    queue_messages: Annotated[
        int,
        Meta(
            ge=100,
            le=65_535,
            description="Messages that may wait in a service; QoS 1 messages beyond it wait at the broker.",
        ),
    ] = 1000
    ask_ttl_ms: Annotated[
        int, Meta(ge=1, le=600_000, description="Time to live of the CLI's questions and commands, in ms.")
    ] = 10_000


class ModelConfig(msgspec.Struct, forbid_unknown_fields=True):
    """The local model."""

    name: Annotated[str, Meta(min_length=1, description="A known model (`mindstream models`), or a folder.")] = (
        "smollm2-135m-instruct"
    )
    folders: Annotated[list[str], Meta(description="Folders to look for models in, before the usual places.")] = []
    device: Annotated[str, Meta(description="`auto`, `cpu`, `cuda` or `cuda:N`.")] = "auto"
    dtype: Annotated[str, Meta(description="`auto`, `bfloat16`, `float16` or `float32`.")] = "auto"
    threads: Annotated[int, Meta(ge=0, le=1024, description="Threads of the engine; 0 lets it choose.")] = 0
    max_context_tokens: Annotated[
        int, Meta(ge=0, description="Longest conversation, in tokens; 0 is the model's own limit.")
    ] = 0
    conversations_in_memory: Annotated[
        int,
        Meta(ge=1, le=10_000, description="Conversations with a KV cache in memory; the one unused for longest goes."),
    ] = 8


class LogConfig(msgspec.Struct, forbid_unknown_fields=True):
    """What is written to the log."""

    level: Annotated[
        str, Meta(pattern="^(debug|info|warning|error)$", description="`debug`, `info`, `warning` or `error`.")
    ] = "info"
    file_bytes: Annotated[
        int,
        Meta(
            ge=10_000,
            le=1_000_000_000,
            description="Size at which a log file in `logs/` of the data folder is put aside, in bytes.",
        ),
    ] = 5_000_000
    files: Annotated[
        int, Meta(ge=1, le=100, description="Log files kept for each service, the current one included.")
    ] = 3


class Config(msgspec.Struct, forbid_unknown_fields=True):
    """All of mindstream.toml."""

    node: NodeConfig = msgspec.field(default_factory=NodeConfig)
    broker: BrokerConfig = msgspec.field(default_factory=BrokerConfig)
    services: ServicesConfig = msgspec.field(default_factory=ServicesConfig)
    supervisor: SupervisorConfig = msgspec.field(default_factory=SupervisorConfig)
    bus: BusConfig = msgspec.field(default_factory=BusConfig)
    model: ModelConfig = msgspec.field(default_factory=ModelConfig)
    log: LogConfig = msgspec.field(default_factory=LogConfig)


SECTIONS: dict[str, type[msgspec.Struct]] = {
    name: hint for name, hint in get_type_hints(Config).items() if name in Config.__struct_fields__
}


def find_config() -> Path | None:
    """The first mindstream.toml of the search path, or None."""
    named = os.environ.get("MINDSTREAM_CONFIG")
    if named:
        return Path(named)
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    places = (Path("mindstream.toml"), home / "mindstream" / "mindstream.toml", Path("/etc/mindstream/mindstream.toml"))
    return next((path for path in places if path.is_file()), None)


def load_config(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """The configuration of ``path``, or of the first file found, or the defaults; with overrides applied.

    Raises ConfigError, naming file, key and what would be right.
    """
    path = path or find_config()
    where = str(path) if path else "the defaults"
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"reading {path}: {error.strerror}", hint="give an existing file with --config") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"reading {path}: {error}", hint="mend the TOML there", reason="not TOML") from None
    _check_keys(tree, where)
    _override(tree, os.environ if environ is None else environ)
    try:
        config = msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        text, _, key = str(error).partition(" - at `$.")
        key = key.rstrip("`") or "?"
        raise ConfigError(
            f"reading {where}: {key}: {_plain(text)}",
            hint="docs/configuration.md lists every key",
            field=key,
            reason=text,
        ) from None
    config.node.name = config.node.name or default_node_name()
    _check_values(config, where)
    return config


def _check_keys(tree: dict[str, Any], where: str) -> None:
    for section, keys in tree.items():
        if section not in SECTIONS:
            raise _unknown(where, section, SECTIONS, "section")
        if not isinstance(keys, dict):
            raise ConfigError(f"reading {where}: {section} is a section: write [{section}]", field=section)
        fields = SECTIONS[section].__struct_fields__
        for key in keys:
            if key not in fields:
                raise _unknown(where, f"{section}.{key}", [f"{section}.{field}" for field in fields], "key")


def _unknown(where: str, key: str, valid: Any, what: str) -> ConfigError:
    everything = [f"{section}.{field}" for section, struct in SECTIONS.items() for field in struct.__struct_fields__]
    near = difflib.get_close_matches(key, list(valid), 1, 0.4) or difflib.get_close_matches(key, everything, 1, 0.4)
    return ConfigError(
        f"reading {where}: unknown {what} {key}",
        hint=f"the nearest is {near[0]}" if near else f"the {what}s are {', '.join(valid)}",
        field=key,
        reason="unknown",
    )


def _override(tree: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Put MINDSTREAM_SECTION__KEY variables into ``tree``; their values are TOML, or plain text."""
    for name, text in environ.items():
        if not name.startswith(ENV_PREFIX) or name in ENV_OTHER:
            continue
        section, _, key = name.removeprefix(ENV_PREFIX).lower().partition("__")
        _check_keys({section: {key: None}} if key else {section: {}}, f"the environment variable {name}")
        if not key:
            raise ConfigError(f"reading {name}: an override is MINDSTREAM_SECTION__KEY", field=name)
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        tree.setdefault(section, {})[key] = value


def _plain(text: str) -> str:
    """msgspec's message, in the words of a person who wrote a file."""
    return text.replace("Expected `", "it must be `").replace("got `", "it is `")


def _check_values(config: Config, where: str) -> None:
    for name in config.services.enabled or []:
        if name not in BY_NAME:
            raise _unknown(where, name, list(BY_NAME), "service")
    url = config.broker.url
    if url:
        parts = urlsplit(url)
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
            raise ConfigError(
                f"reading {where}: broker.url {url!r} is not mqtt://host:port or mqtts://host:port", field="broker.url"
            )
        if parts.password:
            raise ConfigError(
                f"reading {where}: broker.url holds a password",
                hint="put it into a file and name that in broker.password_file",
                field="broker.url",
            )
        if parts.scheme == "mqtt" and parts.hostname not in LOOPBACK:
            raise ConfigError(
                f"reading {where}: broker.url {url!r} leaves this machine without TLS",
                hint=f"use mqtts://{parts.hostname}:{parts.port or 8883}",
                field="broker.url",
                reason="no TLS",
            )


def _credential(name: str) -> Path | None:
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    path = Path(folder) / name if folder else None
    return path if path is not None and path.is_file() else None
