"""The message table: every type that crosses the bus, its fields, where it is said and who answers it.

One struct a type, plain msgpack maps on the wire. Fields carry units in their names; unknown fields are
ignored; from the first release on a struct only grows (new fields have defaults). The table at the end,
``MESSAGES``, is what everything else is derived from.
"""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from protocol import topics
from protocol.basis_manifest import SignedBasis
from protocol.built_manifest import SignedBuiltManifest
from protocol.entries import SignedEntry
from protocol.errors import ErrorInfo, UnknownType
from protocol.group_key import SignedGrant
from protocol.ids import NAME_PATTERN
from protocol.manifest import SignedManifest
from protocol.pool import SignedPoolEntry
from protocol.provenance import SignedStatement
from protocol.topics import KIB, Topic
from protocol.variants import SignedVariantCertificate, Variant

_END = r"$(?!\n)"
"""The end of a text. Python's ``$`` alone also stands before a last line feed, JSON Schema's does not."""
Name = Annotated[str, Meta(pattern=f"^{NAME_PATTERN.pattern}{_END}")]
Share = Annotated[float, Meta(ge=0, le=1)]
SnapshotId = Annotated[str, Meta(pattern=f"^[0-9a-f]{{64}}{_END}")]
MaybeSnapshotId = Annotated[str, Meta(pattern=f"^([0-9a-f]{{64}})?{_END}")]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]

# --- presence -------------------------------------------------------------------------------------------


class NodeState(msgspec.Struct):
    """Whether a node is there. JSON, retained; the broker says ``lost`` for a node that vanishes."""

    state: str
    """``init`` (until every service has said how it is), ``ready`` (from then on; what is amiss is the reason),
    ``sleeping`` (the machine is suspended), ``disconnected`` (said goodbye) or ``lost`` (said by the broker)."""
    time_us: int
    """When this was written, Unix microseconds."""
    fingerprint: str = ""
    """The node's public key, for people to compare. Trust comes from `mindstream keys trust` alone."""
    version: str = ""
    """Mindstream's version."""
    services: list[str] = []
    """Services that run here, without those that are given up."""
    pid: int = 0
    """Process id of the node's presence service, which says this."""
    reason: str = ""
    """Which of its services are not ``ready``, and why."""
    sealing_key: str = ""
    """What is meant for this node alone is encrypted to this: ``x25519:``, and in base32, lowercase without padding,
    the X25519 public key, 32 bytes, and its Ed25519 signature by the node, 64 bytes."""


class ServiceState(msgspec.Struct):
    """How a service is. JSON, retained; the broker says ``lost`` for one that vanishes."""

    state: str
    """``init``, ``ready``, ``degraded``, ``failed``, ``disconnected`` or ``lost``."""
    time_us: int
    """When this was written, Unix microseconds."""
    reason: str = ""
    """What it lacks, when not ``ready``."""
    pid: int = 0
    queue: int = 0
    """Messages received and not yet handled."""
    counters: dict[str, int] = {}
    """Events since start: handled, dropped, refused and so on; each counter's name says what."""
    details: dict[str, Any] = {}
    """What the service wants shown: model, log length, clock skew."""


class NodeSleep(msgspec.Struct):
    """This machine is about to be suspended: the node says ``sleeping`` and leaves the broker in good order, so that
    it is not taken for lost. Answered once that is said."""


class NodeWake(msgspec.Struct):
    """This machine is awake again. Not needed after a real suspend, which the node notices by its clocks."""


class NodeNow(msgspec.Struct):
    """What the node says of itself now."""

    state: str
    """As in ``node.state``."""


class PresenceHeardAsk(msgspec.Struct):
    """Ask a node's presence service whom it hears, and who has fallen silent."""


class Speaker(msgspec.Struct):
    """A node, or a service of one, as another node hears it."""

    node: Name
    service: str
    """Empty: the node itself."""
    state: str
    """What it said last."""
    liveness: str
    """``live``, ``late`` (silent for three of its declared intervals), ``silent`` (for ten), ``gone`` (it said goodbye,
    sleeps, was given up, or the broker said that it is lost) or ``unknown`` (only a retained word was heard as yet)."""
    silent_s: float
    """Since its last word, or since it is listened to, by the hearer's monotonic clock."""
    skew_ms: float | None = None
    """How far its clock was ahead of the hearer's when it spoke, the message's way included; nil: not known."""


class PresenceHeard(msgspec.Struct):
    """Whom a node hears."""

    speakers: list[Speaker]


class HomeAssistantDevice(msgspec.Struct, omit_defaults=True):
    """A node's health as a device of Home Assistant: the payload of its device discovery (2024.11 and later), which
    says what the fields mean. Empty and retained: the device is gone."""

    dev: dict[str, Any]
    """The device: identifiers, name, version."""
    o: dict[str, Any]
    """Origin: who made this message."""
    cmps: dict[str, dict[str, Any]]
    """Components: one entity each, by a name that is its own within the device."""
    avty: list[dict[str, Any]] = []
    """Where the device's availability is said."""
    avty_mode: str = "latest"
    qos: int = 0


class Event(msgspec.Struct, omit_defaults=True):
    """Something a person may need to know: a drop, a loss, a refusal, a stop."""

    name: Name
    """What happened, such as ``dead-letter`` or ``unknown-peer``."""
    severity: str
    """``info``, ``warning`` or ``error``."""
    text: str
    """One sentence for a person."""
    count: int = 1
    """How many times since the last event of this name (events of one name are at most one a second)."""
    error: ErrorInfo | None = None


