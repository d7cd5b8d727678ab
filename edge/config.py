"""mindstream.toml: every key declared once, with its meaning, unit and default.

``docs/configuration.md`` is generated from these structs. Unknown keys, wrong types and values out of range are
refused with file, key and the nearest valid key. ``MINDSTREAM_SECTION__KEY`` in the environment overrides a key.
Secrets are never values: a key names the file that holds one.
"""

from __future__ import annotations

import difflib
import ipaddress
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

from edge.service_table import BY_NAME, SERVICES, ServiceRow, missing_packages
from protocol.errors import ConfigError
from protocol.ids import NAME_PATTERN

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENV_PREFIX = "MINDSTREAM_"
ENV_OTHER = frozenset({"MINDSTREAM_CONFIG", "MINDSTREAM_MODELS"})
"""Variables with the prefix that are no overrides."""

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
    protocol: Annotated[
        str,
        Meta(
            pattern=r"^(auto|5|3\.1\.1)$",
            description="MQTT version: `5`, `3.1.1`, or `auto`: 5, and 3.1.1 where the broker has no 5.",
        ),
    ] = "auto"
    username: Annotated[str, Meta(description="Name at the broker. Empty: none.")] = ""
    password_file: Annotated[
        str,
        Meta(description="File with the password. Empty: systemd's credential `broker-password` if there is one."),
    ] = ""
    ca_file: Annotated[str, Meta(description="CA certificates for `mqtts://`. Empty: the system's.")] = ""
    config_file: Annotated[
        str,
        Meta(
            description="The mosquitto.conf of a broker on this machine, for `mindstream doctor` to check. Empty: "
            "`/etc/mosquitto/mindstream/mosquitto.conf` if there is one."
        ),
    ] = ""

    def password(self) -> str:
        """The password, read from its file. Raises ConfigError."""
        path = Path(self.password_file).expanduser() if self.password_file else credential("broker-password")
        if path is None:
            return ""
        try:
            mode = path.stat().st_mode
            if self.password_file and mode & 0o007:
                raise ConfigError(
                    f"reading the broker's password from {path}: every user of this machine may read it",
                    hint=f"chmod o-rwx {path}",
                    field="broker.password_file",
                    reason="unsafe mode",
                )
            return path.read_text().rstrip("\r\n")
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
        Meta(
            description="Services to run, besides `presence`. Left out: all whose packages are installed, and of those "
            "that are off by default (`gateway`) the ones that are switched on."
        ),
    ] = None


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
    mailbox_mib: Annotated[
        int,
        Meta(
            ge=0,
            le=1_048_576,
            description="Memory for chunks on their way to other processes of this user on this host, in MiB; what"
            " goes beyond it goes over the broker. 0: all does.",
        ),
    ] = 256


