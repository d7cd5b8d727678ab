"""The messages that the golden bytes are made of: one of every type, every field given, all values fixed.

A new row of the message table needs a value here; a new field of a struct needs one in its value.
"""

from __future__ import annotations

from hashlib import sha256
from typing import NamedTuple
from unittest import mock

import msgspec
from blake3 import blake3

from protocol import codec, entries
from protocol.basis_manifest import SignedBasis, sign_basis
from protocol.built_manifest import BuiltFile, BuiltManifest, SignedBuiltManifest, seal_built
from protocol.entries import GENESIS, MemoryContent, Origin, SignedEntry, entry_hash, seal
from protocol.errors import ErrorInfo
from protocol.group_key import GroupKey, grant_key
from protocol.identity import Identity, digest
from protocol.layout import RAW, Block, LayerLayout, Part, PartPlace
from protocol.manifest import (
    Certificate,
    ModelDigests,
    NumericsFingerprint,
    PrivatePart,
    SignedManifest,
    SnapshotManifest,
    prefix_addresses,
    seal_manifest,
    seal_private,
    snapshot_id,
)
from protocol.messages import (
    MESSAGES,
    BlobChunk,
    BlobLetter,
    BlobPull,
    BlobPulling,
    ChatMessage,
    Event,
    GroupKeyAsk,
    GroupKeys,
    HandoffOffer,
    HandoffOfferAsk,
    HandoffOption,
    HandoffPhases,
    HomeAssistantDevice,
    LinkProbe,
    LinkProbed,
    MemoryEntries,
    MemoryHave,
    MemoryHit,
    MemoryMerge,
    MemoryMerged,
    MemoryPut,
    MemoryRecall,
    MemoryRecalled,
    MemoryRepair,
    MemoryStored,
    MemoryVector,
    MemoryVectorAsk,
    MessageRow,
    ModelBasisAsk,
    ModelBuiltAsk,
    ModelCancel,
    ModelCancelled,
    ModelCertified,
    ModelCertify,
    ModelEmbed,
    ModelEmbedded,
    ModelGenerate,
    ModelResume,
    ModelResumed,
    ModelSnapshot,
    ModelStep,
    ModelStepped,
    NodeNow,
    NodeSleep,
    NodeState,
    NodeWake,
    OfferedRung,
    OriginHave,
    PoolEntries,
    PoolEntriesAsk,
    PoolHave,
    PoolWitness,
    PresenceHeard,
    PresenceHeardAsk,
    RunDone,
    RunToken,
    ServiceState,
    SnapshotAnnounce,
    SnapshotFidelity,
    SnapshotManifestAsk,
    SnapshotMoment,
    SnapshotProgress,
    SnapshotSaved,
    SnapshotTimeline,
    SnapshotTimelineAsk,
    SnapshotTranscode,
    SnapshotWishes,
    Speaker,
    TokenChance,
    Usage,
    VariantCertificateAsk,
)
from protocol.pool import PoolEntry, PoolPart, SignedPoolEntry, entry_id, sign_entry, witness
from protocol.provenance import add_statement
from protocol.sealing import DataKey, wrap_key
from protocol.variants import (
    LayerEffect,
    Reuse,
    SignedVariantCertificate,
    Variant,
    VariantCertificate,
    seal_variant,
)

TIME_US = 1_775_000_000_123_456
ENVELOPE_ID = "019d463e-967b-7000-8000-000000000001"
ASK_ID = "019d463e-967b-7000-8000-000000000002"
MEMORY_ID = "019d463e-967b-7000-8000-000000000003"
SECOND_MEMORY_ID = "019d463e-967b-7000-8000-000000000004"
LOG_ID = "019d463e-967b-7000-8000-000000000005"
RUN_ID = "019d463e-967b-7000-8000-000000000006"
TRANSFER_ID = "019d463e-967b-7000-8000-000000000007"

SEED = bytes(range(32))
"""The private key of node ``sprout`` in these files, and nowhere else."""
SPROUT = Identity("sprout", SEED)
SALT = bytes(range(0x40, 0x40 + entries.SALT_BYTES))
ORIGIN = Origin("sprout", "everyone", LOG_ID)


