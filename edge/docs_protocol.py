"""docs/protocol.md: what a person needs to write a client in another language. Prose here, tables from the code."""

from __future__ import annotations

import inspect
import re

from edge.asks import RESEND_FIRST_S
from edge.blobs import CREDIT_CHUNKS, STALL_S
from edge.docs_fields import SOURCES, Fields
from edge.docs_text import GENERATED, plain, table
from edge.replies import MARGIN_S, MAX_KEPT_BYTES
from protocol import codec, errors
from protocol.basis_manifest import MAX_BASIS_BYTES, BasisManifest
from protocol.built_manifest import MAX_FILES, MAX_MODEL_BYTES, BuiltManifest
from protocol.clock import COUNTER_BITS, MAX_DRIFT_MS
from protocol.entries import (
    MAX_CONTENT_BYTES,
    MAX_HEADER_BYTES,
    MAX_HLC,
    MAX_SEQ,
    SALT_BYTES,
    EntryHeader,
    MemoryContent,
)
from protocol.errors import MindstreamError
from protocol.group_key import GroupGrant
from protocol.identity import (
    DIGEST_BYTES,
    DOMAIN_BASIS,
    DOMAIN_BUILT_MODEL,
    DOMAIN_ENTRY,
    DOMAIN_GROUP_KEY,
    DOMAIN_MANIFEST,
    DOMAIN_POOL_ENTRY,
    DOMAIN_VARIANT,
    SIGNATURE_BYTES,
)
from protocol.layout import MAX_SNAPSHOT_BYTES
from protocol.manifest import MAX_CHUNK_BYTES, MAX_MANIFEST_BYTES, PrivatePart, SnapshotManifest
from protocol.messages import MESSAGES
from protocol.pool import PoolEntry
from protocol.provenance import Statement
from protocol.sealing import KeyWrap
from protocol.topics import MAX_PACKET_BYTES, ROOT, TOPICS
from protocol.variants import VariantCertificate