# --- memory ---------------------------------------------------------------------------------------------


class MemoryPut(msgspec.Struct, omit_defaults=True):
    """Remember a text. Answered once it is committed to disk."""

    text: Annotated[str, Meta(min_length=1, max_length=64 * KIB)]
    role: str = "note"
    """Who said it: ``user``, ``model``, ``sensor`` or ``note``."""
    conversation: str = ""
    scope: Name = "everyone"
    """``everyone`` or ``private`` (never leaves this node)."""
    id: str = ""
    """UUIDv7 chosen by the asker: a put repeated with the same id is stored once. Empty: the envelope's id."""
    time_us: Count = 0
    """When it was said or seen, Unix microseconds; 0: now."""


class MemoryStored(msgspec.Struct):
    """The put is on disk (synchronous=FULL) under this number."""

    id: str
    node: Name
    scope: Name
    log_id: str
    seq: int
    already: bool = False
    """It was stored before under this id."""


class MemoryRecall(msgspec.Struct, omit_defaults=True):
    """Find memories by text."""

    query: Annotated[str, Meta(min_length=1, max_length=16 * KIB)]
    limit: Annotated[int, Meta(ge=1, le=200)] = 10


class MemoryHit(msgspec.Struct):
    """One memory found."""

    id: str
    node: str
    """Origin node."""
    seq: int
    text: str
    role: str
    conversation: str
    time_us: int
    score: float
    """BM25, greater is better; comparable within one answer only."""


class MemoryRecalled(msgspec.Struct):
    """Answer to a recall, best first."""

    hits: list[MemoryHit]
    took_ms: float
    truncated: int = 0
    """Hits left out because the answer would have been above its limit."""


class MemoryVectorAsk(msgspec.Struct):
    """Ask a node what it holds, origin by origin."""


class OriginHave(msgspec.Struct):
    """How far a node holds one origin without a gap."""

    node: Name
    scope: Name
    log_id: str
    seq: int
    hash: Digest
    """Hash of entry ``seq``."""


class MemoryVector(msgspec.Struct):
    """All that a node holds and may be told of; private scopes never appear."""

    origins: list[OriginHave]


class MemoryHave(msgspec.Struct):
    """Digest of a node's vector: equal digests hold equal entries."""

    digest: Annotated[bytes, Meta(min_length=64, max_length=64)]
    """BLAKE3, 64 bytes, over the sorted vector."""
    entries: int
    """Entries covered by the vector."""


class MemoryRepair(msgspec.Struct):
    """Ask a node for a range of one origin's entries."""

    node: Name
    scope: Name
    log_id: str
    first_seq: Annotated[int, Meta(ge=1)]
    last_seq: Annotated[int, Meta(ge=1)]


class MemoryEntries(msgspec.Struct):
    """Entries, whole and signed: new ones on the log's topic, a range as the answer to a repair."""

    entries: list[SignedEntry]
    more: bool = False
    """The range asked for was longer: ask again from the next sequence number."""


class MemoryMerge(msgspec.Struct):
    """Hand entries of other nodes to this node's store. Only this node's own services may ask it."""

    entries: list[SignedEntry]


class MemoryMerged(msgspec.Struct):
    """What became of the entries."""

    stored: int = 0
    already: int = 0
    waiting: int = 0
    """Kept aside until the gap before them is filled."""
    refused: int = 0


# --- model ----------------------------------------------------------------------------------------------


class ChatMessage(msgspec.Struct):
    """One message of a conversation."""

    role: str
    """``system``, ``user`` or ``assistant``."""
    content: Annotated[str, Meta(max_length=256 * KIB)]


class ModelGenerate(msgspec.Struct, omit_defaults=True):
    """Let the model speak. Answered when it has; its tokens come meanwhile on ``model/run/{run}/token``.

    Without ``messages``, ``prompt`` and ``prompt_tokens`` the conversation goes on from its pending token, with the
    sampler as it stands. At most one of the three is given.
    """

    conversation: Name
    messages: list[ChatMessage] = []
    """New messages of this turn, after those that the conversation holds."""
    prompt: str = ""
    """Plain text to go on from, without a chat template; a new conversation's beginning."""
    prompt_tokens: list[int] = []
    """The same in token ids of the model."""
    run: Name = ""
    """UUIDv7 of the run, chosen by the asker, so that it can subscribe first. Left out: the envelope's id."""
    max_new_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] = 256
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    """0 is greedy."""
    top_k: Annotated[int, Meta(ge=0)] = 0
    """0 is off."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Count = 0
    stop: list[str] = []
    """Texts that end the answer; not part of it."""
    ignore_eos: bool = False
    """Go on past the end-of-sequence token: for measuring."""
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Only tokens at least this likely relative to the likeliest; 0 is off."""
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    """Tokens of the context are made less likely by this factor; 1 is off."""
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    """So many of the likeliest tokens are said with each token."""
    json_schema: str = ""
    """The answer is JSON that this JSON Schema accepts; ``{}`` is any JSON. It is whole when the run ends with
    ``stop``, and cut where it ends with ``length`` or ``cancelled``. Without new messages an answer that was cut goes
    on under its schema."""
    priority: Literal["person", "background"] = "person"
    """Somebody waits for the answer, or nobody does: it then gives way to those that somebody waits for."""
    on_overflow: Literal["refuse", "window"] = "refuse"
    """A prompt longer than the context is refused, or its oldest part is left out (and that is said)."""
    keep: bool = True
    """False: the conversation is not kept on disk, and goes when its memory is wanted."""
    salience: Share = 0.0
    """How much depends on this answer. Where checkpoints of key moments are on, more of them are taken, and they are
    kept for longer."""
    held_messages: Count = 0
    """The conversation must hold just so many messages already, or the ask is refused with ``conversation_unknown``:
    for one who knows the history, and sends it whole where it was forgotten. 0: whatever it holds."""