class ModelConfig(msgspec.Struct, forbid_unknown_fields=True):
    """The local model."""

    name: Annotated[str, Meta(min_length=1, description="A known model (`mindstream models`), or a folder.")] = (
        "smollm2-135m-instruct"
    )
    folders: Annotated[list[str], Meta(description="Folders to look for models in, before the usual places.")] = []
    embedding: Annotated[
        str, Meta(description="Embedding model for `/v1/embeddings` (`mindstream models`). Empty: none.")
    ] = "all-minilm-l6-v2"
    engine: Annotated[
        str,
        Meta(
            pattern="^(auto|transformers|onnx)$",
            description="`auto`, `transformers`, or `onnx` (built models; `mindstream models build`).",
        ),
    ] = "auto"
    precision: Annotated[
        str,
        Meta(
            pattern="^(auto|int8|int4|fp16|fp32)$",
            description="Of a built model's weights: `auto`, `int8`, `int4`, `fp16` or `fp32`.",
        ),
    ] = "auto"
    adapter: Annotated[
        str,
        Meta(
            description="Folder of a LoRA adapter for the model, in PEFT's format (safetensors). The engine is then "
            "transformers. Empty: none."
        ),
    ] = ""
    device: Annotated[str, Meta(description="`auto`, `cpu`, `cuda` or `cuda:N`.")] = "auto"
    dtype: Annotated[str, Meta(description="`auto`, `bfloat16`, `float16` or `float32`.")] = "auto"
    threads: Annotated[int, Meta(ge=0, le=1024, description="Threads of the engine; 0 lets it choose.")] = 0
    max_context_tokens: Annotated[
        int, Meta(ge=0, description="Longest conversation, in tokens; 0 is the model's own limit.")
    ] = 0
    conversations_in_memory: Annotated[
        int,
        Meta(ge=1, le=10_000, description="Conversations with a KV cache in memory; the one unused for longest goes."),
    ] = 64
    kv_memory_mib: Annotated[
        int,
        Meta(
            ge=0,
            description="Memory that all KV caches may take together, in MiB; who does not fit waits. 0: half of what "
            "is free once the model is loaded.",
        ),
    ] = 0
    parked_mib: Annotated[
        int,
        Meta(
            ge=0,
            description="Room on the disk for KV caches of conversations that had to leave the memory, in MiB; the "
            "oldest go. 0: none, their tokens are read again.",
        ),
    ] = 2048
    max_batch: Annotated[
        int,
        Meta(
            ge=0,
            le=1024,
            description="Answers that are decoded together. 0: as many as the engine takes. 1: each alone, in turns: "
            "company then changes no bit of any answer.",
        ),
    ] = 0
    back_off_when_throttled: Annotated[
        bool,
        Meta(
            description="Give background work a tenth of the time while the device is slowed down for heat or want of "
            "power; persons' runs go on as ever."
        ),
    ] = True


class SnapshotConfig(msgspec.Struct, forbid_unknown_fields=True):
    """Snapshots: how they are encoded where an ask does not say, and checkpoints of key moments."""

    codec: Annotated[
        str,
        Meta(
            pattern="^(auto|raw|lossless|int8|rotated4|transform|tokens)$",
            description="`raw`, `lossless`, `int8`, `rotated4`, `transform` (needs a basis), `tokens` (no KV), or "
            "`auto`: the smallest whose self-test meets `most_kl` and `least_top1`.",
        ),
    ] = "raw"
    most_kl: Annotated[
        float, Meta(ge=0, description="Mean divergence that an inexact snapshot may have, nats a token.")
    ] = 0.02
    least_top1: Annotated[
        float,
        Meta(ge=0, le=1, description="Share of tested positions whose likeliest token must be the same after it."),
    ] = 0.94
    resume_lossy: Annotated[
        bool,
        Meta(
            description="Resume KV that is not exact even where the ask does not allow it, if its certificate meets "
            "`most_kl` and `least_top1`; else its tokens are read again."
        ),
    ] = False
    moments: Annotated[
        bool,
        Meta(description="Take a checkpoint by itself where the model was surprised, or a run is said to be salient."),
    ] = False
    moments_distance_tokens: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Tokens between two such checkpoints of a conversation, at least.")
    ] = 64
    moments_count: Annotated[
        int, Meta(ge=1, le=1000, description="Such checkpoints of one conversation; those worth least go first.")
    ] = 32
    moments_mib: Annotated[
        int, Meta(ge=1, description="Room on the disk for all such checkpoints, in MiB; those worth least go first.")
    ] = 512


class HomeAssistantConfig(msgspec.Struct, forbid_unknown_fields=True):
    """Home Assistant, where it listens on this node's broker."""

    discovery: Annotated[
        bool,
        Meta(description="Declare this node as a device of Home Assistant: one retained message on the node's broker."),
    ] = True
    prefix: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$",
            description="Its discovery prefix. Another one than the default needs an ACL of one's own.",
        ),
    ] = "homeassistant"


class MetricsConfig(msgspec.Struct, forbid_unknown_fields=True):
    """Prometheus metrics of this node."""

    port: Annotated[
        int, Meta(ge=0, le=65_535, description="Local port they are served on; 0: none. 9464 is the usual one.")
    ] = 0
    host: Annotated[
        str, Meta(description="Address they are served on. Of this machine only: what leaves it needs TLS.")
    ] = "127.0.0.1"


