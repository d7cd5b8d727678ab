"""Node identity: Ed25519 keys (RFC 8032), fingerprints, and signatures that cannot be moved to another use.

A fingerprint is the public key itself, in text: whoever trusts it needs no further key exchange, on-line or
off. A signature covers a domain as well as the bytes, so that a signed log entry is never a valid manifest.

What is meant for a node alone is encrypted to its sealing key, an X25519 key (RFC 7748). Its private half is derived
from the seed by HKDF (RFC 5869), so a node still has one secret; its public half is announced signed with the node's
Ed25519 key, so that trust in a fingerprint is trust in both.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from functools import cached_property

from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from protocol.errors import BadSignature, TrustError, UnknownPeer

FINGERPRINT_PREFIX = "ed25519:"
DIGEST_BYTES = 32
SIGNATURE_BYTES = 64

DOMAIN_ENTRY = b"mindstream/v1/entry\0"
DOMAIN_MANIFEST = b"mindstream/v1/manifest\0"
DOMAIN_BUILT_MODEL = b"mindstream/v1/built-model\0"
DOMAIN_BASIS = b"mindstream/v1/basis\0"
DOMAIN_SEALING_KEY = b"mindstream/v1/sealing-key\0"
DOMAIN_WRAP = b"mindstream/v1/wrap\0"
DOMAIN_STATEMENT = b"mindstream/v1/statement\0"
DOMAIN_POOL_ENTRY = b"mindstream/v1/pool-entry\0"
DOMAIN_GROUP_KEY = b"mindstream/v1/group-key\0"
DOMAIN_VARIANT = b"mindstream/v1/variant\0"

SEALING_PREFIX = "x25519:"
KEY_BYTES = 32


def digest(*parts: bytes | bytearray | memoryview) -> bytes:
    """BLAKE3, 32 bytes, of the parts one after another."""
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def derive(secret: bytes, info: bytes) -> bytes:
    """32 bytes for the use that ``info`` names: HKDF-SHA256 (RFC 5869) without salt."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def fingerprint_of(public_key: bytes) -> str:
    """The text form of a raw 32-byte public key: ``ed25519:`` and 52 base32 letters."""
    return FINGERPRINT_PREFIX + _base32(public_key)


def public_key_of(fingerprint: str) -> bytes:
    """The raw 32-byte public key of a fingerprint. Raises TrustError when it is none."""
    text = fingerprint.strip().lower()
    key = _from_base32(text.removeprefix(FINGERPRINT_PREFIX))
    if not text.startswith(FINGERPRINT_PREFIX) or len(key) != 32 or fingerprint_of(key) != text:
        raise TrustError(
            f"reading the fingerprint {fingerprint[:80]!r}: not a Mindstream fingerprint",
            hint="it looks like ed25519:… and `mindstream keys show` prints it on the other node",
            field="fingerprint",
            reason="not a fingerprint",
        )
    return key


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _from_base32(text: str) -> bytes:
    """Empty when it is none."""
    try:
        return base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError):
        return b""


def _named(node: str, public_key: bytes) -> bytes:
    """A name has no zero byte, so where it ends is plain."""
    return node.encode() + b"\0" + public_key


class SealingKeys:
    """An X25519 key pair of a node, or of a group of nodes (``group/NAME``) that share it.

    Args:
        recipient: whose it is.
        secret: the 32-byte private key.
    """

    def __init__(self, recipient: str, secret: bytes) -> None:
        self.recipient = recipient
        self._private = X25519PrivateKey.from_private_bytes(secret)
        self.public_key: bytes = self._private.public_key().public_bytes_raw()

    def agree(self, public_key: bytes) -> bytes:
        """The secret, 32 bytes, shared with the holder of ``public_key``. Raises TrustError for one that is none."""
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(public_key))
        except ValueError:  # of another length, or of small order: the secret would be known to all
            raise TrustError(
                f"agreeing on a key as {self.recipient}: the other's public key is none",
                hint="it was damaged on the way, or its maker means ill",
                field="public_key",
                reason="no X25519 key",
            ) from None


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

    @cached_property
    def sealing(self) -> SealingKeys:
        """The keys by which this node opens what is meant for it."""
        return SealingKeys(self.node, derive(self.seed, DOMAIN_SEALING_KEY))

    @cached_property
    def sealing_key(self) -> str:
        """How other nodes hear of it: ``x25519:``, and in base32 the public key and its signature by this node."""
        public_key = self.sealing.public_key
        signature = self.sign(DOMAIN_SEALING_KEY, _named(self.node, public_key))
        return SEALING_PREFIX + _base32(public_key + signature)

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
        self._sealing: dict[str, bytes] = {}
        for node, fingerprint in (fingerprints or {}).items():
            self.add(node, fingerprint)

    def add(self, node: str, fingerprint: str) -> None:
        """Trust ``fingerprint`` as the key of ``node``, in place of any other."""
        self._keys[node] = Ed25519PublicKey.from_public_bytes(public_key_of(fingerprint))
        self._fingerprints[node] = fingerprint.strip().lower()
        self._sealing.pop(node, None)

    def read_sealing_key(self, node: str, announced: str) -> bytes:
        """The sealing key that ``node`` announced. Raises UnknownPeer, BadSignature or TrustError."""
        body = announced.removeprefix(SEALING_PREFIX)
        decoded = _from_base32(body)
        if not announced.startswith(SEALING_PREFIX) or len(decoded) != KEY_BYTES + SIGNATURE_BYTES:
            raise TrustError(
                f"reading the sealing key of node {node[:80]!r}: not one",
                hint="the peer runs another version, or it was damaged on the way",
                field="sealing_key",
                reason="not a sealing key",
            )
        public_key, signature = decoded[:KEY_BYTES], decoded[KEY_BYTES:]
        self.verify(node, DOMAIN_SEALING_KEY, _named(node, public_key), signature)
        return public_key

    def add_sealing_key(self, node: str, announced: str) -> None:
        """Believe the sealing key that ``node`` announced. Raises as ``read_sealing_key``."""
        self._sealing[node] = self.read_sealing_key(node, announced)

    @property
    def sealing_keys(self) -> dict[str, bytes]:
        """Node name to raw X25519 public key of the nodes that announced one, a copy."""
        return dict(self._sealing)

    def __contains__(self, node: str) -> bool:
        return node in self._keys

    @property
    def fingerprints(self) -> dict[str, str]:
        """Node name to fingerprint, a copy."""
        return dict(self._fingerprints)

    def fingerprint(self, node: str) -> str:
        """Of a node's key; empty when it is not trusted."""
        return self._fingerprints.get(node, "")

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
