"""Read a snapshot without Mindstream: python read_snapshot.py NODE_DATA_FOLDER SNAPSHOT_ID

Verifies who made it and where it comes from, decrypts it, and decodes its keys and values: by docs/snapshots.md and
docs/codecs.md alone. Needs the packages msgpack, cryptography, blake3, numpy and zstandard.
"""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path
from typing import Any, NoReturn

import msgpack
import numpy as np
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

BLOCK = 256
DTYPES = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}


def refuse(reason: str) -> NoReturn:
    raise SystemExit(f"refused: {reason}")


# --- keys, signatures, encryption -------------------------------------------------------------------------------------


def derive(secret: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, None, info).derive(secret)


def read_data_key(wraps: list[dict[str, bytes]], seed: bytes, key_id: bytes, trusted: dict[str, bytes]) -> bytes:
    own = X25519PrivateKey.from_private_bytes(derive(seed, b"mindstream/v1/sealing-key\0"))
    public = own.public_key().public_bytes_raw()
    for signed in wraps:
        wrap = msgpack.unpackb(signed["wrap"])
        if wrap["recipient_key"] != public or wrap["key_id"] != key_id or wrap["by"] not in trusted:
            continue
        signer = Ed25519PublicKey.from_public_bytes(trusted[wrap["by"]])
        signer.verify(signed["signature"], b"mindstream/v1/wrap\0" + signed["wrap"])
        shared = own.exchange(X25519PublicKey.from_public_bytes(wrap["ephemeral"]))
        info = b"mindstream/v1/wrap\0" + wrap["key_id"] + wrap["ephemeral"] + public
        data_key = AESGCM(derive(shared, info)).decrypt(bytes(12), wrap["wrapped"], None)
        if derive(data_key, b"mindstream/v1/data-key/id") == key_id:
            return data_key
    refuse("its key was not wrapped for this node by one that it trusts")


def check_provenance(chain: list[dict[str, bytes]], identifier: bytes, trusted: dict[str, bytes]) -> list[str]:
    previous, held, said = bytes(32), b"", []
    for signed in chain:
        statement = msgpack.unpackb(signed["statement"])
        if statement["previous"] != previous:
            refuse("a statement of its provenance does not follow the one before")
        if statement["node"] in trusted:
            signer = Ed25519PublicKey.from_public_bytes(trusted[statement["node"]])
            signer.verify(signed["signature"], b"mindstream/v1/statement\0" + signed["statement"])
        if statement["kind"] in ("created", "pruned", "transcoded"):
            if statement["kind"] != "created" and statement["details"]["from"] != held:
                refuse("its provenance is of several snapshots")
            held = statement["snapshot"]
        previous = blake3(signed["statement"]).digest()
        said.append(f"{statement['kind']} by {statement['node']}")
    if held != identifier or msgpack.unpackb(chain[-1]["statement"])["node"] not in trusted:
        refuse("its provenance is another snapshot's, or ends with a node that is not trusted")
    return said


def check_addresses(manifest: dict[str, Any], private: dict[str, bytes]) -> list[bytes]:
    digests = manifest["digests"]
    names = [digests["weights"], digests["tokenizer"], digests["config"], *digests["adapters"]]
    root = before = blake3(b"mindstream/v1/prefix\0" + b"".join(names)).digest()
    found = []
    for number, block in enumerate(manifest["blocks"]):
        if block.get("kept"):
            before = blake3(b"mindstream/v1/pruned\0" + before + block["kept"]).digest()
        start = 4 * BLOCK * number
        before = blake3(before + private["tokens"][start : start + 4 * block["tokens"]]).digest()
        found.append(before)
    found.append(root)
    if b"".join(found) != private["addresses"]:
        refuse("its addresses are not those of its tokens")
    return found


