"""Node identity: Ed25519 keys (RFC 8032), fingerprints, and signatures that cannot be moved to another use.

A fingerprint is the public key itself, in text: whoever trusts it needs no further key exchange, on-line or
off. A signature covers a domain as well as the bytes, so that a signed log entry is never a valid manifest.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping

from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.errors import BadSignature, TrustError, UnknownPeer

FINGERPRINT_PREFIX = "ed25519:"
DIGEST_BYTES = 32
SIGNATURE_BYTES = 64

DOMAIN_ENTRY = b"mindstream/v1/entry\0"
DOMAIN_MANIFEST = b"mindstream/v1/manifest\0"
DOMAIN_BUILT_MODEL = b"mindstream/v1/built-model\0"


def digest(*parts: bytes | bytearray | memoryview) -> bytes:
    """BLAKE3, 32 bytes, of the parts one after another."""
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def fingerprint_of(public_key: bytes) -> str:
    """The text form of a raw 32-byte public key: ``ed25519:`` and 52 base32 letters."""
    return FINGERPRINT_PREFIX + base64.b32encode(public_key).decode().rstrip("=").lower()


def public_key_of(fingerprint: str) -> bytes:
    """The raw 32-byte public key of a fingerprint. Raises TrustError when it is none."""
    text = fingerprint.strip().lower()
    body = text.removeprefix(FINGERPRINT_PREFIX)
    try:
        key = base64.b32decode(body.upper() + "=" * (-len(body) % 8))
    except (binascii.Error, ValueError):
        key = b""
    if not text.startswith(FINGERPRINT_PREFIX) or len(key) != 32 or fingerprint_of(key) != text:
        raise TrustError(
            f"reading the fingerprint {fingerprint[:80]!r}: not a Mindstream fingerprint",
            hint="it looks like ed25519:… and `mindstream keys show` prints it on the other node",
            field="fingerprint",
            reason="not a fingerprint",
        )
    return key


class Identity:
    """A node's name and private key. Never leaves its node; never printed.

    Args:
        node: the node's name.
        seed: the 32-byte private key (RFC 8032 seed).
    """

    def __init__(self, node: str, seed: bytes) -> None:
        self.node = node
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key: bytes = self._private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, node: str) -> Identity:
        """A new random identity."""
        return cls(node, Ed25519PrivateKey.generate().private_bytes_raw())

    @property
    def seed(self) -> bytes:
        """The 32-byte private key, for the key file and nothing else."""
        return self._private.private_bytes_raw()

    @property
    def fingerprint(self) -> str:
        """What other nodes write into their peers table."""
        return fingerprint_of(self.public_key)

    def sign(self, domain: bytes, payload: bytes) -> bytes:
        """The 64-byte signature of ``payload`` for the use that ``domain`` names."""
        return self._private.sign(domain + payload)

    def __repr__(self) -> str:
        return f"Identity({self.node!r}, {self.fingerprint})"


class Keyring:
    """The public keys this node trusts, by node name. A plain mapping with a verdict.

    Args:
        fingerprints: node name to fingerprint. Raises TrustError when one is malformed.
    """

    def __init__(self, fingerprints: Mapping[str, str] | None = None) -> None:
        self._keys: dict[str, Ed25519PublicKey] = {}
        self._fingerprints: dict[str, str] = {}
        for node, fingerprint in (fingerprints or {}).items():
            self.add(node, fingerprint)

    def add(self, node: str, fingerprint: str) -> None:
        """Trust ``fingerprint`` as the key of ``node``, in place of any other."""
        self._keys[node] = Ed25519PublicKey.from_public_bytes(public_key_of(fingerprint))
        self._fingerprints[node] = fingerprint.strip().lower()

    def __contains__(self, node: str) -> bool:
        return node in self._keys

    @property
    def fingerprints(self) -> dict[str, str]:
        """Node name to fingerprint, a copy."""
        return dict(self._fingerprints)

    def verify(self, node: str, domain: bytes, payload: bytes, signature: bytes) -> None:
        """Raises UnknownPeer when ``node`` is not trusted, BadSignature when it did not sign ``payload``."""
        key = self._keys.get(node)
        if key is None:
            raise UnknownPeer(
                f"checking a signature of node {node[:80]!r}: this node does not trust it",
                hint=f"run `mindstream keys trust {node[:63]} FINGERPRINT` if it is yours",
                field="node",
                reason="unknown peer",
            )
        try:
            key.verify(signature, domain + payload)
        except InvalidSignature:
            raise BadSignature(
                f"checking a signature of node {node!r}: it does not match the bytes",
                hint="the bytes were changed on the way, or the peer has a new key",
                field="signature",
                reason="bad signature",
            ) from None