class ModelCancel(msgspec.Struct):
    """Stop a run after its current token; or a save, a prune or a transcode, of which nothing is kept then."""

    run: Name


class ModelCancelled(msgspec.Struct):
    """Whether there was such a run to stop."""

    found: bool


class TokenChance(msgspec.Struct):
    """A token that might have come."""

    token: int
    text: str
    logprob: float
    """Natural logarithm of its probability under the model, before temperature."""


class RunToken(msgspec.Struct, omit_defaults=True):
    """One generated token."""

    index: int
    """From 0 within the run."""
    token: int
    text: str
    """What the token adds to the text; empty while a character is incomplete."""
    logprob: float
    """Natural logarithm of the token's probability under the model, before temperature."""
    entropy: float
    """Of the model's distribution, nats."""
    top: list[TokenChance] = []
    """The likeliest ones, best first, when ``top_logprobs`` asked for them."""


class Usage(msgspec.Struct, omit_defaults=True):
    """What a run cost."""

    prompt_tokens: int
    """Of the whole conversation before the answer."""
    cached_tokens: int
    """Of those, not read again: they were in the KV cache."""
    completion_tokens: int
    ttft_ms: float
    """From the start of the work to the first token."""
    tokens_per_s: float
    """Of decoding, without prefill."""
    queued_ms: float = 0.0
    """From the ask to the start of the work."""
    shared_tokens: int = 0
    """Of the cached ones, those that another conversation had read."""
    dropped_tokens: int = 0
    """Of the prompt, left out because it was longer than the context."""
    batch_mean: float = 0.0
    """Conversations that were decoded together, on average over this run's tokens."""
    energy_j: float | None = None
    """Of the device during the run; absent when no sensor measures it."""
    energy_sensor: str = ""
    """Which one measured it."""
    pooled_tokens: int = 0
    """Of the cached ones, those that came from the site's pool."""
    pooled_from: list[str] = []
    """The nodes that had read them."""
    pooled_how: str = ""
    """``exact`` (they are bit for bit what this node would have computed) or ``close`` (of other numerics)."""


class RunDone(msgspec.Struct, omit_defaults=True):
    """The end of a run."""

    run: str
    conversation: str
    text: str
    tokens: list[int]
    finish_reason: str
    """``stop`` (end of sequence or a stop text), ``length``, ``cancelled`` or ``error``."""
    usage: Usage | None = None
    error: ErrorInfo | None = None


class ModelEmbed(msgspec.Struct):
    """Make vectors of texts, with the node's embedding model."""

    texts: Annotated[list[Annotated[str, Meta(max_length=64 * KIB)]], Meta(max_length=512)]


class ModelEmbedded(msgspec.Struct):
    """The vectors, each of length 1: their dot product is the texts' cosine similarity."""

    model: str
    dimensions: Count
    vectors: bytes
    """float32, little-endian, one text after another."""
    tokens: Count
    """Read, of all texts."""
    truncated: list[int] = []
    """Indexes of the texts that were longer than the model reads: of these only the beginning counts."""


Label = Annotated[str, Meta(max_length=200)]
CodecName = Literal["auto", "raw", "lossless", "int8", "rotated4", "transform", "tokens"]


class SnapshotWishes(msgspec.Struct, omit_defaults=True):
    """How a snapshot is to be encoded: how small, and how faithful."""

    codec: CodecName = "raw"
    """A rung; ``auto``: the strongest whose self-test meets the fidelity asked; ``tokens``: no KV, token ids alone."""
    most_kl: Annotated[float, Meta(ge=0)] = 0.02
    """Mean divergence, nats a token, that a rung which is not exact may have; a rung that has more is not taken."""
    least_top1: Share = 0.94
    """Share of tested positions whose likeliest token must be the same."""
    test: bool = True
    """Whether its fidelity is measured on this very state, and the next token's logits are kept with it, which takes
    time; else the rung's usual figures will do."""
    prune: Annotated[str, Meta(max_length=200)] = ""
    """Which positions are kept, such as ``last:512``, ``window:4,1000``, ``heavy:0.5``, ``anchors:0.5``; empty: all."""
    budget_ratio: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    """So many times smaller than 16 bits a number, by pruning and codec together, whichever keeps most: ``most_kl`` and
    ``least_top1`` are then of both together. 0: as above."""


class ModelSnapshot(msgspec.Struct, omit_defaults=True):
    """Save a conversation's state; announced when it is on disk."""

    conversation: Name
    label: Label = ""
    """Names a checkpoint: the conversation can be restored from it, and branched, as ``conversation@label``."""
    wishes: SnapshotWishes | None = None
    """None: raw, exact, all of it."""
    run: Name = ""
    """UUIDv7 chosen by the asker, who subscribes first: how far it is is said under it. Left out: it is not said."""
    durable: bool = True
    """Answered when a power cut cannot take it any more; else when it can be fetched, and synced behind that."""


