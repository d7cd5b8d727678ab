"""A small private CA and a server certificate from it, for a hub whose clients know the CA's file.

P-256 keys, SHA-256. Extensions as RFC 5280 wants them, key identifiers included: Python 3.13 refuses a chain without.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protocol.errors import BrokerError

CA_DAYS, SERVER_DAYS = 3650, 825
"""825 days is the longest that some clients (Apple's) take from a server."""
_CLOCK_SLACK = timedelta(days=1)
"""A device without a battery clock may be behind at its first connection."""


@dataclass(frozen=True)
class Issued:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


def make_ca(name: str = "Mindstream CA", *, days: int = CA_DAYS) -> Issued:
    """A CA that signs servers' certificates, and no other CA's."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        _builder(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
    )
    return _issued(builder.sign(key, hashes.SHA256()), key)


def make_server(ca: Issued, hosts: Sequence[str], *, days: int = SERVER_DAYS) -> Issued:
    """A server's certificate for ``hosts`` (names and addresses; clients check the one in their URL).

    Raises BrokerError without a host, or when the CA's files do not belong together.
    """
    if not hosts:
        raise BrokerError("making a server's certificate: it names no host", hint="--host NAME", field="host")
    try:
        issuer = x509.load_pem_x509_certificate(ca.certificate)
        issuer_key = serialization.load_pem_private_key(ca.key, password=None)
    except ValueError as error:
        raise BrokerError(f"reading the CA: {error}", hint="both files must be PEM", field="ca") from error
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey) or issuer_key.public_key() != issuer.public_key():
        raise BrokerError("reading the CA: the key is not that of the certificate", field="ca", reason="key mismatch")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    builder = (
        _builder(subject, issuer.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName([_general_name(each) for each in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    return _issued(builder.sign(issuer_key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SLACK)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise BrokerError(
            f"making a server's certificate for {host[:80]!r}: {error}", hint="ASCII names only", field="host"
        ) from error


def _issued(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Issued:
    return Issued(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
