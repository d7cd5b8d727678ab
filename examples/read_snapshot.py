"""Read a snapshot without Mindstream: python read_snapshot.py NODE_DATA_FOLDER SNAPSHOT_ID"""

import sys
from pathlib import Path

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


def derive(secret: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, None, info).derive(secret)


node, store = Path(sys.argv[1]), Path(sys.argv[1]) / "model_runner" / "snapshots"
seed = (node / "keys" / "node.key").read_bytes()
signed = msgpack.unpackb((store / "manifests" / sys.argv[2]).read_bytes())
body, manifest = signed["manifest"], msgpack.unpackb(signed["manifest"])
# The creator's key; this node's own here. Of another node it stands, in base32, in keys/peers.json.
creator = Ed25519PrivateKey.from_private_bytes(seed).public_key()
creator.verify(signed["signature"], b"mindstream/v1/manifest\0" + body)  # raises when it is not the creator's

own = X25519PrivateKey.from_private_bytes(derive(seed, b"mindstream/v1/sealing-key\0"))
public = own.public_key().public_bytes_raw()
wraps = [msgpack.unpackb(each["wrap"]) for each in signed["wraps"]]
wrap = next(each for each in wraps if each["recipient_key"] == public)
shared = own.exchange(X25519PublicKey.from_public_bytes(wrap["ephemeral"]))
info = b"mindstream/v1/wrap\0" + wrap["key_id"] + wrap["ephemeral"] + public
data_key = AESGCM(derive(shared, info)).decrypt(bytes(12), wrap["wrapped"], None)

aead = AESGCM(derive(data_key, b"mindstream/v1/data-key/chunk"))
sealed = manifest["sealed"]
private = msgpack.unpackb(aead.decrypt(sealed[:12], sealed[12:], b"mindstream/v1/private\0"))
tokens = [int.from_bytes(private["tokens"][at : at + 4], "little") for at in range(0, len(private["tokens"]), 4)]
print(f"{manifest['conversation']}: {len(tokens)} tokens of {manifest['model']}, the last ones {tokens[-3:]}")
for number, block in enumerate(manifest["blocks"]):
    address = private["addresses"][32 * number : 32 * number + 32]
    for kind in ("full", "sliding"):
        part, plain = block.get(kind, {"digests": b""}), b""
        for index in range(len(part["digests"]) // 32):
            chunk = (store / "chunks" / part["digests"][32 * index : 32 * index + 32].hex()).read_bytes()
            role = msgpack.packb(["mindstream/v1/chunk", kind, address, manifest["codec"], index])
            plain += aead.decrypt(chunk[:12], chunk[12:], role)
        if plain:
            print(f"block {number}, {kind} layers: {block['tokens']} tokens, {len(plain)} bytes of keys and values")