class SnapshotTranscode(msgspec.Struct, omit_defaults=True):
    """Make another snapshot of one that is here: encoded otherwise, or pruned. The first stays."""

    snapshot: SnapshotId
    wishes: SnapshotWishes
    label: Label = ""
    run: Name = ""
    """UUIDv7 chosen by the asker, who subscribes first: how far it is is said under it. Left out: it is not said."""
    durable: bool = True
    """As in ModelSnapshot."""


class SnapshotFidelity(msgspec.Struct, omit_defaults=True):
    """How faithful a snapshot is that is not exact, as its certificate says."""

    tested_tokens: int
    mean_kl: float | None = None
    """Nats a token."""
    top1: float | None = None
    measured: list[str] = []
    """Which figures were measured on this snapshot; any other is the rung's usual one."""


class SnapshotSaved(msgspec.Struct, omit_defaults=True):
    """A snapshot is on this node's disk, whole."""

    snapshot: str
    """Its id: BLAKE3 of the manifest, 64 hex digits."""
    conversation: str
    model: str
    tokens: int
    size_bytes: int
    took_ms: float
    codec: str = "raw"
    """The rung that was taken."""
    label: str = ""
    kept_tokens: int = 0
    """Positions whose KV is kept, where it was pruned."""
    ratio: float = 0.0
    """How many times smaller than 16 bits a number; 0 where there is no KV."""
    fidelity: SnapshotFidelity | None = None
    """None where it is exact."""
    tried: list[str] = []
    """Rungs that were tried before and why they were not taken, a line each."""


class ModelResume(msgspec.Struct, omit_defaults=True):
    """Fetch a snapshot from a node and make a conversation of it."""

    snapshot: MaybeSnapshotId
    """Empty: the conversation ``source`` of the holder as it is now, which saves it as suits the way."""
    holder: Name
    """Node to pull it from; this node itself for a local one."""
    conversation: str = ""
    """Name for the conversation here; empty: the one in the manifest. Another name than there is a branch."""
    source: str = ""
    """The holder's conversation, where no snapshot is named; with ``@label``, its checkpoint of that name."""
    way: Literal["auto", "chunks", "tokens"] = "auto"
    """``chunks``: its KV wherever it can be used; ``tokens``: read again; ``auto``: what is predicted to be quicker."""
    lossy: bool = False
    """Whether KV will do that is not exact; how close it is its certificate says."""
    most_kl: Annotated[float, Meta(ge=0)] = 0.02
    least_top1: Share = 0.94
    keep: bool = True
    """Whether it is kept on disk, as one of the node's conversations; else it goes when its memory is wanted."""
    run: Name = ""
    """UUIDv7 chosen by the asker, who subscribes first: how far it is is said under it. Left out: it is not said."""
    explain: bool = False
    """Whether the answer has what was weighed: some KB, which a slow link feels."""


class HandoffPhases(msgspec.Struct, omit_defaults=True):
    """Where the time of a handoff goes."""

    ask_ms: float = 0.0
    """Asking the holder what there is, and its manifest."""
    save_ms: float = 0.0
    """At the holder: copying, encoding, sealing."""
    transfer_ms: float = 0.0
    """Chunks on their way, and the codec's basis where it is not here."""
    decode_ms: float = 0.0
    """Decrypting, decoding, and taking into the engine."""
    prefill_ms: float = 0.0
    """Reading tokens again."""


class HandoffOption(msgspec.Struct, omit_defaults=True):
    """One way in which a conversation could have been taken over."""

    way: str
    """A rung's name, or ``tokens``."""
    size_bytes: int
    predicted_ms: float | None
    """Until the next token can be generated; None where it was not possible."""
    phases: HandoffPhases | None = None
    """Predicted; those that run beside each other add up to more than the whole."""
    reason: str = ""
    """Why it was not taken, or could not be; where the figures come from for the one that was."""


class ModelResumed(msgspec.Struct, omit_defaults=True):
    """The conversation lives here now."""

    conversation: str
    how: str
    """``exact`` (the KV cache as it was: what comes next is what would have come), ``lossy`` (KV of a codec that is not
    exact, or pruned), ``variant`` (KV that another variant of the model computed, under a certificate) or
    ``recomputed`` (read again from its tokens)."""
    reason: str
    """Why it is so."""
    tokens: int
    size_bytes: int
    transfer_ms: float
    restore_ms: float
    snapshot: str = ""
    """That was resumed."""
    way: str = ""
    """A rung's name, or ``tokens``."""
    options: list[HandoffOption] = []
    """What was weighed against each other, the one that was taken first; where that was asked for."""
    phases: HandoffPhases | None = None
    """What happened, as measured."""
    logits: str = ""
    """The first step against the logits in the snapshot: ``equal`` (bit for bit), ``close`` (the same likeliest token)
    or ``other``; empty: not compared."""
    logits_kl: float | None = None
    """Divergence of the first step from those logits, nats, where they were compared."""
    fidelity: SnapshotFidelity | None = None
    """Of KV that is not exact."""


class HandoffOfferAsk(msgspec.Struct, omit_defaults=True):
    """Ask what a node could send of a conversation as it is now, or of a snapshot."""

    conversation: str
    """Empty where a snapshot is named."""
    sealing_key: Annotated[str, Meta(max_length=256)] = ""
    """The asker's, as its node's state has it."""
    snapshot: MaybeSnapshotId = ""
    """Of the holder's: what it could be transcoded to is offered."""