_PROTOCOL = """\
# Protocol

{generated}

What crosses the bus, for clients in any language. [clients.md](clients.md) has some to begin with,
[asyncapi.yaml](asyncapi.yaml) says the same for machines, and `tests/golden/` holds the bytes of a message of every
type. Everything is below `{root}/`, in lowercase, but for the one topic whose name Home Assistant chose.

- **A node writes its own branch and nothing else.** The first level below the root is the node that speaks; the
  `source` of its envelopes begins with that name, and what does not is refused. A client that is no node takes a name
  too, and has a branch like one.
- **Names** (levels in braces, and fields of type *name*) are 1 to 63 of `a-z`, `0-9`, `-` and `_`, first a letter
  or digit.
- **Payloads** are one msgpack map, the envelope below, whose `data` is the message. Topics of format JSON carry a bare
  JSON object instead, so that any tool can read who is there.
- Unknown fields are ignored, unknown types are counted. Missing or ill-typed fields are an error that names topic,
  type, field and reason. Fields carry their units in their names. From the first release on a message only grows. A
  field that has a default may be left out.
- **Liveness.** Where a topic is said *at least every* so often, a live speaker repeats its word after that time, also
  an unchanged one; silent for three of these times it is late. A retained message that comes with a subscription (it
  has MQTT's RETAIN flag) may be old and says nothing of that. An empty one takes back what was retained.
- **QoS 1 everywhere.** A PUBACK means that the broker has it, nothing more. What comes may come twice.
- **MQTT 5** where the broker has it. Nothing of the payload depends on it, but the message expiry of an ask does:
  see [asking](#asking). Some brokers refuse client ids with spaces.
- No packet is above {max_packet:,} bytes; each topic and type has a limit of its own.

## Envelope
{envelope}
Text is msgpack's str, binary its bin; one is never taken for the other. Integers fit 64 bits. A map's keys may come in
any order, and nothing may follow the map. An envelope of another `v` is refused as `unsupported_version`.

## Topics
{topics}

## Asking
1. The asker subscribes to `{root}/{{target}}/reply/{{asker}}/{{client}}`, and waits for the SUBACK.
2. It publishes the question in its own branch, `{root}/{{asker}}/ask/{{target}}/{{service}}/{{verb}}`. The envelope
   has an `id` of its own, `reply_to` (the client level of the reply's topic) and `ttl_ms`. With MQTT 5 the packet has
   the message expiry interval `ceil(ttl_ms / 1000)`, the reply's topic as response topic and the `id` as correlation
   data; responders read of these only the expiry.
3. The answer comes in the branch of the one who was asked. Its `correlation` is the ask's `id`; its type is the one
   that the table names, or `error`. An answer from another branch, or of another type, is none. Answers may come
   twice.

**Time to live.** `ttl_ms` is 1 to the longest that the type allows; outside of that, or without it, the ask is
refused. It counts from the arrival at the service, by a monotonic clock, wall clocks have no part in it; what the
packet waited at the broker is taken off by MQTT 5's own countdown, if the ask has an expiry. An ask whose time ran
out before it could be carried out is answered with `expired`. Whoever sends an ask again puts into it what is left.

**Again.** Without an answer an ask is sent again under the same `id` after {resend:g} s, then after twice as long,
and on each new connection. The asking node and the `id` make an ask's key: it is carried out once, and repeated
answers come from a cache, which keeps them for the ask's time to live and {margin:g} s more (questions whose answer
is above {kept:,} bytes are carried out again: they change nothing). *Durable* asks are on the disk before the broker
hears that they have come, and are carried out after a crash, with what is then left of their time; after a reboot
that is unknown and counts as expired. They are answered at their end, not when they are accepted.

**Refused.** An ask that cannot be read is answered with an error if at least its envelope could. A service that does
not run answers nothing: its retained state says so. Types that are *of the node's own programs only* are refused when
another node asks.

## Errors
The data of type `error`: `code` is one of these, and stable; `message` says what was being done, with what and why it
failed, `hint` what to do next. One that a client does not know is to be read as `error`.

{errors}

## What is signed
Log entries and manifests are passed on by others than who wrote them, so they are signed: as **bytes**, which are
stored and forwarded as they came, and never encoded anew. Signatures are Ed25519 (RFC 8032) over a domain and the
bytes; digests are BLAKE3, of {digest} bytes. A node's fingerprint is `ed25519:` and its public key of 32 bytes in
base32 (RFC 4648) in lowercase without padding; who trusts it needs nothing more. `signed-entry.json` and
`signed-manifest.json` in `tests/golden/` go through both, from private key to wire.

### Log entries
An *origin* is (`node`, `scope`, `log_id`). Its entries are numbered from 1 without gaps and chained. On the wire an
entry is a [SignedEntry](#signedentry); its `header` is the msgpack of

{entry_header}
and its `content`, for kind `memory.put`, the msgpack of

{memory_content}
To check one:
- `signature` is {signature} bytes, by the key of the header's `node`, over `{domain_entry}` and the bytes of `header`.
- `content_digest` is the digest of `salt` ({salt} bytes) and `content`, one after the other. Both may be gone
  (erased): the header and its signature stay.
- `prev` is the digest of the header bytes of entry `seq - 1` of the same origin, {digest} zero bytes for the first. Two
  headers for one `seq` are a fork: the one that is held stays, the other is refused and said.
- `node` and `scope` are names, `id` and `log_id` UUIDv7 in lowercase, `seq` 1 to 2⁴⁰ − 1 and `hlc` 0 to 2⁶³ − 1.
- Kinds and fields that a reader does not know are kept and passed on.

`hlc` orders entries of several nodes: {hlc_ms} bits of Unix milliseconds, {hlc_counter} of a counter (Kulkarni et
al., 2014). A stamp more than {drift:g} s ahead of the reader's clock is kept, and its own clock does not follow it.
Entries of scope `private` never leave their node.

### Manifests
A [SignedManifest](#signedmanifest) has the msgpack of a snapshot's manifest, and the `signature` by its `creator` over
`{domain_manifest}` and these bytes. The snapshot's id is the digest of the same bytes, in 64 hexadecimal digits. Key
wraps and provenance stand beside them, each signed by whom it is of. [snapshots.md](snapshots.md) says how a snapshot
is encrypted, and shows a program that reads one.

{manifest}
Of a manifest only `creator` is read before its signature has been checked. Then: `version` is 2; the bytes are
canonical msgpack (keys in order, none twice, shortest forms, floats of 64 bits); layers, blocks and parts are of one
state of `cached_tokens` positions; `total_bytes` is the sum of the chunks.

`sealed` is, encrypted, the msgpack of

{private}
A wrap is a [SignedWrap](#signedwrap): the msgpack of

{wrap}
Provenance is a list of [SignedStatement](#signedstatement)s: each the msgpack of

{statement}
A chain begins with `created`, and has no other. Statements are of the same snapshot as the one before, but `pruned` and
`transcoded`, which make another one `from` it; the manifest's creator must have made the last. Who signed the last
statement must be trusted; of others it may be unknown.

### Manifests of built models
A [SignedBuiltManifest](#signedbuiltmanifest) has the msgpack of a built model's manifest, and the `signature` by its
`creator`, the holder, over `{domain_built}` and these bytes.

{built_manifest}
Each file is cut, by itself, into chunks of {chunk:,} bytes, its last one shorter; the chunks of all files, in their
order, are those of the manifest. It is refused unless its names are plain (no folder, no dot at the beginning, no two
alike), `total_bytes` is the sum of the files, `chunks` has a digest for each chunk, and `build` is the reader's own.

### Entries of the pool
A [SignedPoolEntry](#signedpoolentry) has the msgpack of an entry of the [pool](pool.md), and the `signature` by its
`creator` over `{domain_pool}` and these bytes. Its id is their digest, in 64 hexadecimal digits.

{pool_entry}
What a witness says of it is a [SignedStatement](#signedstatement) of the kind `witnessed`, alone: `previous` is 32 zero
bytes, `snapshot` the entry's id, `details` has `agrees`, `how`, `error` and `tolerance`.

#### GroupGrant
A [SignedGrant](#signedgrant) of the site's group key has the msgpack of this, and the `signature` of who grants it over
`{domain_group}` and these bytes.

{group_grant}
### Manifests of bases
A [SignedBasis](#signedbasis) has the msgpack of the manifest of a model's basis ([codecs](codecs.md#transform)), and
the `signature` by its `creator`, over `{domain_basis}` and these bytes. Who passes a basis on signs it again.

{basis_manifest}
The file's bytes are cut into chunks of {chunk:,} bytes, the last one shorter.

### Variant certificates
A [SignedVariantCertificate](#signedvariantcertificate) has the msgpack of what was measured of a pair of variants, and
the `signature` by its `creator`, over `{domain_variant}` and these bytes. Who passes it on changes nothing in it.

{variant_certificate}
It is refused unless both are of one tokenizer, something was measured, and `reuses` begins with nothing computed and
rises.

## How memories spread
A node says its own new entries on `memory/log`, each committed before. What was missed is found and asked for:
`memory/have` is retained, and its `digest` is BLAKE3 with 64 bytes of output over the msgpack arrays `[node, scope,
log_id, seq, hash]` of all origins that the node holds and may tell of, sorted by the first three, one after the
other; `hash` is the digest of the header bytes of entry `seq`. Where two nodes' digests differ, `memory.vector.ask`
gets the vectors themselves, and `memory.repair` the entries of an origin by number. The answer is as long as fits one
message; with `more` the rest is to be asked for. Entries may come twice, and before those that precede them.

## How snapshots travel
1. `snapshot.manifest.ask` gets the signed manifest. It is checked before anything is allocated.
2. The receiver chooses a UUIDv7 as `transfer` and subscribes to `{root}/{{holder}}/blob/{{transfer}}`.
3. It asks `blob.pull` with a bitmap of the chunks that it has or expects (bit `i & 7` of byte `i >> 3`; what the
   bitmap is too short for is missing) and a credit. The answer says how many chunks come, the first that are not in
   the bitmap, and which of these the holder has lost.
4. Each `blob.chunk` is checked against size and digest in the manifest, and kept, before it counts. With half of the
   credit used up the receiver asks for more, under the same `transfer`. Nodes give {credit} chunks of credit, and ask
   again for what has not come for {stall:g} s.
5. Where `mailbox` in the pull proves that both are on one host, `blob.letter` may stand for several `blob.chunk`: they
   lie in a sealed memfd, given by the holder's Unix socket (SOCK_SEQPACKET) in `/dev/shm/mindstream-UID/`, whose name
   is the first 8 bytes of the handle in hexadecimal. `t` and the other 16 get `h` and the memfd (SCM_RIGHTS), or `g`
   when it is gone; `d` and the same 16 say that it was read. A receiver that cannot have it asks again without
   `mailbox`.

A built model travels in the same way: `model.built.ask` gets its signed manifest, and `blob.pull` names in `snapshot`
the BLAKE3 of that manifest's bytes, in hexadecimal. Then every file is checked by its SHA-256, and against the card.
So does a basis, after `model.basis.ask`.

Chunks may come twice and in any order. A cut transfer goes on with the bitmap of what is here. A snapshot's chunks are
sealed; all but the last of a part have {chunk:,} bytes.

## Limits
{limits}

## Messages
Types in the order of the table.
"""


