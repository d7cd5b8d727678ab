"""What is wrong with a mosquitto.conf, ours or another's, before or while a broker runs on it.

Reads the file as Mosquitto does (``include_dir`` followed) and looks at what it names: who may write where, what is
lost or dropped in silence, who is let in from where, and whether the rights are still those of the topic table.
Passwords are never in what it finds.
"""

from __future__ import annotations

import pwd
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

from broker.access import render_acl, rules_of
from broker.base import MAX_PACKET_BYTES
from broker.configuration import ACL_NAME, CONFIG_NAME, is_loopback
from broker.passwords import read_users
from broker.system_user import run_user, why_not_readable, why_not_writable
from protocol.errors import BrokerError

OK, WARNING, FAILED = "ok", "warning", "failed"
INSTALLED_FOLDER = Path("/etc/mosquitto/mindstream")
"""Where `mindstream broker render` puts a configuration that the system's Mosquitto is to run."""
LONGEST_AUTOSAVE_S = 10
DEFAULT_AUTOSAVE_S, DEFAULT_QUEUED_MESSAGES = 1800, 1000
FEW_QUEUED_MESSAGES = 100_000
EXPIRES_SOON = timedelta(days=30)
_RENDER = "mindstream broker render"


class Finding(NamedTuple):
    """What was looked at."""

    name: str
    verdict: str
    """``ok``, ``warning``, or ``failed``: the broker must not run so."""
    found: str
    next_step: str = ""


@dataclass
class Parsed:
    """A mosquitto.conf, taken apart. The last value of an option counts, as in Mosquitto."""

    options: dict[str, str] = field(default_factory=dict)
    listeners: list[dict[str, str]] = field(default_factory=list)
    bridges: list[dict[str, str]] = field(default_factory=list)

    def seconds(self, option: str, default: int) -> int:
        """A whole number, or ``default`` where none stands."""
        text = self.options.get(option, "")
        return int(text) if text.isdigit() else default


_OF_A_LISTENER = frozenset({"certfile", "keyfile", "cafile", "protocol", "max_connections", "tls_version", "psk_hint"})
_OF_A_BRIDGE = ("address", "addresses", "cleansession", "topic", "start_type", "keepalive_interval", "restart_timeout")


def read(path: Path) -> Parsed:
    """Raises BrokerError when ``path``, or a file that it includes, cannot be read."""
    parsed = Parsed()
    in_bridge = False
    for key, value in _lines(path):
        if key == "listener":
            port, _, host = value.partition(" ")
            parsed.listeners.append({"port": port, "host": host.strip()})
            in_bridge = False
        elif key == "port":
            # The old way, without `listener`: every address unless bind_address says otherwise.
            parsed.listeners.append({"port": value, "host": ""})
        elif key == "connection":
            parsed.bridges.append({"connection": value})
            in_bridge = True
        elif in_bridge and (key in _OF_A_BRIDGE or key.startswith(("bridge_", "remote_", "local_", "notification"))):
            parsed.bridges[-1].setdefault(key, value)
        elif key in _OF_A_LISTENER and parsed.listeners:
            parsed.listeners[-1][key] = value
        else:
            parsed.options[key] = value
    return parsed


def _lines(path: Path, *, top: bool = True) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise BrokerError(
            f"reading {path}: {error.strerror}",
            hint=f"sudo mindstream broker check {path}"
            if isinstance(error, PermissionError)
            else f"{_RENDER} device --out FOLDER writes one",
            field="config_file",
            reason=error.strerror or "",
        ) from error
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if key == "include_dir" and top:
            for part in sorted(Path(value.strip()).glob("*.conf")):
                yield from _lines(part, top=False)
        else:
            yield key, value.strip()


def check(path: Path, *, user: str = "") -> list[Finding]:
    """All findings on the configuration ``path``, worst first mended first.

    ``user`` is who Mosquitto runs as; empty for the one that the file names. Raises BrokerError when the file cannot
    be read.
    """
    parsed = read(path)
    try:
        account = run_user(user or parsed.options.get("user", ""))
    except BrokerError as error:
        return [Finding("user", FAILED, error.message, error.hint)]
    findings = [*_persistence(parsed, account), *_queues(parsed), *_listeners(parsed)]
    findings += [*_files(parsed, account), *_rights(parsed), *_certificates(parsed), *_bridges(parsed)]
    return findings


def worst(findings: list[Finding]) -> str:
    """The worst verdict of all."""
    verdicts = {each.verdict for each in findings}
    return next((each for each in (FAILED, WARNING) if each in verdicts), OK)


