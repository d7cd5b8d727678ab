"""Mosquitto's password file, written without its program: no password is ever in a command line.

A line is ``NAME:$7$ITERATIONS$SALT$HASH``: PBKDF2 (RFC 8018) with HMAC-SHA-512, 64 bytes, salt and hash in base64, as
``mosquitto_passwd`` of 2.0 writes it. Pure text in, text out: who calls writes the files.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from collections.abc import Iterable

from broker.access import User, roles_of
from protocol.errors import BrokerError

ITERATIONS = 2_000
"""A few milliseconds for each connection, which Mosquitto spends on its only thread: more would let a crowd that
reconnects stop the broker. A generated password needs no stretching; one that a person chose must be long instead."""
SALT_BYTES = 12
HASH_BYTES = 64
MIN_CHARACTERS = 12
MAX_CHARACTERS = 512


def new_password() -> str:
    """256 random bits as text that needs no quoting anywhere."""
    return secrets.token_urlsafe(32)


def hash_password(password: str, *, salt: bytes | None = None, iterations: int = ITERATIONS) -> str:
    """The second field of the password file. Raises BrokerError for a password that is too short or cannot be sent."""
    if not MIN_CHARACTERS <= len(password) <= MAX_CHARACTERS or any(ord(each) < 32 for each in password):
        raise BrokerError(
            f"taking a password of {len(password)} characters: it must have {MIN_CHARACTERS} to {MAX_CHARACTERS}, in"
            " one line",
            hint="leave it out and one is made",
            field="password",
            reason="not a password",
        )
    salt = os.urandom(SALT_BYTES) if salt is None else salt
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, iterations, HASH_BYTES)
    return f"$7${iterations}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def render_passwords(users: Iterable[User]) -> str:
    """The password file."""
    return "".join(f"{user.name}:{user.password_hash}\n" for user in users)


def read_users(passwords: str, acl: str = "") -> dict[str, User]:
    """The users of a password file, with the roles that an ACL file gives them.

    Raises BrokerError with the line's number when one is no user of ours: a line that Mosquitto cannot read makes it
    refuse all, or (2.1, on a reload) end.
    """
    roles = roles_of(acl)
    users: dict[str, User] = {}
    for number, line in enumerate(passwords.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, password_hash = line.strip().partition(":")
        if not _well_formed(password_hash):
            raise BrokerError(
                f"reading the password file, line {number}: no hash of kind $7$ stands there",
                hint=f"mindstream broker user add {name[:63]} --replace",
                field="password_file",
                reason="malformed line",
            )
        role, branches = roles.get(name, ("node", ()))
        users[name] = User(name, password_hash, role, branches)
    return users


def _well_formed(password_hash: str) -> bool:
    parts = password_hash.split("$")
    if len(parts) != 5 or parts[:2] != ["", "7"] or not parts[2].isdigit() or int(parts[2]) < 1:
        return False
    try:
        salt, digest = (base64.b64decode(each, validate=True) for each in parts[3:])
    except (binascii.Error, ValueError):
        return False
    return bool(salt) and len(digest) == HASH_BYTES
