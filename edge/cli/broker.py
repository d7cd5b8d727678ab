"""The command group broker: Mosquitto's configuration, users and certificates on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from edge.cli.context import EXIT_FAILED, JsonOption, load, print_json, print_table
from protocol.errors import BrokerError

if TYPE_CHECKING:
    import pwd

    from broker.configuration import Bridge, Listener, Setup
    from edge.broker_setup import BrokerFolder

INSTALLED = "/etc/mosquitto/mindstream"
DATA = Path("/var/lib/mosquitto")

app = typer.Typer(
    help="Mosquitto for a device or a hub: its configuration, users and certificates.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
render_app = typer.Typer(
    help="Write a configuration: mosquitto.conf, ACL and password file.", no_args_is_help=True, rich_markup_mode=None
)
user_app = typer.Typer(help="Who may connect, and as what.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(render_app, name="render")
app.add_typer(user_app, name="user")

# typer reads the annotations at run time, on Python 3.10 too: hence Optional.
OutOption = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where to write it; users there are kept.")]
FolderOption = Annotated[Path, typer.Option("--folder", metavar="FOLDER", help="The configuration's folder.")]
DataOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--data",
        metavar="FOLDER",
        help="Where Mosquitto keeps what waits. Default: /var/lib/mosquitto for root, else `data` beside the file.",
    ),
]
UserOption = Annotated[
    str,
    typer.Option("--user", metavar="USER", help="User that Mosquitto runs as. Default: mosquitto for root, else you."),
]
CertificateOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--certificate", metavar="FILE", help="The server's certificate (PEM), for TLS."),
]
KeyOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--key", metavar="FILE", help="The certificate's private key (PEM)."),
]
WebsocketsOption = Annotated[
    int, typer.Option("--websockets-port", help="Port for MQTT over websockets; 0 is none.", min=0, max=65_535)
]
AutosaveOption = Annotated[
    int, typer.Option("--autosave-s", help="Seconds between writes of what waits to the disk.", min=1, max=86_400)
]
QueuedOption = Annotated[
    int,
    typer.Option(
        "--max-queued-bytes",
        help="Limit of what waits for one client, in bytes; beyond it the newest is dropped. 0 is none.",
        min=0,
    ),
]
BridgeOption = Annotated[
    str, typer.Option("--bridge", metavar="HOST[:PORT]", help="Another broker to carry this one's nodes to.")
]
BridgeCaOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--bridge-ca", metavar="FILE", help="CA certificate of the other broker."),
]
BridgePasswordOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--bridge-password-file", metavar="FILE", help="File with the password at the other broker."),
]
BridgeNameOption = Annotated[
    str, typer.Option("--bridge-name", metavar="NAME", help="Name at the other broker. Default: the node's.")
]


@render_app.command()
def device(
    out: OutOption,
    node: Annotated[str, typer.Option("--node", help="The node's name. Default: this node's.")] = "",
    port: Annotated[int, typer.Option("--port", help="Port on loopback.", min=1, max=65_535)] = 1883,
    tls_port: Annotated[int, typer.Option("--tls-port", help="Port for other machines, with --certificate.")] = 8883,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    websockets_port: WebsocketsOption = 0,
    anonymous: Annotated[
        bool, typer.Option("--anonymous", help="No passwords: whoever uses this machine may do everything.")
    ] = False,
    data: DataOption = None,
    user: UserOption = "",
    autosave_s: AutosaveOption = 1,
    max_queued_bytes: QueuedOption = 0,
    bridge: BridgeOption = "",
    bridge_ca: BridgeCaOption = None,
    bridge_password_file: BridgePasswordOption = None,
    bridge_name: BridgeNameOption = "",
) -> None:
    """Write the configuration of one node's own broker.

    On loopback, with a password; with a certificate also for other machines, over TLS.
    """
    from broker.configuration import Listener

    node = node or load().node.name
    listeners = [Listener(port)]
    if certificate is not None or key is not None:
        listeners.append(Listener(tls_port, "", _absolute(certificate), _absolute(key)))
    if websockets_port:
        listeners.append(Listener(websockets_port, websockets=True))
    bridges = _bridges(bridge, bridge_ca, bridge_password_file, bridge_name or node, [node])
    setup = _setup("device", out, data, user, listeners, bridges, anonymous, autosave_s, max_queued_bytes)
    folder = _write(setup)
    secret = folder.folder / f"{node}.password"
    if not anonymous and node not in folder.users():
        _add(folder, node, secret, replace=secret.exists())
    print(f"{folder.config_path} is written; to run it: {folder.folder}/systemd-drop-in.conf says how")
    print(f'in mindstream.toml: [broker] url = "mqtt://127.0.0.1:{port}"', end="")
    print("" if anonymous else f', username = "{node}", password_file = "{secret}"')


@render_app.command()
def hub(
    out: OutOption,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    port: Annotated[int, typer.Option("--port", help="Port for TLS.", min=1, max=65_535)] = 8883,
    bind: Annotated[str, typer.Option("--bind", metavar="ADDRESS", help="Address to bind. Default: all.")] = "",
    loopback_port: Annotated[
        int, typer.Option("--loopback-port", help="Port on loopback, without TLS; 0 is none.", min=0, max=65_535)
    ] = 1883,
    websockets_port: WebsocketsOption = 0,
    data: DataOption = None,
    user: UserOption = "",
    autosave_s: AutosaveOption = 1,
    max_queued_bytes: QueuedOption = 0,
    bridge: BridgeOption = "",
    bridge_ca: BridgeCaOption = None,
    bridge_password_file: BridgePasswordOption = None,
    bridge_name: BridgeNameOption = "",
    branch: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--branch", metavar="NODE", help="A node that the bridge carries; may be given again."),
    ] = None,
) -> None:
    """Write the configuration of a broker for several nodes.

    Over TLS, with a name and password for each; users are added with `mindstream broker user add`.
    """
    from broker.configuration import Listener

    listeners = [Listener(port, bind, _absolute(certificate), _absolute(key))]
    if websockets_port:
        listeners.append(Listener(websockets_port, bind, _absolute(certificate), _absolute(key), websockets=True))
    if loopback_port:
        listeners.append(Listener(loopback_port))
    bridges = _bridges(bridge, bridge_ca, bridge_password_file, bridge_name, branch or [])
    folder = _write(_setup("hub", out, data, user, listeners, bridges, False, autosave_s, max_queued_bytes))
    print(f"{folder.config_path} is written; to run it: {folder.folder}/systemd-drop-in.conf says how")
    if not folder.users():
        print(f"nobody may connect yet: mindstream broker user add NAME --folder {folder.folder}")


@user_app.command("add")
def add_user(
    name: Annotated[str, typer.Argument(help="The node's name, or that of another client.")],
    folder: FolderOption = Path(INSTALLED),
    role: Annotated[
        str,
        typer.Option("--role", help="node; bridge (also writes the branches it carries); discovery (Home Assistant)."),
    ] = "node",
    branch: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--branch", metavar="NODE", help="A node that a bridge carries; may be given again."),
    ] = None,
    to: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--to", metavar="FILE", help="Where the new password goes. Default: NAME.password, here."),
    ] = None,
    stdin: Annotated[bool, typer.Option("--stdin", help="Read the password from stdin instead of making one.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Give a user that is there a new password and role.")
    ] = False,
) -> None:
    """Let a name connect. Its password is made here, and written to a file that only you read."""
    from broker.access import check_user_name
    from edge.broker_setup import BrokerFolder

    options: dict[str, Any] = {"role": role, "branches": tuple(branch or ()), "replace": replace}
    secret = None if stdin else (to or Path(f"{name}.password"))
    check_user_name(name)
    if secret is None:
        BrokerFolder(folder).add(name, sys.stdin.readline().rstrip("\r\n"), **options)
    else:
        _add(BrokerFolder(folder), name, secret, **options)
    print(f"{name} may connect" + (f"; its password is in {secret}" if secret else ""))
    _say_reload()


@user_app.command("rm")
def remove_user(name: Annotated[str, typer.Argument(help="The name.")], folder: FolderOption = Path(INSTALLED)) -> None:
    """Let a name connect no longer. A connection that it has stays until it ends."""
    from edge.broker_setup import BrokerFolder

    BrokerFolder(folder).remove(name)
    print(f"{name} may connect no longer")
    _say_reload()


@user_app.command("list")
def list_users(folder: FolderOption = Path(INSTALLED), json: JsonOption = False) -> None:
    """List who may connect, and as what."""
    from edge.broker_setup import BrokerFolder

    users = sorted(BrokerFolder(folder).users().values(), key=lambda user: user.name)
    if json:
        print_json([{"name": user.name, "role": user.role, "branches": user.branches} for user in users])
    else:
        rows = [[user.name, user.role, ", ".join(user.branches)] for user in users]
        print_table(("name", "role", "branches"), rows, empty="nobody: mindstream broker user add NAME")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The mosquitto.conf.", show_default=True)] = Path(
        INSTALLED
    )
    / "mosquitto.conf",
    user: Annotated[
        str,
        typer.Option("--user", metavar="USER", help="User that Mosquitto runs as. Default: the one the file names."),
    ] = "",
    json: JsonOption = False,
) -> None:
    """Say what is wrong with a Mosquitto configuration, and what to type next.

    Whether its user can write what it must keep, what would be lost or dropped, who is let in, and whether rights are
    those of the topic table. Exits with 1 when the broker must not run so.
    """
    from broker.check import FAILED, worst
    from broker.check import check as check_file

    findings = check_file(file, user=user)
    if json:
        print_json([each._asdict() for each in findings])
    else:
        print_table(("checked", "", "found", "next"), [list(each) for each in findings])
    if worst(findings) == FAILED:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def certificate(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the files go.")],
    host: Annotated[
        list[str], typer.Option("--host", metavar="HOST", help="Name or address of the broker; may be given again.")
    ],
    user: UserOption = "",
) -> None:
    """Make a server's certificate for a hub, and the private CA that signs it if there is none in the folder.

    Give ca.pem to every node (broker.ca_file), keep ca.key to yourself.
    """
    from broker.certificates import Issued, make_ca, make_server
    from edge.files import storage_errors, write_atomically

    out = out.absolute()
    ca_path, ca_key_path = out / "ca.pem", out / "ca.key"
    with storage_errors(f"reading the CA in {out}"):
        out.mkdir(parents=True, exist_ok=True)
        there = ca_path.exists()
        ca = Issued(ca_path.read_bytes(), ca_key_path.read_bytes()) if there else make_ca()
    server = make_server(ca, host)
    if not there:
        write_atomically(ca_key_path, ca.key)
        write_atomically(ca_path, ca.certificate, mode=0o644)
    account = _account(user)
    owner = (account.pw_uid, account.pw_gid) if os.geteuid() == 0 else None
    write_atomically(out / "server.key", server.key, owner=owner)
    write_atomically(out / "server.pem", server.certificate, mode=0o644)
    print(f"{out}/server.pem and server.key are for {', '.join(host)}; clients take {ca_path}")


def _account(user: str) -> pwd.struct_passwd:
    """Who Mosquitto runs as: started as root it becomes another user, else it stays who starts it."""
    import pwd

    from broker.system_user import run_user

    return run_user(user) if user or os.geteuid() == 0 else pwd.getpwuid(os.geteuid())


def _setup(
    kind: str,
    out: Path,
    data: Path | None,
    user: str,
    listeners: list[Listener],
    bridges: list[Bridge],
    anonymous: bool,
    autosave_s: int,
    max_queued_bytes: int,
) -> Setup:
    from broker.configuration import Setup

    place = data or (DATA if os.geteuid() == 0 and DATA.is_dir() else out / "data")
    return Setup(
        kind=kind,
        folder=out.absolute(),
        data_folder=place.absolute(),
        user=_account(user).pw_name,
        listeners=tuple(listeners),
        bridges=tuple(bridges),
        anonymous=anonymous,
        autosave_interval_s=autosave_s,
        max_queued_bytes=max_queued_bytes,
    )


def _bridges(
    address: str, ca_file: Path | None, password_file: Path | None, name: str, branches: list[str]
) -> list[Bridge]:
    from broker.configuration import Bridge
    from edge.files import storage_errors

    if not address:
        return []
    if password_file is None or not name:
        raise typer.BadParameter("a bridge needs --bridge-password-file and --bridge-name", param_hint="--bridge")
    host, _, port = address.rpartition(":") if address.count(":") == 1 else (address, "", "8883")
    if not port.isdigit():
        raise typer.BadParameter(f"{port!r} is no port", param_hint="--bridge")
    with storage_errors(f"reading the bridge's password from {password_file}"):
        password = password_file.read_text().rstrip("\r\n")
    return [Bridge("hub", host, tuple(branches), name, password, port=int(port), ca_file=_absolute(ca_file))]


def _write(setup: Setup) -> BrokerFolder:
    from edge.broker_setup import BrokerFolder

    folder = BrokerFolder(setup.folder)
    folder.write(setup)
    return folder


def _add(folder: BrokerFolder, name: str, secret: Path, **options: Any) -> None:
    """Add a user with a password made here, which goes to the file ``secret``."""
    from broker.passwords import new_password
    from edge.files import write_atomically

    if secret.exists() and not options.get("replace"):
        raise BrokerError(
            f"writing the password of {name} to {secret}: the file is there",
            hint="name another with --to, or remove it",
            field="to",
            reason="already there",
        )
    password = new_password()
    folder.add(name, password, **options)
    write_atomically(secret, f"{password}\n".encode())


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser().absolute()


def _say_reload() -> None:
    print("a broker that runs learns it from: sudo systemctl reload mosquitto")