class OfferedRung(msgspec.Struct, omit_defaults=True):
    """One way in which a holder would encode a conversation's KV."""

    codec: str
    exact: bool
    size_bytes: int
    """By the rung's usual ratio."""
    save_ms: float | None
    """What copying (of a snapshot: decoding), encoding and sealing is expected to take there, with caution; None where
    it was never measured."""
    mean_kl: float = 0.0
    """Usual, nats a token."""
    top1: float = 1.0
    """Usual."""
    basis: bytes = b""
    """Digest of the basis that its decoder needs; empty for none."""
    basis_bytes: int = 0


class HandoffOffer(msgspec.Struct, omit_defaults=True):
    """What a node could send of a conversation."""

    tokens: int
    """The pending one included."""
    kv_bytes: int
    """Of its KV in memory."""
    rungs: list[OfferedRung]
    took_ms: float
    """What making this offer took: the rest of the asker's waiting was the link's."""
    packed: bytes = b""
    """Of a conversation: a snapshot of its token ids alone, so that they can be read without asking again. A
    SignedManifest in msgpack, and that in zlib's format (RFC 1950), its key wrapped for the asker alone."""


class LinkProbe(msgspec.Struct):
    """Ask for bytes, to see how fast they come."""

    size_bytes: Annotated[int, Meta(ge=0, le=512 * KIB)]


class LinkProbed(msgspec.Struct):
    """So many random bytes."""

    data: Annotated[bytes, Meta(max_length=512 * KIB)]


class ModelStep(msgspec.Struct, omit_defaults=True):
    """One step of a conversation, by hand: what could come next, after taking tokens, or going back.

    It begins as the conversation of that name that is in memory, as a fork of ``source``, or with ``text``."""

    conversation: Name
    source: str = ""
    """The conversation to fork, at the first step."""
    take: Annotated[list[Count], Meta(max_length=4096)] = []
    """Token ids to append, the first being what comes next."""
    text: Annotated[str, Meta(max_length=64 * KIB)] = ""
    """Text to append, where no tokens are given."""
    back: Annotated[int, Meta(ge=0)] = 0
    """So many tokens are taken back first."""
    top: Annotated[int, Meta(ge=1, le=100)] = 10
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    """Of the sampler of one that begins with a text; 0 takes the likeliest."""
    seed: Count = 0
    end: bool = False
    """Let it go: unless it was kept before, it is gone."""


class ModelStepped(msgspec.Struct, omit_defaults=True):
    """Where the conversation stands now."""

    conversation: str
    tokens: int
    """In it, the pending one included."""
    text: str
    """The end of it, at most 400 characters, special tokens written out."""
    choices: list[TokenChance]
    """What could come next, the likeliest first; empty when the context is full."""
    entropy: float
    """Of the next token's distribution, nats."""
    sampled: int
    """The token that its sampler would take; -1 when the context is full."""
    kept: int = 0
    """So many tokens can be taken back."""
    ended: bool = False
    """Whether the last token ends the answer."""
    note: str = ""
    """What else there is to know of this step."""


class SnapshotProgress(msgspec.Struct):
    """How far a save or a fetch is; what is lost of it is not said again."""

    phase: str
    """What is being done: ``wait`` (for another save), ``read`` (its tokens, into a cache), ``look`` (at what a pruner
    needs), ``test`` (how faithful a codec is), ``write``, ``fetch``."""
    done_bytes: Count
    """Of ``read``, ``look`` and ``test``: tokens."""
    total_bytes: Count
    """0: not known."""


class SnapshotMoment(msgspec.Struct, omit_defaults=True):
    """One point of a conversation that it can return to."""

    snapshot: str
    time_us: int
    tokens: int
    """In the conversation then."""
    label: str = ""
    why: str = ""
    """``asked``, or what made it a key moment: ``undecided``, ``unexpected``, ``salient``."""
    surprise: float | None = None
    """0..1, a percentile of this conversation's own."""
    salience: float | None = None
    codec: str = ""
    size_bytes: int = 0
    own_bytes: int = 0
    """Of it that no other snapshot here shares."""
    text: str = ""
    """What was being said, at most 200 characters; its last token is the one that decided something."""
    parent: str = ""
    """Id of the snapshot that the conversation was saved as, or resumed from, before it."""
    conversation: str = ""
    """Of which it is, where that is another one, from which this one was branched."""
    entropy: float | None = None
    """Of the model's distribution at a key moment, nats."""
    logprob: float | None = None
    """Of the token that was chosen there, natural logarithm."""
    alternatives: list[TokenChance] = []
    """The likeliest tokens there: the last token has not been read, any of them may take its place."""


class SnapshotTimelineAsk(msgspec.Struct):
    """Ask for the points that a conversation can return to."""

    conversation: Name


class SnapshotTimeline(msgspec.Struct):
    """The points that a conversation can return to, the oldest first."""

    conversation: str
    moments: Annotated[list[SnapshotMoment], Meta(max_length=1000)]


class SnapshotAnnounce(msgspec.Struct):
    """A snapshot that the speaker holds."""

    snapshot: str
    conversation: str
    model: str
    tokens: int
    size_bytes: int


class SnapshotManifestAsk(msgspec.Struct):
    """Ask for a snapshot's signed manifest, with its key wrapped for the asker if the holder trusts it."""

    snapshot: SnapshotId
    sealing_key: Annotated[str, Meta(max_length=256)] = ""
    """The asker's, as its node's state has it."""