def _persistence(parsed: Parsed, account: pwd.struct_passwd) -> Iterator[Finding]:
    name = "persistence"
    if parsed.options.get("persistence", "false") != "true":
        yield Finding(name, FAILED, "off: nothing that waits outlives the broker", "persistence true")
        return
    if not parsed.options.get("persistence_location"):
        yield Finding(name, FAILED, "in whatever folder it is started from", "persistence_location /var/lib/mosquitto/")
        return
    folder = Path(parsed.options["persistence_location"])
    database = folder / parsed.options.get("persistence_file", "mosquitto.db")
    reason = why_not_writable(folder, account)
    if reason:
        yield Finding(
            name,
            FAILED,
            f"{account.pw_name} cannot write into {folder}: {reason}; Mosquitto would run and save nothing",
            f"sudo install -d -o {account.pw_name} -g {account.pw_name} -m 700 {folder}",
        )
        return
    if database.exists() and (reason := why_not_readable(database, account)):
        yield Finding(
            name,
            FAILED,
            f"{account.pw_name} cannot read {database}: {reason}; what it holds would be lost",
            f"sudo chown {account.pw_name} {database}",
        )
        return
    interval_s = parsed.seconds("autosave_interval", DEFAULT_AUTOSAVE_S)
    if parsed.options.get("autosave_on_changes") == "true":
        yield Finding(
            name, OK, f"{folder}, written after every {interval_s} changes, which costs most of the throughput"
        )
    elif not 0 < interval_s <= LONGEST_AUTOSAVE_S:
        lost = f"the last {interval_s} s are lost" if interval_s else "all is lost"
        yield Finding(name, WARNING, f"{folder}; at a crash {lost}", "autosave_interval 1")
    else:
        yield Finding(name, OK, f"{folder}, never older than {interval_s + 1} s")


def _queues(parsed: Parsed) -> Iterator[Finding]:
    messages = parsed.seconds("max_queued_messages", DEFAULT_QUEUED_MESSAGES)
    queued_bytes = parsed.seconds("max_queued_bytes", 0)
    if messages == 0:
        yield Finding(
            "queues",
            WARNING,
            "max_queued_messages 0 is misread by Mosquitto 2.0.16 to 2.0.21: messages dropped, clients cut off",
            "max_queued_messages 1000000000",
        )
    elif messages < FEW_QUEUED_MESSAGES:
        yield Finding(
            "queues",
            WARNING,
            f"beyond {messages:,} messages for a client that is away the newest are dropped in silence",
            "max_queued_messages 1000000000",
        )
    elif queued_bytes:
        yield Finding("queues", OK, f"up to {queued_bytes:,} bytes for a client that is away, as asked for")
    else:
        yield Finding("queues", OK, "no limit for clients that are away")
    packet_bytes = parsed.seconds("max_packet_size", 0)
    if 0 < packet_bytes < MAX_PACKET_BYTES:
        yield Finding(
            "packets",
            FAILED,
            f"max_packet_size is {packet_bytes:,}: larger messages cost their sender the connection, again and again",
            f"max_packet_size {MAX_PACKET_BYTES}",
        )


def _listeners(parsed: Parsed) -> Iterator[Finding]:
    anonymous = _anonymous(parsed)
    if not parsed.listeners:
        yield Finding("listeners", OK, "none: loopback, port 1883")
    for listener in parsed.listeners:
        host = listener["host"] or parsed.options.get("bind_address", "")
        name = f"listener {listener['port']}"
        what = "TLS" if "certfile" in listener else "plain"
        if listener.get("protocol") == "websockets":
            what += ", websockets"
        where = host or "every address"
        if is_loopback(host):
            found = f"{where}, {what}" + (", without passwords: for whoever uses this machine" if anonymous else "")
            yield Finding(name, OK, found)
        elif anonymous:
            yield Finding(name, FAILED, f"{where}: whoever connects is let in", "allow_anonymous false")
        elif "certfile" not in listener:
            yield Finding(
                name,
                FAILED,
                f"{where}, without TLS: passwords and messages are open to the network",
                "certfile and keyfile (`mindstream broker certificate`), or bind it to 127.0.0.1",
            )
        else:
            yield Finding(name, OK, f"{where}, {what}")


def _anonymous(parsed: Parsed) -> bool:
    # Without a listener Mosquitto serves loopback, and lets in everyone there.
    return parsed.options.get("allow_anonymous", "false" if parsed.listeners else "true") == "true"


