"""Write the golden files: ``python -m tests.golden.make``.

What a type's bytes once were stays readable for ever, so a file that is there is never changed: new types get files,
and a type whose bytes have grown gets a new version (``memory.put.v2.msgpack``) beside the old one when it is named
with ``--grow``. ``--rewrite TYPE`` is for a type that no release has carried yet.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import msgspec

from protocol.entries import entry_hash
from protocol.identity import DOMAIN_ENTRY, DOMAIN_MANIFEST
from protocol.messages import MESSAGES
from protocol.sealing import ROLE_PRIVATE
from tests.golden import values

FOLDER = Path(__file__).resolve().parent
SUFFIX = {"msgpack": ".msgpack", "json": ".payload.json"}
_VERSION = re.compile(r"(?P<type>.+?)(?:\.v(?P<number>\d+))?")
SIGNED = ("signed-entry", "signed-manifest")
"""Test vectors that are no messages of their own."""


def versions(type: str, suffix: str) -> list[Path]:
    """The files of one type that hold exact bytes, oldest first."""
    found = []
    for path in FOLDER.glob(f"{type}*{suffix}"):
        match = _VERSION.fullmatch(path.name.removesuffix(suffix))
        if match and match["type"] == type:
            found.append((int(match["number"] or 1), path))
    return [path for _, path in sorted(found)]


def plain(value: Any) -> Any:
    """As JSON: binary is ``{"hex": "…"}``."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def text_of(document: dict[str, Any]) -> str:
    """A readable file's content."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def unpacked(type: str) -> dict[str, Any]:
    """Today's message of one type as a client without our code reads it."""
    made = values.golden(MESSAGES[type])
    decoder = msgspec.msgpack if made.row.topic.format == "msgpack" else msgspec.json
    read: dict[str, Any] = decoder.decode(made.payload)
    return read


def files_of(type: str) -> tuple[str, dict[str, bytes]]:
    """Suffix of the exact bytes, and content by suffix of the two files of a type."""
    made = values.golden(MESSAGES[type])
    suffix = SUFFIX[made.row.topic.format]
    readable = {"type": type, "topic": made.topic, "payload": plain(unpacked(type))}
    return suffix, {suffix: made.payload, ".json": text_of(readable).encode()}


def signed_files(name: str) -> tuple[str, dict[str, bytes]]:
    """The same for a test vector of what is signed: each step from the private key to the bytes on the wire."""
    if name == "signed-entry":
        wire = msgspec.msgpack.encode(values.FIRST)
        domain, body = DOMAIN_ENTRY, values.FIRST.header
        inside = {
            "header": msgspec.msgpack.decode(values.FIRST.header),
            "content": msgspec.msgpack.decode(values.FIRST.content or b""),
            "hash_for_the_next_entry": entry_hash(values.FIRST.header),
        }
    else:
        signed = values.SIGNED_MANIFEST
        domain, body = DOMAIN_MANIFEST, values.SIGNED_MANIFEST.manifest
        key, manifest = values.DATA_KEY, values.MANIFEST
        plain_parts = (values.KV_FULL, values.KV_SLIDING)
        inside = {
            "manifest": msgspec.msgpack.decode(body),
            "snapshot_id": values.SNAPSHOT,
            "sealing_key": values.SPROUT.sealing.public_key,
            "wraps": [msgspec.msgpack.decode(each.wrap) for each in signed.wraps],
            "data_key": key.secret,
            "private": msgspec.msgpack.decode(key.open(ROLE_PRIVATE, manifest.sealed)),
            "chunks": [
                {"role": role, "plaintext": plain, "sealed": bytes(key.seal(role, plain))}
                for (place, _), plain in zip(manifest.parts(), plain_parts, strict=True)
                for role in [place.role(values.ADDRESSES, manifest.codec, 0)]
            ],
            "provenance": [msgspec.msgpack.decode(each.statement) for each in signed.provenance],
        }
        wire = msgspec.msgpack.encode(signed)
    readable = {
        "private_key": values.SEED,
        "fingerprint": values.SPROUT.fingerprint,
        "signed_bytes": domain + body,
        "wire": msgspec.msgpack.decode(wire),
        **inside,
    }
    return ".msgpack", {".msgpack": wire, ".json": text_of(plain(readable)).encode()}


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 1 when a file that is there would have to change and was not named."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.make", description="Write the golden files.")
    parser.add_argument("--grow", metavar="TYPE", action="append", default=[], help="Add a version of a grown type.")
    parser.add_argument(
        "--rewrite", metavar="TYPE", action="append", default=[], help="Overwrite a type that was never released."
    )
    options = parser.parse_args(arguments)
    refused = []
    for name in (*MESSAGES, *SIGNED):
        suffix, contents = signed_files(name) if name in SIGNED else files_of(name)
        there = versions(name, suffix)
        stem = name
        if there and there[-1].read_bytes() == contents[suffix]:
            continue
        if there and name in options.rewrite:
            stem = there[-1].name.removesuffix(suffix)
        elif there and name in options.grow:
            stem = f"{name}.v{len(there) + 1}"
        elif there:
            refused.append(name)
            continue
        for end, content in contents.items():
            (FOLDER / f"{stem}{end}").write_bytes(content)
        print(f"tests/golden/{stem}{suffix} written")
    if refused:
        print(
            f"today's bytes differ and were not written: {', '.join(refused)}\n"
            "A field was added: --grow TYPE. No release has carried the type: --rewrite TYPE. Else the code is wrong.",
            file=sys.stderr,
        )
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