class GatewayConfig(msgspec.Struct, forbid_unknown_fields=True):
    """The OpenAI-compatible endpoint of this node."""

    port: Annotated[
        int, Meta(ge=0, le=65_535, description="Port of the endpoint; 0: there is none. 8650 is the usual one.")
    ] = 0
    host: Annotated[
        str, Meta(min_length=1, description="Address it listens on. Another than this machine's own needs `cert_file`.")
    ] = "127.0.0.1"
    cert_file: Annotated[
        str, Meta(description="Certificate chain (PEM), for TLS. Empty: plain HTTP, loopback only.")
    ] = ""
    key_file: Annotated[str, Meta(description="Private key of the certificate (PEM).")] = ""
    token_file: Annotated[
        str,
        Meta(
            description="File with the token that programs must show. Empty: systemd's credential `gateway-token` if "
            "there is one, else `gateway/token` in the data folder, made at the first start."
        ),
    ] = ""
    hosts: Annotated[
        list[str],
        Meta(
            description="Names that programs call it by, besides localhost and `host`; other Host headers are refused."
        ),
    ] = []
    origins: Annotated[
        list[str], Meta(description="Web pages that may use it from a browser (CORS), such as `https://chat.home`.")
    ] = []
    timeout_s: Annotated[
        float,
        Meta(gt=0, le=3_600, description="How long one answer may take, the wait for the model included, in seconds."),
    ] = 600.0
    max_requests: Annotated[
        int, Meta(ge=1, le=10_000, description="Requests under way at one time; more are told to come again.")
    ] = 256
    max_answer_tokens: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Longest answer in tokens where a chat request names no limit.")
    ] = 2048


class PoolConfig(msgspec.Struct, forbid_unknown_fields=True):
    """Beginnings of prompts that a node of the site has read, for the others to fetch; see snapshots."""

    enabled: Annotated[
        bool, Meta(description="Whether this node takes from the pool, and puts into it what it reads.")
    ] = True
    url: Annotated[
        str,
        Meta(
            description="Where it is: any URL that fsspec knows, such as `s3://bucket/pool`, the same on several "
            "nodes. Empty: a folder of this node, from which the others fetch over the bus. Wants the extra `pool`."
        ),
    ] = ""
    most_mib: Annotated[
        int,
        Meta(ge=1, description="Room for its entries, in MiB; what saves the least reading for its bytes goes first."),
    ] = 2048
    trust: Annotated[
        str,
        Meta(
            pattern="^(creator|quorum)$",
            description="Whose entries are used: `creator`, those of every trusted node; `quorum`, those with which so "
            "many other trusted nodes agree that have read the same themselves.",
        ),
    ] = "creator"
    quorum: Annotated[int, Meta(ge=1, le=32, description="How many must agree, its creator not counted.")] = 2
    accept: Annotated[
        str,
        Meta(
            pattern="^(exact|close)$",
            description="`exact`: entries of the same numerics alone, bit for bit what this node would compute; "
            "`close`: those of another engine version, device or number of threads too, and the run's end says so.",
        ),
    ] = "close"
    codec: Annotated[
        str,
        Meta(
            pattern="^(raw|lossless)$",
            description="How entries are encoded: `lossless` takes a third less room, and more time.",
        ),
    ] = "raw"