def _files(parsed: Parsed, account: pwd.struct_passwd) -> Iterator[Finding]:
    named: list[tuple[str, str, bool]] = []
    named += [(key, parsed.options[key], True) for key in ("password_file", "acl_file") if key in parsed.options]
    for listener in parsed.listeners:
        named += [(key, listener[key], key == "keyfile") for key in ("certfile", "keyfile") if key in listener]
    named += [("bridge_cafile", each["bridge_cafile"], False) for each in parsed.bridges if "bridge_cafile" in each]
    for key, text, secret in dict.fromkeys(named):
        path = Path(text)
        if reason := why_not_readable(path, account):
            yield Finding(
                key, FAILED, f"{account.pw_name} cannot read {path}: {reason}", f"sudo chown {account.pw_name} {path}"
            )
        elif secret and path.stat().st_mode & 0o007:
            yield Finding(key, WARNING, f"every user of this machine may read {path}", f"sudo chmod o-rwx {path}")
        else:
            yield Finding(key, OK, str(path))


def _rights(parsed: Parsed) -> Iterator[Finding]:
    if _anonymous(parsed):
        return
    text = {key: _text(parsed.options.get(key, "")) for key in ("password_file", "acl_file")}
    if "acl_file" not in parsed.options:
        yield Finding(
            "rights",
            FAILED,
            "no acl_file: every name may write what any other says",
            f"acl_file, as `{_RENDER}` writes it",
        )
    users = {}
    try:
        users = read_users(text["password_file"], text["acl_file"])
    except BrokerError as error:
        yield Finding("users", FAILED, error.message, error.hint)
    else:
        if "password_file" in parsed.options and not users:
            yield Finding("users", WARNING, "nobody may connect", "mindstream broker user add NAME")
    if "acl_file" in parsed.options:
        wanted = rules_of(render_acl(users.values()))
        missing = [each for each in wanted if each not in rules_of(text["acl_file"])]
        if missing:
            yield Finding(
                "rights",
                WARNING,
                f"{parsed.options['acl_file']} lacks {len(missing)} rules of the topic table: {missing[0]}, …",
                f"{_RENDER} again writes them",
            )
        else:
            yield Finding("rights", OK, f"as the topic table says, for {len(users)} names")


def _certificates(parsed: Parsed) -> Iterator[Finding]:
    for path in dict.fromkeys(Path(each["certfile"]) for each in parsed.listeners if "certfile" in each):
        if not (pem := _text(str(path))):
            continue  # _files says why it cannot be read
        from cryptography import x509

        try:
            until = x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc
        except ValueError as error:
            yield Finding("certificate", FAILED, f"{path} is no PEM certificate: {error}", "certfile")
            continue
        left = until - datetime.now(timezone.utc)
        verdict = FAILED if left < timedelta(0) else WARNING if left < EXPIRES_SOON else OK
        step = "" if verdict == OK else f"mindstream broker certificate --out {path.parent} --host NAME"
        yield Finding("certificate", verdict, f"{path} is valid until {until:%Y-%m-%d}", step)


def _bridges(parsed: Parsed) -> Iterator[Finding]:
    for bridge in parsed.bridges:
        name = f"bridge {bridge['connection']}"
        address = bridge.get("address", bridge.get("addresses", ""))
        if bridge.get("bridge_protocol_version", "mqttv311") != "mqttv50":
            yield Finding(
                name, WARNING, f"to {address}: it strips MQTT 5 properties", "bridge_protocol_version mqttv50"
            )
        elif "bridge_cafile" not in bridge and not is_loopback(address.rpartition(":")[0]):
            yield Finding(name, FAILED, f"to {address}, without TLS", "bridge_cafile FILE")
        elif bridge.get("cleansession", "false") == "true":
            yield Finding(name, WARNING, f"to {address}: what waits is lost at a restart", "cleansession false")
        else:
            yield Finding(name, OK, f"to {address}")


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace") if path else ""
    except OSError:
        return ""


def installed_config() -> Path | None:
    """The configuration that `mindstream broker render` put where the system's Mosquitto takes it from, if any."""
    path = INSTALLED_FOLDER / CONFIG_NAME
    try:
        return path if path.is_file() else None
    except OSError:
        return path  # there is one, and this user may not look


__all__ = ["ACL_NAME", "FAILED", "INSTALLED_FOLDER", "OK", "WARNING", "Finding", "check", "installed_config", "worst"]