def protocol_page() -> str:
    """docs/protocol.md."""
    fields = Fields()
    topic_rows = [
        (
            f"`{row.shown}`",
            row.about,
            f"{row.max_bytes:,}",
            row.format,
            "yes" if row.retain else "",
            f"{row.every_s:g} s" if row.every_s else "",
        )
        for row in TOPICS
    ]
    parts = [
        _PROTOCOL.format(
            generated=GENERATED,
            root=ROOT,
            max_packet=MAX_PACKET_BYTES,
            envelope=fields.table(codec._RawEnvelope, explained_by=codec.Envelope),
            topics=table(("topic", "what", "limit in bytes", "format", "retained", "at least every"), topic_rows),
            resend=RESEND_FIRST_S,
            margin=MARGIN_S,
            kept=MAX_KEPT_BYTES,
            errors=_errors(),
            digest=DIGEST_BYTES,
            signature=SIGNATURE_BYTES,
            salt=SALT_BYTES,
            domain_entry=_shown(DOMAIN_ENTRY),
            domain_manifest=_shown(DOMAIN_MANIFEST),
            domain_built=_shown(DOMAIN_BUILT_MODEL),
            domain_variant=_shown(DOMAIN_VARIANT),
            domain_basis=_shown(DOMAIN_BASIS),
            domain_pool=_shown(DOMAIN_POOL_ENTRY),
            domain_group=_shown(DOMAIN_GROUP_KEY),
            pool_entry=fields.table(PoolEntry),
            group_grant=fields.table(GroupGrant),
            entry_header=fields.table(EntryHeader),
            memory_content=fields.table(MemoryContent),
            manifest=fields.table(SnapshotManifest),
            private=fields.table(PrivatePart),
            wrap=fields.table(KeyWrap),
            statement=fields.table(Statement),
            built_manifest=fields.table(BuiltManifest),
            basis_manifest=fields.table(BasisManifest),
            variant_certificate=fields.table(VariantCertificate),
            hlc_ms=64 - COUNTER_BITS,
            hlc_counter=COUNTER_BITS,
            drift=MAX_DRIFT_MS / 1000,
            credit=CREDIT_CHUNKS,
            stall=STALL_S,
            chunk=MAX_CHUNK_BYTES,
            limits=_limits(),
        )
    ]
    structs_of_rows = {row.struct.__name__ for row in MESSAGES.values()}
    for row in MESSAGES.values():
        lines = [
            f"### `{row.type}`",
            f'<a id="{row.struct.__name__.lower()}"></a>{plain(inspect.getdoc(row.struct) or "")}',
        ]
        if row.ask is not None:
            marks = "; durable" * row.ask.durable + "; of the node's own programs only" * row.ask.own_node_only
            lines.append(
                f"\nAsked of `{row.ask.service}` as `{row.ask.verb}`, answered with `{row.ask.reply}`; time to live at"
                f" most {row.ask.ttl_max_ms:,} ms{marks}."
            )
        lines.append(f"\nOn `{row.topic.shown}`, at most {row.max_bytes:,} bytes.\n")
        lines.append(fields.table(row.struct))
        parts.append("\n".join(lines))
    # Structs inside messages name others in turn: the list grows while it is walked.
    parts.append("## Structures inside messages\n")
    done: set[str] = set()
    while todo := [name for name in fields.named if name not in done and name not in structs_of_rows]:
        for name in todo:
            done.add(name)
            struct = next(getattr(module, name) for module in SOURCES if hasattr(module, name))
            parts.append(f"### {name}\n{plain(inspect.getdoc(struct) or '')}\n\n{fields.table(struct)}")
    return "\n".join(parts)