class LogConfig(msgspec.Struct, forbid_unknown_fields=True):
    """What is written to the log."""

    level: Annotated[
        str, Meta(pattern="^(debug|info|warning|error)$", description="`debug`, `info`, `warning` or `error`.")
    ] = "info"
    format: Annotated[
        str,
        Meta(
            pattern="^(auto|text|json|journal)$",
            description="`text`, `json` (an object a line, as of `journalctl -o json`), `journal` (systemd's, with "
            "fields), or `auto`: `journal` where stderr is the journal, else `text`.",
        ),
    ] = "auto"
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
    snapshot: SnapshotConfig = msgspec.field(default_factory=SnapshotConfig)
    home_assistant: HomeAssistantConfig = msgspec.field(default_factory=HomeAssistantConfig)
    metrics: MetricsConfig = msgspec.field(default_factory=MetricsConfig)
    gateway: GatewayConfig = msgspec.field(default_factory=GatewayConfig)
    pool: PoolConfig = msgspec.field(default_factory=PoolConfig)
    log: LogConfig = msgspec.field(default_factory=LogConfig)

    def service_names(self) -> list[str]:
        """The services to run, in the table's order."""
        enabled = self.services.enabled
        if enabled is None:
            return [row.name for row in SERVICES if not missing_packages(row) and self.switched_on(row)]
        return [row.name for row in SERVICES if row.always or row.name in enabled]

    def switched_on(self, row: ServiceRow) -> bool:
        """Whether a service that is off by default is wanted; any other is."""
        section, _, key = row.switch.partition(".")
        return not row.switch or bool(getattr(getattr(self, section), key))


SECTIONS: dict[str, type[msgspec.Struct]] = {
    name: hint for name, hint in get_type_hints(Config).items() if name in Config.__struct_fields__
}


PATH_KEYS = (
    "node.data_dir",
    "broker.password_file",
    "broker.ca_file",
    "broker.config_file",
    "model.folders",
    "gateway.cert_file",
    "gateway.key_file",
    "gateway.token_file",
)
"""Keys that hold paths: relative ones are taken from the folder of the file that they stand in."""