class PoolHave(msgspec.Struct):
    """Which blocks a node holds in its pool. Said whole, retained: it takes the place of what it said before."""

    key_id: Digest
    """Of the group key that the names below are made with."""
    names: Annotated[bytes, Meta(max_length=64 * KIB)]
    """8 bytes for each entry: keyed BLAKE3 of the speaker's name, a zero byte and the entry's name. So nobody without
    the group key learns what was read, nor that two nodes have read the same."""


MAX_ANNOUNCED = 8192
"""Entries that a node announces: those worth most."""
MAX_POOL_BLOCKS = 256
"""Blocks of one prompt that are asked for at one time."""


class PoolWitness(msgspec.Struct):
    """Whether the speaker agrees with an entry of the pool, having read the same prefix itself."""

    statement: SignedStatement
    """Of the kind ``witnessed``, its ``snapshot`` being the entry's id; ``details`` has ``agrees`` (a boolean), ``how``
    (``exact`` or ``close``), ``error`` and ``tolerance``."""


class GroupKeyAsk(msgspec.Struct):
    """Ask a node for the site's group key, every version."""

    sealing_key: Annotated[str, Meta(max_length=256)] = ""
    """The asker's, as its node's state has it."""


class GroupKeys(msgspec.Struct):
    """What the node grants to the asker; nothing to one that it does not trust."""

    grants: Annotated[list[SignedGrant], Meta(max_length=64)]
    """The newest version first."""


class PoolEntriesAsk(msgspec.Struct):
    """Ask for the entries of blocks that a node announced."""

    names: Annotated[bytes, Meta(min_length=16, max_length=4 * KIB)]
    """16 bytes for each block: its prefix address, keyed with the group key that the entry is sealed with."""


class PoolEntries(msgspec.Struct):
    """The entries that the node holds of these, in their order, with what witnesses said of them."""

    entries: list[SignedPoolEntry]
    bundle: SnapshotId
    """Their chunks, one entry after another, are pulled under this id: BLAKE3 of the entries' ids, joined."""


class ModelBuiltAsk(msgspec.Struct, omit_defaults=True):
    """Ask for the signed manifest of a built model that a node holds; its chunks are then pulled as a snapshot's."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    """Of the model."""
    precision: Literal["int8", "int4", "fp16", "fp32"] = "int8"
    """Of its weights."""
    provider: Literal["cpu", "cuda"] = "cpu"
    """ONNX Runtime provider that its graph is for."""


class ModelBasisAsk(msgspec.Struct, omit_defaults=True):
    """Ask for the signed manifest of a model's basis, for the codec ``transform``; its chunks are then pulled."""

    model: Annotated[str, Meta(min_length=1, max_length=200)]
    """Its name, for people."""
    tokenizer: Digest
    config: Digest
    weights: Annotated[bytes, Meta(max_length=32)] = b""
    """Digests of the asker's model. All builds of one model have a basis in common: other weights are no hindrance."""
    adapters: Annotated[list[Digest], Meta(max_length=64)] = []
    basis: Annotated[bytes, Meta(max_length=32)] = b""
    """BLAKE3 of the one that is wanted; empty: any of that model."""


class VariantCertificateAsk(msgspec.Struct):
    """Ask for a node's certificate of what KV of one variant of a model does on another."""

    source: Variant
    """Whose KV."""
    target: Variant
    """Which model uses it."""


class ModelCertify(msgspec.Struct):
    """Measure what KV of another variant does on the model that runs here; the certificate is kept."""

    source: Annotated[str, Meta(min_length=1, max_length=1000)]
    """``transformers``, the precision of a built model, or the folder of an adapter on this node."""


class ModelCertified(msgspec.Struct):
    """A variant certificate, in short."""

    source: str
    target: str
    computed_layers: int | None
    """First layers that must be computed again for the usual fidelity; None: it is not reached."""
    layers: int
    mean_kl: float
    """Nats a token, with so much computed; with nothing where the fidelity is not reached."""
    worst_kl: float
    """Of the text that moved most."""
    top1: float
    took_ms: float
    recent_tokens: int = 0
    """Last positions that must be computed again as well."""


class BlobPull(msgspec.Struct):
    """Let a holder send chunks of what it holds on ``blob/{transfer}``; sent again for more credit."""

    snapshot: SnapshotId
    """The snapshot's id, or the built model's or basis': BLAKE3 of its manifest, 64 hex digits."""
    transfer: Name
    """UUIDv7 chosen by the receiver, who subscribes first."""
    have: Annotated[bytes, Meta(max_length=64 * KIB)]
    """Bitmap, one bit a chunk, least significant first: chunks that the receiver holds already."""
    credit: Annotated[int, Meta(ge=1, le=256)]
    """Chunks that may be sent now, from the first that is not in ``have``."""
    mailbox: Annotated[bytes, Meta(max_length=32)] = b""
    """That the receiver reads the mailbox folder of its host: the first 16 bytes of BLAKE3, keyed with the folder's
    secret, of ``mindstream/v1/mailbox\\0`` and ``transfer``. A holder that reads the same folder may send letters."""


class BlobPulling(msgspec.Struct):
    """What the holder is about to send."""

    sending: int
    missing: list[int] = []
    """Indexes of chunks that the holder has lost."""


class BlobChunk(msgspec.Struct):
    """One chunk; verified against the signed manifest before anything is made of it."""

    index: Count
    data: Annotated[bytes, Meta(max_length=512 * KIB)]