def _shown(domain: bytes) -> str:
    return domain.decode().replace("\0", "\\0")


def _errors() -> str:
    """Every error's code, the one above it, and its line in the tree of protocol/errors.py."""
    meanings = dict(re.findall(r"(?:[├└]── |^ {4})(\w+)(?: +(\S.*))?$", errors.__doc__ or "", re.MULTILINE))
    rows = [(f"`{MindstreamError.code}`", "", "anything else")]

    def walk(kind: type[MindstreamError]) -> None:
        for child in kind.__subclasses__():
            if child.__module__ == errors.__name__:
                rows.append((f"`{child.code}`", f"`{kind.code}`", meanings[child.__name__]))
                walk(child)

    walk(MindstreamError)
    return table(("code", "is a", "meaning"), rows)


def _limits() -> str:
    rows = [
        ("packet", f"{MAX_PACKET_BYTES:,} bytes, with topic and properties"),
        ("payload", "by topic and by type: the tables"),
        ("header of a log entry", f"{MAX_HEADER_BYTES:,} bytes"),
        ("content of a log entry", f"{MAX_CONTENT_BYTES:,} bytes"),
        ("`seq` of a log entry", f"{MAX_SEQ:,}"),
        ("`hlc` of a log entry", f"{MAX_HLC:,}"),
        ("manifest", f"{MAX_MANIFEST_BYTES:,} bytes"),
        ("chunk", f"{MAX_CHUNK_BYTES:,} bytes"),
        ("all chunks of a snapshot", f"{MAX_SNAPSHOT_BYTES:,} bytes"),
        ("all files of a built model", f"{MAX_MODEL_BYTES:,} bytes, {MAX_FILES} files"),
        ("basis of a model", f"{MAX_BASIS_BYTES:,} bytes"),
        ("topic", "512 characters"),
    ]
    return table(("what", "at most"), rows)