def search_path() -> list[Path]:
    """Where mindstream.toml is looked for when none is given, first to last."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return [Path("mindstream.toml"), home / "mindstream" / "mindstream.toml", Path("/etc/mindstream/mindstream.toml")]


def find_config() -> Path | None:
    """``$MINDSTREAM_CONFIG``, or the first mindstream.toml of the search path, or None."""
    named = os.environ.get("MINDSTREAM_CONFIG")
    return Path(named) if named else next((path for path in search_path() if path.is_file()), None)


def load_config(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """The configuration of ``path``, or of the first file found, or the defaults; with overrides applied.

    Raises ConfigError, naming file and line (or the variable), key, and what would be right.
    """
    source = _Source(path or find_config())
    tree = source.read()
    for section in tree:
        source.check_section(section, tree[section])
    source.override(tree, os.environ if environ is None else environ)
    try:
        config = msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        text, _, key = str(error).partition(" - at `$.")
        key = key.rstrip("`") or "?"
        raise source.error(
            key, f"{key} is not right: {_plain(text)}", hint="docs/configuration.md lists every key", reason=text
        ) from None
    config.node.name = config.node.name or default_node_name()
    _check_services(config, source)
    _check_url(config, source)
    if not _is_loopback(config.metrics.host):
        raise source.error(
            "metrics.host",
            f"metrics.host {config.metrics.host!r} leaves this machine without TLS",
            hint='use "127.0.0.1", and a proxy that speaks TLS or a collector on this machine',
            reason="no TLS",
        )
    _check_gateway(config, source)
    _check_pool(config, source)
    source.resolve_paths(config)
    if config.broker.ca_file and not Path(config.broker.ca_file).is_file():
        raise source.error("broker.ca_file", f"broker.ca_file: there is no file {config.broker.ca_file}")
    return config


def to_toml(config: Config) -> str:
    """``config`` as a mindstream.toml, every key with its value in force."""
    lines = []
    for section in SECTIONS:
        values = msgspec.to_builtins(getattr(config, section))
        lines.append(f"[{section}]")
        # JSON's strings, numbers, booleans and flat arrays are TOML's as well.
        lines += [
            f"{key} = {msgspec.json.encode(value).decode()}" for key, value in values.items() if value is not None
        ]
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


class _Source:
    """Where values come from: a file and variables of the environment; says so in errors."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._text = ""
        self._variables: dict[str, str] = {}
        """Key to the variable that overrides it."""

    def read(self) -> dict[str, Any]:
        """The file's tables; nothing without a file."""
        path = self.path
        if path is None:
            return {}
        try:
            self._text = path.read_text(encoding="utf-8")
            tree: dict[str, Any] = tomllib.loads(self._text)
        except OSError as error:
            raise ConfigError(
                f"reading {path}: {error.strerror}",
                hint="name an existing file with --config or MINDSTREAM_CONFIG",
                reason=str(error.strerror),
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"reading {path}: {error}", hint="mend the TOML there", reason="not TOML") from None
        return tree

    def error(self, key: str, problem: str, *, hint: str = "", reason: str = "", variable: str = "") -> ConfigError:
        """What is wrong with ``key``, and where it stands."""
        variable = variable or self._variables.get(".".join(re.split(r"[.\[]", key)[:2]), "")
        if variable:
            where = f"the environment variable {variable}"
        elif self.path is None:
            where = "the defaults"
        else:
            line = self._line_of(key)
            where = f"{self.path}, line {line}" if line else str(self.path)
        return ConfigError(f"reading {where}: {problem}", hint=hint, field=key, reason=reason)

    def check_section(self, section: str, keys: Any, variable: str = "") -> None:
        """Refuse sections and keys that no struct has."""
        if section not in SECTIONS:
            raise self.unknown(section, list(SECTIONS), "section", variable)
        if not isinstance(keys, dict):
            raise self.error(
                section,
                f"{section} is a section, not a key",
                hint=f"write [{section}], and its keys below it",
                variable=variable,
            )
        valid = [f"{section}.{field}" for field in SECTIONS[section].__struct_fields__]
        for key in keys:
            if f"{section}.{key}" not in valid:
                raise self.unknown(f"{section}.{key}", valid, "key", variable)

    def unknown(self, key: str, valid: list[str], what: str, variable: str = "") -> ConfigError:
        """The error for a name that is none of ``valid``, with the nearest that is."""
        everything = [f"{name}.{field}" for name, struct in SECTIONS.items() for field in struct.__struct_fields__]
        # The very name in another section says more than one of the same section that looks a little like it.
        near = [each for each in everything if "." in key and each.split(".")[1] == key.split(".")[1]]
        near = (
            near or difflib.get_close_matches(key, valid, 1, 0.5) or difflib.get_close_matches(key, everything, 1, 0.6)
        )
        return self.error(
            key,
            f"unknown {what} {key}",
            hint=f"the nearest is {near[0]}" if near else f"there are {', '.join(valid)}",
            reason="unknown",
            variable=variable,
        )

    def override(self, tree: dict[str, Any], environ: Mapping[str, str]) -> None:
        """Put MINDSTREAM_SECTION__KEY variables into ``tree``; their values are TOML, or plain text."""
        for name, text in environ.items():
            if not name.startswith(ENV_PREFIX) or name in ENV_OTHER:
                continue
            section, _, key = name.removeprefix(ENV_PREFIX).lower().partition("__")
            self.check_section(section, {key: None} if key else {}, variable=name)
            if not key:
                raise self.error(
                    section,
                    f"{name} names a section only",
                    hint=f"an override is {name}__KEY",
                    variable=name,
                )
            try:
                value = tomllib.loads(f"value = {text}")["value"]
            except tomllib.TOMLDecodeError:
                value = text
            if get_type_hints(SECTIONS[section])[key] is str and not isinstance(value, str):
                value = text  # a file named 1883 is no number
            tree.setdefault(section, {})[key] = value
            self._variables[f"{section}.{key}"] = name

    def resolve_paths(self, config: Config) -> None:
        """Make the paths of PATH_KEYS absolute."""
        for dotted in PATH_KEYS:
            section, _, key = dotted.partition(".")
            beside_file = self.path is not None and dotted not in self._variables
            base = self.path.parent if beside_file and self.path is not None else Path()
            part = getattr(config, section)
            value = getattr(part, key)
            if isinstance(value, list):
                setattr(part, key, [_absolute(each, base) for each in value])
            elif value:
                setattr(part, key, _absolute(value, base))

    def _line_of(self, dotted: str) -> int | None:
        """The line of a key (or of its section) in the file, from 1."""
        wanted_section, _, wanted_key = dotted.partition(".")
        wanted_key = re.split(r"[.\[]", wanted_key)[0]
        section = ""
        for number, line in enumerate(self._text.splitlines(), start=1):
            if header := re.match(r"\s*\[+\s*([^\]\s]+)\s*\]", line):
                section = header.group(1).strip("\"'")
                if section == wanted_section and not wanted_key:
                    return number
            elif assignment := re.match(r"\s*([^=\s]+)\s*=", line):
                key = assignment.group(1).strip("\"'")
                if (section, key) == (wanted_section, wanted_key) or f"{section}.{key}".lstrip(".") == dotted:
                    return number
        return None