class BlobLetter(msgspec.Struct):
    """Chunks that are on the receiver's host already, in sealed memory that the handle names; verified like any."""

    handle: Annotated[bytes, Meta(min_length=24, max_length=24)]
    """Names the holder's socket in the mailbox folder (8 bytes) and the letter (16): for one reader, and for 30 s."""
    indexes: Annotated[list[Count], Meta(min_length=1, max_length=64)]
    """Of the chunks, which lie in it one after another, in this order."""


# --- the table ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AskRow:
    """That a message is a question or command, and who answers it with what."""

    service: str
    verb: str
    reply: str
    """Type of the answer; an error is answered with type ``error``."""
    ttl_max_ms: int = 600_000
    """The longest time to live that is accepted."""
    durable: bool = False
    """Written to the service's command journal before it is acknowledged, and carried out after a crash."""
    own_node_only: bool = False
    """Refused when another node asks."""


@dataclass(frozen=True)
class MessageRow:
    """One row: a type, its struct, and where it is said."""

    type: str
    struct: builtins.type[msgspec.Struct]
    topic: Topic
    max_bytes: int
    """Limit of the whole payload, at most the topic's."""
    ask: AskRow | None = None


def _row(
    type: str,
    struct: type[msgspec.Struct],
    topic: Topic,
    *,
    max_bytes: int | None = None,
    ask: AskRow | None = None,
) -> MessageRow:
    return MessageRow(type, struct, topic, max_bytes or topic.max_bytes, ask)


def _presence(verb: str, reply: str = "node.now") -> AskRow:
    return AskRow("presence", verb, reply, ttl_max_ms=60_000, own_node_only=True)