class Store:
    """A snapshot's encrypted parts."""

    def __init__(self, folder: Path, manifest: dict[str, Any], addresses: list[bytes], aead: AESGCM) -> None:
        self.folder, self.manifest, self.addresses, self.aead = folder, manifest, addresses, aead

    def part(self, part: dict[str, Any], kind: str, block: int) -> bytes:
        plain = b""
        codec = self.manifest["codec"] if kind in ("full", "sliding") else {"name": "raw", "params": {}, "version": 1}
        for index in range(len(part["digests"]) // 32):
            name = part["digests"][32 * index : 32 * index + 32]
            chunk = (self.folder / "chunks" / name.hex()).read_bytes()
            if blake3(chunk).digest() != name:
                refuse(f"chunk {name.hex()} was damaged")
            codec = dict(sorted(codec.items()))
            role = msgpack.packb(["mindstream/v1/chunk", kind, self.addresses[block], codec, index])
            plain += self.aead.decrypt(chunk[:12], chunk[12:], role)
        if len(plain) != part["encoded_bytes"]:
            refuse(f"a part is of {len(plain)} bytes, not {part['encoded_bytes']}")
        return plain


# --- codecs: a block's part to its arrays, (heads, tokens, head size) float32 each ------------------------------------


class Layer:
    """What one layer holds of a block, and where in the block it is."""

    def __init__(self, layer: dict[str, Any], number: int, block: dict[str, Any]) -> None:
        self.heads, self.size = layer["kv_heads"], layer["head_dim"]
        places = np.arange(block["tokens"])
        if layer["kind"] == "full" and block.get("kept"):
            bits = np.unpackbits(np.frombuffer(block["kept"], np.uint8), bitorder="little")
            places = np.flatnonzero(bits)
        elif layer["kind"] == "sliding":
            first_held = layer["seen_tokens"] - layer["tokens"]
            places = places[places + number * BLOCK >= first_held]
        self.places = places
        self.positions = places + number * BLOCK
        self.shape = (self.heads, len(places), self.size)

    def split(self, tokens: int, first: int, last: int) -> tuple[int, int]:
        """Rows before the first number are the exact first ones, from the second on the exact last ones."""
        head = int((self.places < first).sum())
        return head, max(head, int((self.places < tokens - last).sum()))


class Data:
    """A part's bytes, taken in order."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        found = self.data[self.at : self.at + size]
        if len(found) != size:
            refuse("a block ends before its numbers do")
        self.at += size
        return found

    def array(self, dtype: str, *shape: int) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(self.take(size), dtype).reshape(shape)

    def number(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def frame(self, size: int) -> bytes:
        return zstandard.ZstdDecompressor().decompress(self.take(self.number()), max_output_size=size)


def floats(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """To the nearest number of ``dtype``, ties to even: what a cache holds."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).view(np.float32)
    return np.clip(values, -65504, 65504).astype("f2").astype(np.float32) if dtype == "float16" else values


def exact_array(data: Data, shape: tuple[int, int, int], dtype: str) -> np.ndarray:
    """One array as `lossless` has it."""
    heads, tokens, size = shape
    if not heads * tokens * size:
        return np.zeros(shape, np.float32)
    word = np.dtype(DTYPES[dtype]).itemsize
    means, flips = np.zeros((heads, 1, size), np.uint8), np.zeros((heads, 1, size), np.uint8)
    if tokens >= 24:
        means = data.array("u1", heads, 1, size)
        bits = np.unpackbits(data.array("u1", -(-heads * size // 8)))
        flips = bits[: heads * size].reshape(heads, 1, size)
    turned = np.zeros(shape, f"<u{word}")
    for plane in range(word):
        coded = data.take(1) == b"\1"
        count = heads * tokens * size
        own = np.frombuffer(data.frame(count) if coded else data.take(count), np.uint8).reshape(shape)
        turned = (turned << 8) | (own + means if plane == 0 else own)
    turned ^= flips
    return floats(((turned >> 1) | (turned << (8 * word - 1))).view(DTYPES[dtype]), dtype)


def put_exact(
    data: Data, counts: bytes, layers: list[Layer], tokens: int, dtype: str, arrays: list[np.ndarray]
) -> None:
    for layer, array in zip([layer for layer in layers for _ in range(2)], arrays, strict=True):
        head, tail = layer.split(tokens, *counts)
        for rows in (slice(0, head), slice(tail, len(layer.places))):
            array[:, rows] = exact_array(data, array[:, rows].shape, dtype)


def decode_raw(data: Data, layers: list[Layer], dtype: str) -> list[np.ndarray]:
    return [floats(data.array(DTYPES[dtype], *layer.shape), dtype) for layer in layers for _ in range(2)]


def decode_lossless(data: Data, layers: list[Layer], dtype: str) -> list[np.ndarray]:
    return [exact_array(data, layer.shape, dtype) for layer in layers for _ in range(2)]


def decode_int8(data: Data, layers: list[Layer], tokens: int, dtype: str) -> list[np.ndarray]:
    found = []
    for layer in layers:
        heads, held, size = layer.shape
        for scales_shape in ((heads, 1, size), (heads, held, 1)):
            scales = floats(data.array("<u2", *scales_shape), "bfloat16")
            found.append(rounded(data.array("i1", *layer.shape) * scales, dtype))
    put_exact(data, data.take(2), layers, tokens, dtype, found)
    return found


LEVELS = np.array([0.12839, 0.38810, 0.65680, 0.94230, 1.25620, 1.61804, 2.06896, 2.73259], np.float32)


def rotation(size: int) -> np.ndarray:
    odd = size
    while odd % 2 == 0:
        odd //= 2
    row, column = np.arange(odd)[:, None], np.arange(odd)[None, :]
    matrix = np.cos(np.pi / odd * (column + 0.5) * row) * np.sqrt(2 / odd)
    matrix[0] /= np.sqrt(2)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
    signs = []
    for at in range(1, size + 1):
        state = at * 0x9E3779B97F4A7C15 % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        signs.append(1.0 if state >> 63 else -1.0)
    return (np.array(signs)[:, None] * matrix).astype(np.float32)


def decode_rotated4(data: Data, layers: list[Layer], tokens: int, dtype: str) -> list[np.ndarray]:
    twice = [layer for layer in layers for _ in range(2)]
    medians = [data.array("u1", layer.heads, 1) for layer in twice]
    relative = Data(data.frame(sum(layer.heads * len(layer.places) for layer in twice)))
    codes = [relative.array("u1", *layer.shape[:2]) + own for layer, own in zip(twice, medians, strict=True)]
    found = []
    for layer, own in zip(twice, codes, strict=True):
        heads, held, size = layer.shape
        packed = data.array("u1", heads, held, -(-size // 2))
        indices = np.stack([packed & 15, packed >> 4], axis=-1).reshape(heads, held, -1)[:, :, :size]
        scales = np.exp2((own.astype(np.float32) - 160) / 8)[:, :, None]
        turned = np.concatenate([-LEVELS[::-1], LEVELS])[indices] * scales
        found.append(rounded(turned @ rotation(size).T, dtype))
    put_exact(data, data.take(2), layers, tokens, dtype, found)
    return found


# --- the transform codec ----------------------------------------------------------------------------------------------


def lanes_of(data: Data, runs: list[tuple[int, int]], tables: list[dict[str, Any]]) -> list[np.ndarray]:
    """The symbols of each run, (table, how many)."""
    count = data.number()
    states = data.array("<u4", max(lanes for _, lanes in runs)).astype(np.uint64)
    words = iter(data.array("<u2", count).tolist())
    found = []
    for number, lanes in runs:
        frequencies = np.array(tables[number]["frequencies"], np.uint64)
        starts = np.concatenate([[0], np.cumsum(frequencies)[:-1]]).astype(np.uint64)
        slots = states[:lanes] % 4096
        symbols = np.searchsorted(starts, slots, side="right") - 1
        states[:lanes] = frequencies[symbols] * (states[:lanes] // 4096) + slots - starts[symbols]
        for lane in np.flatnonzero(states[:lanes] < 65536):
            states[lane] = int(states[lane]) * 65536 + next(words)
        found.append(symbols)
    if next(words, None) is not None or (states != 65536).any():
        refuse("a block's symbols do not end as they must")
    return found


def decode_transform(
    data: Data, layers: dict[int, Layer], tokens: int, dtype: str, basis: dict[str, Any], name: str
) -> list[np.ndarray]:
    level = next(each for each in basis["levels"] if each["name"] == name)
    counts = data.take(2)
    exact = Data(data.take(data.number()))
    found = {at: [np.zeros(layer.shape, np.float32) for _ in range(2)] for at, layer in layers.items()}
    streams: dict[int, list[int]] = {}
    for at, group in enumerate(basis["groups"]):
        if group["layers"][0] in layers:
            head, tail = layers[group["layers"][0]].split(tokens, *counts)
            if tail > head:
                streams.setdefault(tail - head, []).append(at)
    for rows, groups in streams.items():
        kept = [(cls, at, place) for at in groups for place, cls in enumerate(level["classes"][at]) if cls]
        kept.sort(key=lambda each: each[0])  # stable: then by group and place
        runs = []
        for cls in sorted({cls for cls, _, _ in kept}):
            left = sum(own == cls for own, _, _ in kept)
            at_once = max(1, 2048 // rows)
            runs += [(cls - 1, min(at_once, left - start) * rows) for start in range(0, left, at_once)]
        tables, components = level["tables"], []
        escapes: list[int] = []
        for (number, _), symbols in zip(runs, lanes_of(data, runs, tables), strict=True):
            components.append(np.array(tables[number]["values"], np.float32)[symbols])
            escaped = symbols == len(tables[number]["values"]) - 1
            escapes += (sum(map(len, components[:-1])) + np.flatnonzero(escaped)).tolist()
        numbers = np.concatenate(components)
        if data.number() != len(escapes):
            refuse("escapes are missing")
        numbers[escapes] = data.array("<i4", len(escapes))
        numbers = numbers.reshape(len(kept), rows) * np.float32(level["step"])
        for at in groups:
            group = basis["groups"][at]
            own = [index for index, each in enumerate(kept) if each[1] == at]
            restore(group, [kept[index][2] for index in own], numbers[own], basis, layers, counts, tokens, dtype, found)
    arrays = [array for at in layers for array in found[at]]
    put_exact(exact, counts, list(layers.values()), tokens, dtype, arrays)
    return arrays


def restore(
    group: dict[str, Any],
    places: list[int],
    numbers: np.ndarray,
    basis: dict[str, Any],
    layers: dict[int, Layer],
    counts: bytes,
    tokens: int,
    dtype: str,
    found: dict[int, list[np.ndarray]],
) -> None:
    """A group's components (components, tokens) to its layers' numbers."""
    layer = layers[group["layers"][0]]
    head, tail = layer.split(tokens, *counts)
    scales = np.frombuffer(group["scales"], "<f4")[:, None]
    axes = np.frombuffer(group["axes"], "i1").reshape(len(scales), -1) * scales
    values = numbers.T @ axes[places] / np.frombuffer(group["weights"], "<f4")
    values = values + np.frombuffer(group["mean"], "<f2").astype(np.float32)
    values = values.reshape(tail - head, len(group["layers"]), layer.heads, layer.size)
    if group["side"] == "keys":
        angles = np.array(basis["rotations"][basis["layer_rotations"][group["layers"][0]]])
        by = (layer.positions[head:tail, None] * angles)[:, None, None]
        n = len(angles)
        one, other = values[..., :n].copy(), values[..., n : 2 * n].copy()
        values[..., :n] = one * np.cos(by) - other * np.sin(by)
        values[..., n : 2 * n] = other * np.cos(by) + one * np.sin(by)
    for place, at in enumerate(group["layers"]):
        side = 0 if group["side"] == "keys" else 1
        found[at][side][:, head:tail] = rounded(values[:, place].transpose(1, 0, 2), dtype)


# --- the whole --------------------------------------------------------------------------------------------------------


def decode(
    manifest: dict[str, Any], data: Data, kind: str, number: int, basis: dict[str, Any]
) -> dict[str, np.ndarray]:
    """A part's arrays, by the name of layer and side."""
    block, dtype, codec = manifest["blocks"][number], manifest["kv_dtype"], manifest["codec"]
    layers = {at: Layer(own, number, block) for at, own in enumerate(manifest["layers"]) if own["kind"] == kind}
    layers = {at: layer for at, layer in layers.items() if 0 not in layer.shape}
    held, tokens = list(layers.values()), block["tokens"]
    if codec["version"] != 1:
        refuse(f"codec {codec['name']} of version {codec['version']}")
    if codec["name"] == "raw":
        arrays = decode_raw(data, held, dtype)
    elif codec["name"] == "lossless":
        arrays = decode_lossless(data, held, dtype)
    elif codec["name"] == "int8":
        arrays = decode_int8(data, held, tokens, dtype)
    elif codec["name"] == "rotated4":
        arrays = decode_rotated4(data, held, tokens, dtype)
    elif codec["name"] == "transform":
        arrays = decode_transform(data, layers, tokens, dtype, basis, codec["params"]["level"])
    else:
        refuse(f"codec {codec['name']}")
    if data.at != len(data.data):
        refuse("a block has bytes left over")
    names = [f"layer{at}.{side}" for at in layers for side in ("keys", "values")]
    return dict(zip(names, arrays, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Read a snapshot without Mindstream.")
    parser.add_argument("node", type=Path, help="the node's data folder")
    parser.add_argument("snapshot", help="the snapshot's id, 64 digits")
    parser.add_argument("--bases", type=Path, help="the folder of bases, for the transform codec")
    parser.add_argument("--out", type=Path, help="write all arrays there, .npz")
    options = parser.parse_args()
    folder = options.node / "model_runner" / "snapshots"
    seed = (options.node / "keys" / "node.key").read_bytes()
    signed = msgpack.unpackb((folder / "manifests" / options.snapshot).read_bytes())
    body, manifest = signed["manifest"], msgpack.unpackb(signed["manifest"])
    identifier = blake3(body).digest()
    if identifier.hex() != options.snapshot:
        refuse("it is another snapshot than its name says")

    # Whom this node trusts: the table of its peers, and itself, as whom it takes the creator that its own key fits.
    peers = options.node / "keys" / "peers.json"
    table = json.loads(peers.read_text("utf-8")) if peers.exists() else {}
    trusted = {node: base64.b32decode(text.partition(":")[2].upper() + "====") for node, text in table.items()}
    trusted.setdefault(manifest["creator"], Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw())
    creator = Ed25519PublicKey.from_public_bytes(trusted[manifest["creator"]])
    creator.verify(signed["signature"], b"mindstream/v1/manifest\0" + body)  # raises when it is not the creator's
    if manifest["version"] != 2:
        refuse(f"version {manifest['version']}")
    said = check_provenance(signed["provenance"], identifier, trusted)

    data_key = read_data_key(signed["wraps"], seed, manifest["key_id"], trusted)
    aead = AESGCM(derive(data_key, b"mindstream/v1/data-key/chunk"))
    sealed = manifest["sealed"]
    private = msgpack.unpackb(aead.decrypt(sealed[:12], sealed[12:], b"mindstream/v1/private\0"))
    addresses = check_addresses(manifest, private)
    tokens = np.frombuffer(private["tokens"], "<u4")
    name = manifest["codec"]["name"]
    print(
        f"{manifest['conversation']}: {len(tokens)} tokens of {manifest['model']}, the last ones {tokens[-3:].tolist()}"
    )
    print(f"codec {name}; {', '.join(said)}")

    basis: dict[str, Any] = {}
    if "basis" in manifest["codec"]["params"]:
        wanted = manifest["codec"]["params"]["basis"]
        files = [path for path in (options.bases or Path()).iterdir() if path.is_file()]
        file = next((path for path in files if blake3(path.read_bytes()).digest() == wanted), None)
        basis = msgpack.unpackb(file.read_bytes()) if file else refuse("its basis is not there: --bases FOLDER")
    store = Store(folder, manifest, addresses, aead)
    pieces: dict[str, list[np.ndarray]] = {}
    for number, block in enumerate(manifest["blocks"]):
        for kind in ("full", "sliding"):
            if block.get(kind):
                plain = store.part(block[kind], kind, number)
                for key, array in decode(manifest, Data(plain), kind, number, basis).items():
                    pieces.setdefault(key, []).append(array)
                print(f"block {number}, {kind} layers: {block['tokens']} tokens, {len(plain)} bytes of keys and values")
    arrays = {key: np.concatenate(found, axis=1) for key, found in pieces.items()}
    last = len(manifest["blocks"]) - 1
    if manifest.get("recurrent"):
        states = Data(store.part(manifest["recurrent"], "recurrent", last))
        for at, layouts in enumerate(manifest["states"]):
            for number, layout in enumerate(layouts):
                stored = states.array(DTYPES[layout["dtype"]], *layout["shape"])
                arrays[f"layer{at}.state{number}"] = floats(stored, layout["dtype"])
        print(f"recurrent states: {len(states.data)} bytes")
    if manifest.get("logits"):
        arrays["logits"] = np.frombuffer(store.part(manifest["logits"], "logits", last), "<f4")
        print(f"the next token is likeliest {int(arrays['logits'].argmax())}")
    if options.out:
        np.savez(options.out, tokens=tokens, **arrays)


if __name__ == "__main__":
    main()