def _absolute(text: str, base: Path) -> str:
    return str((base / Path(text).expanduser()).absolute())


def _plain(text: str) -> str:
    """msgspec's message, in the words of a person who wrote a file."""
    return text.replace("Expected `", "it must be `").replace("got `", "it is `")


def _check_services(config: Config, source: _Source) -> None:
    for name in config.services.enabled or []:
        if name not in BY_NAME:
            error = source.unknown(name, list(BY_NAME), "service")
            raise source.error("services.enabled", f"services.enabled: unknown service {name}", hint=error.hint)


def _check_url(config: Config, source: _Source) -> None:
    url = config.broker.url
    if not url:
        if config.broker.protocol == "3.1.1":
            raise source.error(
                "broker.protocol",
                "broker.protocol is 3.1.1, and the embedded broker (broker.url is empty) speaks MQTT 5",
                hint="leave broker.protocol out",
                reason="not spoken there",
            )
        return
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or port == -1 or parts.path.strip("/"):
        raise source.error(
            "broker.url", f"broker.url {url!r} is not mqtt://host:port or mqtts://host:port", reason="not a URL"
        )
    if parts.username or parts.password:
        raise source.error(
            "broker.url",
            "broker.url holds a name or password",
            hint="put the name into broker.username, the password into a file, and name that in broker.password_file",
            reason="a secret in the configuration",
        )
    if parts.scheme == "mqtt" and not _is_loopback(parts.hostname):
        raise source.error(
            "broker.url",
            f"broker.url {url!r} leaves this machine without TLS",
            hint=f"use mqtts://{parts.hostname}:{port or 8883}",
            reason="no TLS",
        )


def _check_gateway(config: Config, source: _Source) -> None:
    settings = config.gateway
    if bool(settings.cert_file) != bool(settings.key_file):
        key = "gateway.key_file" if settings.cert_file else "gateway.cert_file"
        raise source.error(key, f"{key} is empty: TLS needs the certificate and its key", reason="half of TLS")
    if not settings.cert_file and not _is_loopback(settings.host):
        raise source.error(
            "gateway.host",
            f"gateway.host {settings.host!r} leaves this machine without TLS",
            hint='set gateway.cert_file and gateway.key_file, or use "127.0.0.1"',
            reason="no TLS",
        )


def _check_pool(config: Config, source: _Source) -> None:
    parts = urlsplit(config.pool.url)
    if config.pool.url and "://" not in config.pool.url:
        raise source.error(
            "pool.url",
            f"pool.url {config.pool.url!r} is no URL",
            hint="leave it empty for a folder of this node, or write file:///path for one that nodes share",
            reason="not a URL",
        )
    if parts.username or parts.password:
        raise source.error(
            "pool.url",
            "pool.url holds a name or password",
            hint="put them into fsspec's configuration, or where that service's own tools look for them",
            reason="a secret in the configuration",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def credential(name: str) -> Path | None:
    """systemd's credential of that name, where this process was given one."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return None
    path = Path(folder) / name
    try:
        return path if path.is_file() else None
    except OSError:
        return path  # it is there and may not be looked at: reading it says so
