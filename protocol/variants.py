"""Variant certificates: how far a model's answers move when its keys and values are another variant's, signed by the
node that measured it.

Variants of one model share tokenizer and layers: its built precisions, an engine and another, a base and its adapters.
A certificate is of one ordered pair. It says for each layer what happens when that layer's KV alone is the other's,
and what remains when first layers (the idea of DroidSpeak, arXiv 2411.02820) or recent positions (of CacheBlend,
arXiv 2405.16444) are computed again and the rest is the other's. The first ``SINK_TOKENS`` positions are the model's
own in all of it. Bytes are canonical msgpack, signed and forwarded verbatim like a manifest's.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from protocol.identity import DIGEST_BYTES, DOMAIN_VARIANT, Identity, Keyring, digest
from protocol.layout import malformed
from protocol.manifest import ModelDigests, NumericsFingerprint, is_canonical, read_signed

VARIANT_VERSION = 1
SINK_TOKENS = 4
"""First positions that are always computed again: most heads rest their attention there, and they cost nothing."""
_WHAT = "a variant certificate"


class Variant(msgspec.Struct, frozen=True):
    """Whose keys and values: those of equal ones are taken for the same, whatever computed them."""

    digests: ModelDigests
    engine: str
    """As the numerics fingerprint names it: ``transformers`` or ``onnxruntime``."""
    dtype: str
    """As the numerics fingerprint names it, such as ``bfloat16`` or ``int8 weights, float32 KV``."""

    @classmethod
    def of(cls, digests: ModelDigests, fingerprint: NumericsFingerprint) -> Variant:
        """That of a manifest, or of an engine."""
        return cls(digests, fingerprint.engine, fingerprint.dtype)

    def __str__(self) -> str:
        adapters = "".join(f" + {each.hex()[:8]}" for each in self.digests.adapters)
        return f"{self.digests.weights.hex()[:8]}{adapters} on {self.engine} ({self.dtype})"


class LayerEffect(msgspec.Struct, frozen=True):
    """What the other variant's KV of one layer does, all other layers being the model's own."""

    mean_kl: float
    """Nats a token, from the model's own next-token distribution."""
    top1: float
    """Share of positions whose likeliest token is the same."""


class Reuse(msgspec.Struct, frozen=True):
    """What is left when the first layers, or all layers of the last positions, are computed again, and all else is the
    other variant's."""

    computed_layers: int
    mean_kl: float
    """Nats a token over all texts."""
    worst_kl: float
    """Of the text that moved most."""
    top1: float
    recent_tokens: int = 0
    """Last positions that are computed again in all layers."""

    def share(self, layers: int, tokens: int) -> float:
        """How much of reading ``tokens`` positions through ``layers`` layers it is; at most 1."""
        recent = min(self.recent_tokens, tokens) / max(1, tokens)
        return recent + (1 - recent) * self.computed_layers / max(1, layers)


class VariantCertificate(msgspec.Struct):
    """One ordered pair, measured."""

    created_us: int
    """Unix microseconds by the creator's clock."""
    creator: str
    """Node that measured and signed."""
    layers: list[LayerEffect]
    """In the model's order."""
    model: str
    """The model's name, for people."""
    prefix_tokens: int
    """Positions of each text whose KV was the other's."""
    reuses: Annotated[list[Reuse], Meta(max_length=1024)]
    """By rising number of computed layers, then of recent positions; the first has neither."""
    source: Variant
    """Whose KV was used."""
    target: Variant
    """Which model used it."""
    tested_tokens: int
    """Positions after them, over all texts, whose distributions were compared."""
    texts: int
    """Calibration texts; of several kinds."""
    version: int = 1

    def least(self, most_kl: float, least_top1: float, most_layers: int, tokens: int = 0) -> Reuse | None:
        """The reuse that computes least of those that are as faithful as asked.

        Args:
            most_layers: first layers that can be computed apart.
            tokens: positions of the state; of the measured texts where 0.

        The worst text counts, not the mean: a conversation is one text.
        """
        fine = [
            each
            for each in self.reuses
            if each.computed_layers <= most_layers and each.worst_kl <= most_kl and each.top1 >= least_top1
        ]
        return min(fine, key=lambda each: each.share(len(self.layers), tokens or self.prefix_tokens), default=None)


class SignedVariantCertificate(msgspec.Struct):
    """A certificate as it is stored and as it crosses the bus."""

    certificate: bytes
    """msgpack of VariantCertificate: the signed bytes."""
    signature: bytes
    """Ed25519 over the domain ``mindstream/v1/variant\\0`` and ``certificate``."""


_canonical = msgspec.msgpack.Encoder(order="sorted")
_decoder = msgspec.msgpack.Decoder(VariantCertificate)


def seal_variant(identity: Identity, certificate: VariantCertificate) -> SignedVariantCertificate:
    """Sign it."""
    body = _canonical.encode(certificate)
    return SignedVariantCertificate(body, identity.sign(DOMAIN_VARIANT, body))


def open_variant(signed: SignedVariantCertificate, keyring: Keyring) -> VariantCertificate:
    """The certificate, once its creator is trusted, has signed it, and its figures can be.

    Raises MalformedMessage, UnknownPeer or BadSignature.
    """
    found = read_signed(_WHAT, DOMAIN_VARIANT, signed.certificate, signed.signature, _decoder, keyring)
    if found.version != VARIANT_VERSION:
        raise malformed("version", f"{found.version}, this node reads {VARIANT_VERSION}", _WHAT)
    if not is_canonical(signed.certificate):
        raise malformed("certificate", "it is not canonical msgpack", _WHAT)
    for name, variant in (("source", found.source), ("target", found.target)):
        digests = variant.digests
        for value in (digests.weights, digests.tokenizer, digests.config, *digests.adapters):
            if len(value) != DIGEST_BYTES:
                raise malformed(name, f"a digest of {len(value)} bytes", _WHAT)
    if found.source.digests.tokenizer != found.target.digests.tokenizer:
        raise malformed("target", "variants of two tokenizers", _WHAT)
    if min(found.texts, found.prefix_tokens, found.tested_tokens) < 1:
        raise malformed("tested_tokens", "nothing was measured", _WHAT)
    computed = [(each.computed_layers, each.recent_tokens) for each in found.reuses]
    if (
        computed[:1] != [(0, 0)]
        or computed != sorted(set(computed))
        or computed[-1][0] >= max(1, len(found.layers))
        or not all(0 <= each.recent_tokens < found.prefix_tokens for each in found.reuses)
    ):
        raise malformed(
            "reuses", f"{computed} computed layers of {len(found.layers)} and positions of {found.prefix_tokens}", _WHAT
        )
    for index, reuse in enumerate(found.reuses):
        # NaN fails every comparison.
        if not (0 <= reuse.mean_kl <= reuse.worst_kl < float("inf") and 0 <= reuse.top1 <= 1):
            raise malformed(f"reuses[{index}]", "figures that cannot be", _WHAT)
    return found


def pair_name(source: Variant, target: Variant) -> str:
    """A file's name for the pair: 64 hex digits."""
    return digest(b"mindstream/v1/variant-pair\0", _canonical.encode([source, target])).hex()
