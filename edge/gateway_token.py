"""The token of the OpenAI-compatible endpoint: where it is kept, how it is made, and how one that was shown is judged;
and the endpoint's address.

Its file is read again when it has changed, so that a new token is in force at once and the old one no longer.
"""

from __future__ import annotations

import hmac
import secrets
import stat
from pathlib import Path

from edge.config import Config, GatewayConfig, credential
from edge.files import storage_errors, write_atomically
from protocol.errors import ConfigError

TOKEN_BYTES = 32
MIN_CHARACTERS = 16
"""A shorter one could be guessed."""


def token_file(config: Config) -> Path:
    """Where the token is: ``gateway.token_file``, systemd's credential, or the data folder. Raises StorageError."""
    if config.gateway.token_file:
        return Path(config.gateway.token_file)
    given = credential("gateway-token")
    if given is not None:
        with storage_errors(f"looking at the endpoint's token in {given}"):
            if given.stat().st_size > 1:  # systemd gives an empty line where there is no such file
                return given
    return config.node.folder() / "gateway" / "token"


def make_token(path: Path) -> str:
    """Write a new random token to ``path``, readable by its owner alone. Raises StorageError."""
    token = secrets.token_urlsafe(TOKEN_BYTES)
    with storage_errors(f"making the folder {path.parent}"):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, f"{token}\n".encode(), mode=0o600)
    return token


def read_token(path: Path) -> str:
    """The token in ``path``. Raises ConfigError when it is not fit to be one, and StorageError."""
    with storage_errors(f"reading the endpoint's token from {path}"):
        mode = path.stat().st_mode
        token = path.read_text(encoding="utf-8", errors="replace").strip()
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise ConfigError(
            f"reading the endpoint's token from {path}: every user of this machine may read it",
            hint=f"chmod o-rwx {path}",
            field="gateway.token_file",
            reason="unsafe mode",
        )
    if len(token) < MIN_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"reading the endpoint's token from {path}: it is not {MIN_CHARACTERS} or more printable ASCII characters",
            hint="`mindstream gateway token --new` makes one",
            field="gateway.token_file",
            reason="not a token",
        )
    return token


class TokenCheck:
    """Judges tokens against the file. Raises what read_token() raises."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._token = b""
        self.reload()

    def reload(self) -> None:
        """Read the file again when it has changed."""
        with storage_errors(f"reading the endpoint's token from {self._path}"):
            found = self._path.stat()
        stamp = (found.st_mtime_ns, found.st_ino)
        if stamp != self._stamp:
            self._token = read_token(self._path).encode()
            self._stamp = stamp

    def accepts(self, shown: bytes) -> bool:
        """Whether it is the token; as long in the one case as in the other."""
        self.reload()
        return hmac.compare_digest(shown, self._token)


def base_url(settings: GatewayConfig) -> str:
    """The endpoint's address as programs are given it, up to ``/v1``."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'https' if settings.cert_file else 'http'}://{host}:{settings.port}/v1"