_ROWS: tuple[MessageRow, ...] = (
    _row("error", ErrorInfo, topics.REPLY, max_bytes=16 * KIB),
    # presence
    _row("node.state", NodeState, topics.STATE),
    _row("service.state", ServiceState, topics.SERVICE_STATE),
    _row("node.sleep", NodeSleep, topics.ASK, max_bytes=4 * KIB, ask=_presence("sleep")),
    _row("node.wake", NodeWake, topics.ASK, max_bytes=4 * KIB, ask=_presence("wake")),
    _row("node.now", NodeNow, topics.REPLY, max_bytes=4 * KIB),
    _row(
        "presence.heard.ask", PresenceHeardAsk, topics.ASK, max_bytes=4 * KIB, ask=_presence("heard", "presence.heard")
    ),
    _row("presence.heard", PresenceHeard, topics.REPLY),
    _row("home_assistant.device", HomeAssistantDevice, topics.HOME_ASSISTANT),
    _row("event", Event, topics.EVENT),
    # memory
    _row(
        "memory.put",
        MemoryPut,
        topics.ASK,
        max_bytes=272 * KIB,
        ask=AskRow("memory_store", "put", "memory.stored"),
    ),
    _row("memory.stored", MemoryStored, topics.REPLY, max_bytes=4 * KIB),
    _row(
        "memory.recall",
        MemoryRecall,
        topics.ASK,
        max_bytes=72 * KIB,
        ask=AskRow("memory_store", "recall", "memory.recalled"),
    ),
    _row("memory.recalled", MemoryRecalled, topics.REPLY),
    _row(
        "memory.vector.ask",
        MemoryVectorAsk,
        topics.ASK,
        max_bytes=4 * KIB,
        ask=AskRow("memory_store", "have", "memory.vector"),
    ),
    _row("memory.vector", MemoryVector, topics.REPLY),
    _row("memory.have", MemoryHave, topics.MEMORY_HAVE),
    _row("memory.entries", MemoryEntries, topics.MEMORY_LOG),
    _row(
        "memory.repair",
        MemoryRepair,
        topics.ASK,
        max_bytes=4 * KIB,
        ask=AskRow("memory_store", "repair", "memory.range"),
    ),
    _row("memory.range", MemoryEntries, topics.REPLY),
    _row(
        "memory.merge",
        MemoryMerge,
        topics.ASK,
        ask=AskRow("memory_store", "merge", "memory.merged", own_node_only=True),
    ),
    _row("memory.merged", MemoryMerged, topics.REPLY, max_bytes=4 * KIB),
    # model
    _row("model.token", RunToken, topics.RUN_TOKEN),
    _row("model.done", RunDone, topics.RUN_DONE),
    _row(
        "model.generate",
        ModelGenerate,
        topics.ASK,
        max_bytes=1000 * KIB,
        ask=AskRow("model_runner", "generate", "model.answer", ttl_max_ms=3_600_000, durable=True),
    ),
    _row("model.answer", RunDone, topics.REPLY, max_bytes=512 * KIB),
    _row(
        "model.cancel",
        ModelCancel,
        topics.ASK,
        max_bytes=4 * KIB,
        ask=AskRow("model_runner", "cancel", "model.cancelled"),
    ),
    _row("model.cancelled", ModelCancelled, topics.REPLY, max_bytes=4 * KIB),
    _row(
        "model.embed",
        ModelEmbed,
        topics.ASK,
        ask=AskRow("model_runner", "embed", "model.embedded"),
    ),
    _row("model.embedded", ModelEmbedded, topics.REPLY),
    _row(
        "model.snapshot",
        ModelSnapshot,
        topics.ASK,
        max_bytes=4 * KIB,
        ask=AskRow("model_runner", "snapshot", "snapshot.saved"),
    ),
    _row(
        "snapshot.transcode",
        SnapshotTranscode,
        topics.ASK,
        max_bytes=4 * KIB,
        ask=AskRow("model_runner", "transcode", "snapshot.saved"),
    ),
    _row("snapshot.progress", SnapshotProgress, topics.SNAPSHOT_PROGRESS),
    _row("snapshot.saved", SnapshotSaved, topics.REPLY, max_bytes=8 * KIB),
    _row(
        "snapshot.timeline.ask",
        SnapshotTimelineAsk,
        topics.ASK,
        max_bytes=4 * KIB,
        ask=AskRow("model_runner", "timeline", "snapshot.timeline"),
    ),
    _row("snapshot.timeline", SnapshotTimeline, topics.REPLY),
    _row(
        "model.step",
        ModelStep,
        topics.ASK,
        max_bytes=128 * KIB,
        ask=AskRow("model_runner", "step", "model.stepped"),
    ),
    _row("model.stepped", ModelStepped, topics.REPLY, max_bytes=64 * KIB),
    _row(
        "handoff.offer.ask",
        HandoffOfferAsk,
        topics.ASK,
        max_bytes=4 * KIB,
        ask=AskRow("model_runner", "offer", "handoff.offer"),
    ),
    _row("handoff.offer", HandoffOffer, topics.REPLY),
    _row(
        "link.probe",
        LinkProbe,
        topics.ASK,
        max_bytes=4 * KIB,
        ask=AskRow("model_runner", "probe", "link.probed"),
    ),
    _row("link.probed", LinkProbed, topics.REPLY, max_bytes=516 * KIB),
    _row(
        "model.resume",
        ModelResume,
        topics.ASK,
        max_bytes=4 * KIB,
        ask=AskRow("model_runner", "resume", "model.resumed"),
    ),
    _row("model.resumed", ModelResumed, topics.REPLY, max_bytes=32 * KIB),
    # snapshots and blobs
    _row("snapshot.announce", SnapshotAnnounce, topics.SNAPSHOT_ANNOUNCE),
    _row(
        "snapshot.manifest.ask",
        SnapshotManifestAsk,
        topics.ASK,
        max_bytes=4 * KIB,
        ask=AskRow("model_runner", "manifest", "snapshot.manifest"),
    ),
    _row("snapshot.manifest", SignedManifest, topics.REPLY),
    _row("pool.have", PoolHave, topics.POOL_HAVE),
    _row("pool.witness", PoolWitness, topics.POOL_WITNESS),
    _row(
        "group.key.ask",
        GroupKeyAsk,
        topics.ASK,
        max_bytes=4 * KIB,
        ask=AskRow("model_runner", "group_key", "group.keys"),
    ),
    _row("group.keys", GroupKeys, topics.REPLY, max_bytes=128 * KIB),
    _row(
        "pool.entries.ask",
        PoolEntriesAsk,
        topics.ASK,
        max_bytes=8 * KIB,
        ask=AskRow("model_runner", "pool_entries", "pool.entries"),
    ),
    _row("pool.entries", PoolEntries, topics.REPLY),
    _row(
        "model.built.ask",
        ModelBuiltAsk,
        topics.ASK,
        max_bytes=4 * KIB,
        ask=AskRow("model_runner", "built", "model.built"),
    ),
    _row("model.built", SignedBuiltManifest, topics.REPLY),
    _row(
        "model.basis.ask",
        ModelBasisAsk,
        topics.ASK,
        max_bytes=8 * KIB,
        ask=AskRow("model_runner", "basis", "model.basis"),
    ),
    _row("model.basis", SignedBasis, topics.REPLY),
    _row(
        "model.variant.ask",
        VariantCertificateAsk,
        topics.ASK,
        max_bytes=16 * KIB,
        ask=AskRow("model_runner", "variant", "model.variant"),
    ),
    _row("model.variant", SignedVariantCertificate, topics.REPLY, max_bytes=256 * KIB),
    _row(
        "model.certify",
        ModelCertify,
        topics.ASK,
        max_bytes=4 * KIB,
        ask=AskRow("model_runner", "certify", "model.certified", ttl_max_ms=3_600_000, own_node_only=True),
    ),
    _row("model.certified", ModelCertified, topics.REPLY, max_bytes=8 * KIB),
    _row(
        "blob.pull",
        BlobPull,
        topics.ASK,
        max_bytes=72 * KIB,
        ask=AskRow("model_runner", "pull", "blob.pulling"),
    ),
    _row("blob.pulling", BlobPulling, topics.REPLY, max_bytes=256 * KIB),
    _row("blob.chunk", BlobChunk, topics.BLOB),
    _row("blob.letter", BlobLetter, topics.BLOB, max_bytes=4 * KIB),
)

MESSAGES: dict[str, MessageRow] = {row.type: row for row in _ROWS}
"""Every message type, by its name on the wire."""

_BY_STRUCT: dict[type[msgspec.Struct], MessageRow] = {}
for _each in _ROWS:
    _BY_STRUCT.setdefault(_each.struct, _each)


def row_of(message: msgspec.Struct | type[msgspec.Struct], *, type_name: str = "") -> MessageRow:
    """The row of a message or of its class (its first, when a struct has two types). Raises UnknownType."""
    if type_name:
        found = MESSAGES.get(type_name)
    else:
        found = _BY_STRUCT.get(message if isinstance(message, type) else type(message))
    if found is None:
        raise UnknownType(f"looking up {type_name or message!r}: no row of the message table names it", field="type")
    return found