def _entry(seq: int, prev: bytes, identifier: str, content: MemoryContent) -> SignedEntry:
    with mock.patch("os.urandom", lambda size: SALT[:size]):
        return seal(
            SPROUT,
            content,
            origin=ORIGIN,
            seq=seq,
            prev=prev,
            hlc=(TIME_US // 1000 << 16) | seq,
            id=identifier,
            clock_synced=True,
        )


FIRST_CONTENT = MemoryContent(
    text="The spare key is under the blue flower pot. Ключ. 鍵。",
    time_us=TIME_US,
    role="user",
    conversation="garden",
    source="sprout/cli",
)
FIRST = _entry(1, GENESIS, MEMORY_ID, FIRST_CONTENT)
SECOND = _entry(
    2, entry_hash(FIRST.header), SECOND_MEMORY_ID, MemoryContent(text="Tomatoes need staking.", time_us=TIME_US)
)
ERASED = SignedEntry(header=SECOND.header, signature=SECOND.signature)
"""The second entry once its content is erased: header and signature still verify."""

VECTOR = [OriginHave("sprout", "everyone", LOG_ID, 2, entry_hash(SECOND.header))]


def vector_digest(origins: list[OriginHave]) -> bytes:
    """The digest on ``memory/have``, written down a second time, as docs/protocol.md gives it."""
    hasher = blake3()
    for each in sorted(origins, key=lambda each: (each.node, each.scope, each.log_id)):
        hasher.update(msgspec.msgpack.encode([each.node, each.scope, each.log_id, each.seq, each.hash]))
    return hasher.digest(length=64)


CHUNK = bytes(range(256)) * 2
DATA_KEY = DataKey(bytes(range(64, 96)))
"""Of the golden snapshot; whoever has ``SEED`` finds it in the wrap."""
MODEL = ModelDigests(weights=digest(b"weights"), tokenizer=digest(b"tokenizer"), config=digest(b"config"))
TOKENS = b"".join(token.to_bytes(4, "little") for token in (504, 3575, 260))
ADDRESSES = prefix_addresses(MODEL, TOKENS, 2)
KV_FULL, KV_SLIDING = CHUNK, CHUNK[:256]
"""Keys and values of two positions and of one, a head of 64 numbers of 16 bits."""
SEALED_FULL = bytes(DATA_KEY.seal(PartPlace("full", 0).role(ADDRESSES, RAW, 0), KV_FULL))
SEALED_SLIDING = bytes(DATA_KEY.seal(PartPlace("sliding", 0).role(ADDRESSES, RAW, 0), KV_SLIDING))
MANIFEST = SnapshotManifest(
    version=2,
    model="smollm2-135m-instruct",
    digests=MODEL,
    creator="sprout",
    created_us=TIME_US,
    conversation="garden",
    fingerprint=NumericsFingerprint(
        engine="transformers",
        engine_version="torch 2.13.0+cpu transformers 5.23.0",
        device="cpu",
        instruction_set="avx512_bf16",
        dtype="bfloat16",
        threads=2,
        chunk_schedule="multiples of 256",
        batch_mode="deterministic",
    ),
    kv_dtype="bfloat16",
    layers=[
        LayerLayout(kind="full", kv_heads=1, head_dim=64, tokens=2, seen_tokens=2),
        LayerLayout(kind="sliding", kv_heads=1, head_dim=64, tokens=1, seen_tokens=2, window_tokens=2),
    ],
    codec=RAW,
    cached_tokens=2,
    blocks=[
        Block(
            tokens=2,
            full=Part(encoded_bytes=len(KV_FULL), digests=digest(SEALED_FULL)),
            sliding=Part(encoded_bytes=len(KV_SLIDING), digests=digest(SEALED_SLIDING)),
        )
    ],
    key_id=DATA_KEY.id,
    sealed=seal_private(
        DATA_KEY,
        PrivatePart(
            addresses=b"".join(ADDRESSES),
            sampler={"temperature": 0.5, "seed": 7},
            state={"messages": [{"role": "user", "content": "Where is the key?"}]},
            tokens=TOKENS,
        ),
    ),
    total_bytes=len(SEALED_FULL) + len(SEALED_SLIDING),
    parent=digest(b"parent"),
    certificate=Certificate(
        tested_tokens=1,
        mean_kl=0.0,
        top1=1.0,
        measured=["mean_kl"],
    ),
)
SIGNED_MANIFEST: SignedManifest = seal_manifest(SPROUT, MANIFEST)
SIGNED_MANIFEST.wraps = [
    wrap_key(
        SPROUT,
        DATA_KEY,
        "sprout",
        SPROUT.sealing.public_key,
        created_us=TIME_US,
        ephemeral_secret=bytes(range(96, 128)),
    )
]
SIGNED_MANIFEST.provenance = add_statement(SPROUT, [], digest(SIGNED_MANIFEST.manifest), "created", time_us=TIME_US)
SNAPSHOT = snapshot_id(SIGNED_MANIFEST)

GROUP_KEY = GroupKey(bytes(range(128, 160)), version=2, by="sprout", created_us=TIME_US)
GRANT = grant_key(
    SPROUT,
    GROUP_KEY,
    "sprout",
    SPROUT.sealing.public_key,
    wrap=wrap_key(
        SPROUT,
        GROUP_KEY.data_key,
        "sprout",
        SPROUT.sealing.public_key,
        created_us=TIME_US,
        ephemeral_secret=bytes(range(160, 192)),
    ),
)
POOL_ADDRESS = digest(b"a block of 256 tokens")
POOL_CHUNK = bytes(GROUP_KEY.data_key.seal(PartPlace("full", 0).role([POOL_ADDRESS], RAW, 0), KV_FULL))
POOL_ENTRY = PoolEntry(
    version=1,
    model=MANIFEST.model,
    digests=MODEL,
    creator="sprout",
    created_us=TIME_US,
    fingerprint=MANIFEST.fingerprint,
    kv_dtype="bfloat16",
    codec=RAW,
    key_id=GROUP_KEY.id,
    name=GROUP_KEY.name(POOL_ADDRESS),
    parent=bytes(16),
    block=0,
    cost_ms=850,
    full=PoolPart(encoded_bytes=len(KV_FULL), digests=digest(POOL_CHUNK), content=GROUP_KEY.content(KV_FULL)),
)
SIGNED_POOL_ENTRY: SignedPoolEntry = sign_entry(SPROUT, POOL_ENTRY)
WITNESS = witness(SPROUT, entry_id(SIGNED_POOL_ENTRY), True, "close", 0.0125, 0.1, time_us=TIME_US)
SIGNED_POOL_ENTRY.witnesses = [WITNESS]
FIDELITY = SnapshotFidelity(tested_tokens=128, mean_kl=0.0035, top1=0.97, measured=["mean_kl", "top1"])

BUILT_FILES = {"card.json": b"{}", "model.onnx": CHUNK}
BUILT_MANIFEST = BuiltManifest(
    version=1,
    creator="sprout",
    model="smollm2-135m-instruct",
    folder="smollm2-135m-instruct-0123456789ab-int8-cpu-b2",
    build=2,
    card=sha256(b"{}").digest(),
    files=[BuiltFile(name, len(data), sha256(data).digest()) for name, data in BUILT_FILES.items()],
    total_bytes=sum(map(len, BUILT_FILES.values())),
    chunks=b"".join(map(digest, BUILT_FILES.values())),
)
SIGNED_BUILT_MANIFEST: SignedBuiltManifest = seal_built(SPROUT, BUILT_MANIFEST)
SIGNED_BASIS: SignedBasis = sign_basis(SPROUT, "smollm2-135m-instruct", MANIFEST.digests, b"basis")
VARIANTS = (
    Variant.of(MANIFEST.digests, MANIFEST.fingerprint),
    Variant(msgspec.structs.replace(MANIFEST.digests, adapters=(digest(b"adapter"),)), "transformers", "bfloat16"),
)
SIGNED_VARIANT: SignedVariantCertificate = seal_variant(
    SPROUT,
    VariantCertificate(
        created_us=TIME_US,
        creator="sprout",
        layers=[LayerEffect(0.0021, 0.97), LayerEffect(0.0009, 0.985)],
        model="smollm2-135m-instruct",
        prefix_tokens=512,
        reuses=[Reuse(0, 0.0048, 0.0061, 0.958), Reuse(0, 0.0021, 0.0027, 0.971, 64), Reuse(1, 0.0009, 0.0012, 0.985)],
        source=VARIANTS[0],
        target=VARIANTS[1],
        tested_tokens=384,
        texts=6,
    ),
)

ERROR = ErrorInfo(
    code="conversation_unknown",
    message="looking for the conversation 'garden': this node has none of that name",
    hint="`mindstream status` lists them",
    topic="mindstream/v1/tomato/ask/sprout/model_runner/snapshot",
    type="model.snapshot",
    field="conversation",
    reason="unknown",
)
DONE = RunDone(
    run=RUN_ID,
    conversation="garden",
    text="Under the pot.",
    tokens=[19141, 260, 2025, 30],
    finish_reason="error",
    usage=Usage(
        prompt_tokens=31,
        cached_tokens=12,
        completion_tokens=4,
        ttft_ms=41.5,
        tokens_per_s=28.25,
        queued_ms=3.5,
        shared_tokens=8,
        dropped_tokens=2,
        batch_mean=2.5,
        energy_j=1.25,
        energy_sensor="package-0",
        pooled_tokens=4,
        pooled_from=["tomato"],
        pooled_how="exact",
    ),
    error=ERROR,
)

VALUES: dict[str, msgspec.Struct] = {
    "error": ERROR,
    # presence
    "node.state": NodeState(
        state="ready",
        time_us=TIME_US,
        fingerprint=SPROUT.fingerprint,
        version="0.1.0",
        services=["memory_store", "sync_bridge"],
        pid=4242,
        reason="model_runner is failed: torch not installed",
        sealing_key=SPROUT.sealing_key,
    ),
    "node.sleep": NodeSleep(),
    "node.wake": NodeWake(),
    "node.now": NodeNow(state="sleeping"),
    "presence.heard.ask": PresenceHeardAsk(),
    "presence.heard": PresenceHeard(
        speakers=[
            Speaker(node="tomato", service="memory_store", state="ready", liveness="late", silent_s=31.5, skew_ms=-8.25)
        ]
    ),
    "home_assistant.device": HomeAssistantDevice(
        dev={"ids": ["mindstream-sprout"], "name": "Mindstream sprout", "sw": "0.1.0"},
        o={"name": "mindstream", "sw": "0.1.0"},
        cmps={
            "state": {
                "p": "sensor",
                "unique_id": "mindstream_sprout_state",
                "state_topic": "mindstream/v1/sprout/state",
                "value_template": "{{ value_json.state }}",
            }
        },
        avty=[{"topic": "mindstream/v1/sprout/state", "value_template": "{{ value_json.state }}"}],
        avty_mode="any",
        qos=1,
    ),
    "service.state": ServiceState(
        state="degraded",
        time_us=TIME_US,
        reason="the disk is full",
        pid=4243,
        queue=3,
        counters={"handled": 1200, "dropped.reply": 1},
        details={"entries": 2, "clock_skew_ms": -12.5, "waiting": None},
    ),
    "event": Event(
        name="dead-letter",
        severity="error",
        text="sprout/memory_store: memory.entries from tomato/memory_store failed 3 times",
        count=2,
        error=ERROR,
    ),
    # memory
    "memory.put": MemoryPut(
        text=FIRST_CONTENT.text,
        role="user",
        conversation="garden",
        scope="private",
        id=MEMORY_ID,
        time_us=TIME_US,
    ),
    "memory.stored": MemoryStored(id=MEMORY_ID, node="sprout", scope="private", log_id=LOG_ID, seq=1, already=True),
    "memory.recall": MemoryRecall(query="where is the spare key", limit=3),
    "memory.recalled": MemoryRecalled(
        hits=[
            MemoryHit(
                id=MEMORY_ID,
                node="sprout",
                seq=1,
                text=FIRST_CONTENT.text,
                role="user",
                conversation="garden",
                time_us=TIME_US,
                score=2.75,
            )
        ],
        took_ms=1.5,
        truncated=4,
    ),
    "memory.vector.ask": MemoryVectorAsk(),
    "memory.vector": MemoryVector(origins=VECTOR),
    "memory.have": MemoryHave(digest=vector_digest(VECTOR), entries=2),
    "memory.entries": MemoryEntries(entries=[FIRST, SECOND], more=True),
    "memory.repair": MemoryRepair(node="sprout", scope="everyone", log_id=LOG_ID, first_seq=1, last_seq=2),
    "memory.range": MemoryEntries(entries=[FIRST, ERASED], more=True),
    "memory.merge": MemoryMerge(entries=[FIRST, SECOND]),
    "memory.merged": MemoryMerged(stored=1, already=2, waiting=3, refused=4),
    # model
    "model.token": RunToken(
        index=5,
        token=2025,
        text=" pot",
        logprob=-0.125,
        entropy=1.5,
        top=[TokenChance(token=2025, text=" pot", logprob=-0.125)],
    ),
    "model.done": DONE,
    "model.generate": ModelGenerate(
        conversation="garden",
        messages=[ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Where is it?")],
        run=RUN_ID,
        max_new_tokens=64,
        temperature=0.5,
        top_k=40,
        top_p=0.75,
        seed=7,
        stop=["\n\n"],
        ignore_eos=True,
        prompt="The key lies",
        prompt_tokens=[504, 1542],
        min_p=0.0625,
        repetition_penalty=1.25,
        top_logprobs=3,
        json_schema="{}",
        priority="background",
        on_overflow="window",
        keep=False,
        salience=0.5,
        held_messages=3,
    ),
    "model.answer": DONE,
    "model.cancel": ModelCancel(run=RUN_ID),
    "model.cancelled": ModelCancelled(found=True),
    "model.embed": ModelEmbed(texts=["Where is the key?", "Under the pot."]),
    "model.embedded": ModelEmbedded(
        model="all-minilm-l6-v2",
        dimensions=2,
        vectors=bytes.fromhex("0000803f00000000000000000000803f"),
        tokens=13,
        truncated=[1],
    ),
    "model.snapshot": ModelSnapshot(
        conversation="garden",
        label="before the frost",
        wishes=SnapshotWishes(codec="auto", most_kl=0.01, least_top1=0.95, prune="last:512", budget_ratio=10.0),
        run=RUN_ID,
        durable=False,
    ),
    "snapshot.transcode": SnapshotTranscode(
        snapshot=SNAPSHOT, wishes=SnapshotWishes(codec="rotated4"), label="small", run=RUN_ID, durable=False
    ),
    "snapshot.timeline.ask": SnapshotTimelineAsk(conversation="garden"),
    "snapshot.timeline": SnapshotTimeline(
        conversation="garden",
        moments=[
            SnapshotMoment(
                snapshot=SNAPSHOT,
                time_us=TIME_US,
                tokens=3,
                label="before the frost",
                why="undecided",
                surprise=0.97,
                salience=0.5,
                codec="lossless",
                size_bytes=len(CHUNK),
                own_bytes=len(CHUNK),
                text="under the pot",
                parent=SNAPSHOT,
                conversation="garden-2",
                entropy=1.5,
                logprob=-2.25,
                alternatives=[TokenChance(token=260, text=" the", logprob=-0.25)],
            )
        ],
    ),
    "model.step": ModelStep(
        conversation="step-1",
        source="garden",
        take=[260, 11],
        text="under",
        back=2,
        top=3,
        temperature=0.5,
        seed=7,
        end=True,
    ),
    "snapshot.progress": SnapshotProgress(phase="fetch", done_bytes=1000, total_bytes=len(CHUNK)),
    "handoff.offer.ask": HandoffOfferAsk("", sealing_key=SPROUT.sealing_key, snapshot=SNAPSHOT),
    "handoff.offer": HandoffOffer(
        tokens=31,
        kv_bytes=1_382_400,
        rungs=[
            OfferedRung("raw", True, 1_382_400, 12.5),
            OfferedRung("transform", False, 98_304, None, 0.0125, 0.953125, bytes(range(32)), 66_000_000),
        ],
        took_ms=3.5,
        packed=bytes(range(32)),
    ),
    "link.probe": LinkProbe(2_048),
    "link.probed": LinkProbed(bytes(range(16))),
    "model.stepped": ModelStepped(
        conversation="step-1",
        tokens=5,
        text="The key is under",
        choices=[TokenChance(token=260, text=" the", logprob=-0.125)],
        entropy=0.75,
        sampled=260,
        kept=2,
        ended=True,
        note="3 tokens were read again",
    ),
    "snapshot.saved": SnapshotSaved(
        snapshot=SNAPSHOT,
        conversation="garden",
        model="smollm2-135m-instruct",
        tokens=3,
        size_bytes=len(CHUNK),
        took_ms=12.5,
        codec="int8",
        label="before the frost",
        kept_tokens=2,
        ratio=1.94,
        fidelity=FIDELITY,
        tried=["rotated4: mean KL 0.0300 nats, 0.0100 at most"],
    ),
    "model.resume": ModelResume(
        snapshot=SNAPSHOT,
        holder="sprout",
        conversation="garden-2",
        source="garden@before the frost",
        way="chunks",
        lossy=True,
        most_kl=0.01,
        least_top1=0.95,
        keep=False,
        run=RUN_ID,
        explain=True,
    ),
    "model.resumed": ModelResumed(
        conversation="garden-2",
        how="exact",
        reason="weights and numerics are equal",
        tokens=3,
        size_bytes=len(CHUNK),
        transfer_ms=80.5,
        restore_ms=9.25,
        snapshot=SNAPSHOT,
        way="raw",
        options=[
            HandoffOption(
                way="raw",
                size_bytes=len(CHUNK),
                predicted_ms=85.0,
                phases=HandoffPhases(transfer_ms=75.0, decode_ms=10.0),
                reason="the quickest",
            ),
            HandoffOption(way="transform", size_bytes=0, predicted_ms=None, reason="not exact"),
        ],
        phases=HandoffPhases(transfer_ms=80.5, decode_ms=9.25),
        logits="equal",
        logits_kl=0.0,
        fidelity=FIDELITY,
    ),
    # snapshots and blobs
    "snapshot.announce": SnapshotAnnounce(
        snapshot=SNAPSHOT, conversation="garden", model="smollm2-135m-instruct", tokens=3, size_bytes=len(CHUNK)
    ),
    "snapshot.manifest.ask": SnapshotManifestAsk(snapshot=SNAPSHOT, sealing_key=SPROUT.sealing_key),
    "snapshot.manifest": SIGNED_MANIFEST,
    "model.built.ask": ModelBuiltAsk(name="smollm2-135m-instruct", precision="int4", provider="cuda"),
    "model.built": SIGNED_BUILT_MANIFEST,
    "pool.have": PoolHave(key_id=GROUP_KEY.id, names=GROUP_KEY.short_name("sprout", POOL_ENTRY.name)),
    "pool.witness": PoolWitness(statement=WITNESS),
    "group.key.ask": GroupKeyAsk(sealing_key=SPROUT.sealing_key),
    "group.keys": GroupKeys(grants=[GRANT]),
    "pool.entries.ask": PoolEntriesAsk(names=POOL_ENTRY.name),
    "pool.entries": PoolEntries(
        entries=[SIGNED_POOL_ENTRY], bundle=digest(bytes.fromhex(entry_id(SIGNED_POOL_ENTRY))).hex()
    ),
    "model.basis.ask": ModelBasisAsk(
        model="smollm2-135m-instruct",
        tokenizer=MANIFEST.digests.tokenizer,
        config=MANIFEST.digests.config,
        weights=MANIFEST.digests.weights,
        adapters=[digest(b"adapter")],
        basis=digest(b"basis"),
    ),
    "model.basis": SIGNED_BASIS,
    "model.variant.ask": VariantCertificateAsk(source=VARIANTS[0], target=VARIANTS[1]),
    "model.variant": SIGNED_VARIANT,
    "model.certify": ModelCertify(source="int8"),
    "model.certified": ModelCertified(
        source=str(VARIANTS[0]),
        target=str(VARIANTS[1]),
        computed_layers=0,
        layers=1,
        mean_kl=0.0048,
        worst_kl=0.0061,
        top1=0.958,
        took_ms=61000.5,
        recent_tokens=32,
    ),
    "blob.pull": BlobPull(snapshot=SNAPSHOT, transfer=TRANSFER_ID, have=b"\x05", credit=16, mailbox=bytes(range(16))),
    "blob.pulling": BlobPulling(sending=1, missing=[3]),
    "blob.chunk": BlobChunk(index=0, data=SEALED_FULL),
    "blob.letter": BlobLetter(handle=bytes(range(24)), indexes=[0, 2]),
}


class Golden(NamedTuple):
    """One message as it crosses the bus."""

    row: MessageRow
    topic: str
    payload: bytes


_LEVELS = {"target": "sprout", "asker": "tomato", "client": "cli", "run": RUN_ID, "transfer": TRANSFER_ID}


def golden(row: MessageRow) -> Golden:
    """The message of one row, by today's encoder. ``tomato`` asks, ``sprout`` answers and says the rest."""
    speaker = "tomato" if row.ask else "sprout"
    service = (
        "model_runner"
        if row.type.startswith(("model", "snapshot", "blob", "pool", "group", "error"))
        else "memory_store"
    )
    levels = _LEVELS | {"node": speaker, "service": row.ask.service if row.ask else service}
    names = {name: levels[name] for name in row.topic.params if name != "verb"}
    if row.ask:
        names["verb"] = row.ask.verb
    is_reply = row.topic.name == "reply"
    payload = codec.encode(
        VALUES[row.type],
        source="tomato/cli" if row.ask else f"sprout/{service}",
        row=row,
        id=ENVELOPE_ID,
        correlation=ASK_ID if is_reply else "",
        reply_to="cli" if row.ask else "",
        ttl_ms=30_000 if row.ask else 0,
        time_us=TIME_US,
    )
    return Golden(row, row.topic.format_topic(**names), payload)


def all_golden() -> dict[str, Golden]:
    """Every row's message, by type. Raises KeyError naming a type that has no value here."""
    return {row.type: golden(row) for row in MESSAGES.values()}
