"""A built model fetched from a peer over a real broker: whole and verified, or refused and not there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: make install (extra `onnx`)")

from broker.embedded import EmbeddedBroker
from edge import model_fetch
from edge.blobs import BlobSender
from edge.bus import Bus
from edge.config import ModelConfig, load_config
from edge.keys import Peers, load_or_create_identity
from edge.mailbox import Mailbox
from edge.model_build import write_card
from edge.model_cards import ANOTHER_VERSION, BUILD, CARD_NAME, Card, CardSource, Measured, built_models, built_name
from edge.model_fetch import Fetched, PartialModel, fetch
from edge.model_registry import ModelFile, read_record
from edge.model_share import BuiltFolder, BuiltShelf
from edge.service import Context
from edge.snapshot_store import SnapshotStore
from protocol.built_manifest import BuiltFile, BuiltManifest, SignedBuiltManifest, open_built, seal_built
from protocol.errors import (
    BadSignature,
    BlobError,
    MalformedMessage,
    MindstreamError,
    ModelUnavailable,
    NotFound,
    StorageError,
    UnknownPeer,
)
from protocol.identity import Identity, Keyring, digest
from protocol.manifest import MAX_CHUNK_BYTES
from protocol.messages import BlobChunk, BlobPull, ModelBuiltAsk
from services.model_runner.engines import Packages, choose
from services.model_runner.onnx_engine import OnnxEngine
from services.model_runner.service import ModelRunner
from tests.support.waiting import DEADLINE_S, wait_for

MODEL = "little"
EXTRA = "vocabulary.bin"
EXTRA_CHUNKS = 24
"""The small model has few chunks: a file more, so that a transfer can be cut."""
MALLORY = Identity("mallory", bytes(32))
CHECKOUT = Path(__file__).resolve().parents[3]


def make_built(folder: Path, cache: Path, precision: str = "int8") -> Path:
    """The built model in ``folder``, put into ``cache`` with a card."""
    identity = sha256(b"the source").hexdigest()
    target = cache / built_name(MODEL, identity, precision, "cpu")
    shutil.copytree(folder, target)
    # Two chunks of one content in different places, and a short one at the end.
    (target / EXTRA).write_bytes(bytes(2 * MAX_CHUNK_BYTES) + os.urandom((EXTRA_CHUNKS - 3) * MAX_CHUNK_BYTES) + b"end")
    files = [(path.name, path.read_bytes()) for path in sorted(target.iterdir())]
    card = Card(
        build=BUILD,
        model=MODEL,
        source=CardSource("here", "Apache-2.0", "LlamaForCausalLM", identity, ()),
        precision=precision,
        provider="cpu",
        method="by a test",
        versions={},
        files=tuple(ModelFile(name, len(data), sha256(data).hexdigest()) for name, data in files),
        measured=Measured("transformers float32", (), 0.5, 0.97),
        build_s=1.0,
        time_us=1,
    )
    write_card(target, card)
    return target


@dataclass
class Site:
    """``tomato``'s model runner, without a model of its own, on a broker; ``sprout`` asks."""

    url: str
    runner: ModelRunner
    folder: Path
    """Of tomato's built model."""
    bus: Bus
    """Of sprout."""
    identity: Identity
    """Of tomato."""

    @property
    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def fetch(self, cache: Path, holder: str = "tomato", **options: Any) -> Fetched:
        keyring = Keyring({"tomato": self.identity.fingerprint, "mallory": MALLORY.fingerprint})
        return fetch(self.bus, options.pop("keyring", keyring), holder, MODEL, cache=cache, **options)


@pytest.fixture(scope="module")
def site(built_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("tomato")
    folder = make_built(built_models["llama"], root / "mindstream" / "models")
    with ExitStack() as cleanup:
        patch = cleanup.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("XDG_CACHE_HOME", str(root))
        patch.delenv("CACHE_DIRECTORY", raising=False)
        broker = cleanup.enter_context(EmbeddedBroker())
        path = root / "tomato.toml"
        path.write_text(
            f'[node]\nname = "tomato"\ndata_dir = "{root / "data"}"\n[broker]\nurl = "{broker.url}"\n'
            f'[model]\nname = "{root / "no-such-model"}"\n'
        )
        identity = load_or_create_identity(root / "data", "tomato")
        peers = Peers(root / "data", identity)
        runner = ModelRunner(Context(load_config(path, {}), identity, peers, root / "data" / "runner", broker.url))
        thread = threading.Thread(target=runner.run, name="tomato/model_runner")
        thread.start()

        def end() -> None:
            runner.stop()
            thread.join(DEADLINE_S)
            assert not thread.is_alive()

        cleanup.callback(end)
        bus = cleanup.enter_context(Bus(url=broker.url, node="sprout", client="cli-1"))
        wait_for(lambda: runner.blob_bus.connected and runner.bus.connected, "the runner is on the broker")
        yield Site(broker.url, runner, folder, bus, identity)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Of sprout; made by a fetch that comes so far."""
    return tmp_path / "xdg" / "mindstream" / "models"


@pytest.fixture
def change(site: Site) -> Iterator[Callable[[Callable[[BlobChunk], BlobChunk | None]], None]]:
    """``change(how)``: what tomato sends becomes what ``how`` makes of it; None is lost. All goes over the bus."""
    say = site.runner.blob_bus.say
    mailbox, site.runner.sender._mailbox = site.runner.sender._mailbox, None

    def change(how: Callable[[BlobChunk], BlobChunk | None]) -> None:
        def say_changed(message: Any, **names: Any) -> None:
            changed = how(message)
            if changed is not None:
                say(changed, **names)

        site.runner.blob_bus.say = say_changed  # type: ignore[method-assign]

    yield change
    site.runner.blob_bus.say = say  # type: ignore[method-assign]
    site.runner.sender._mailbox = mailbox


class Mallory:
    """Another node, trusted for all that, which answers what it likes."""

    def __init__(self, url: str, folder: Path) -> None:
        self.bus = Bus(url=url, node="mallory", client="model_runner")
        self.answer: SignedBuiltManifest | None = None
        self.held: BuiltFolder | None = None
        store = SnapshotStore(folder)
        self.sender = BlobSender(store, self.bus, lambda _: pytest.fail("a snapshot"), lambda _: self.held)
        self.bus.hear(ModelBuiltAsk, lambda _: self.answer)
        self.bus.hear(BlobPull, self.sender.pull)
        self.bus.start()

    def offer(self, manifest: BuiltManifest, folder: Path | None = None) -> None:
        self.answer = seal_built(MALLORY, msgspec.structs.replace(manifest, creator="mallory"))
        self.held = BuiltFolder(folder, manifest) if folder else None


@pytest.fixture
def mallory(site: Site, tmp_path: Path) -> Iterator[Mallory]:
    found = Mallory(site.url, tmp_path / "mallory")
    yield found
    found.sender.stop()
    found.bus.stop()


def manifest_of(site: Site) -> BuiltManifest:
    return open_built(site.runner.shelf.manifest(MODEL, "int8", "cpu"), Keyring({"tomato": site.identity.fingerprint}))


def assert_nothing_was_written(cache: Path) -> None:
    assert not cache.exists() or not [path for path in cache.iterdir() if path.is_dir()]


# --- what goes well -------------------------------------------------------------------------------------------


def test_on_one_host_only_handles_cross_the_bus(site: Site, cache: Path) -> None:
    counters = site.runner.blob_bus.counters
    sent_bytes, mailed_bytes = counters["blob.sent_bytes"], counters["blob.mailed_bytes"]
    mailbox = Mailbox(1, site.bus.counters)
    fetched = site.fetch(cache, mailbox=mailbox)
    mailbox.close()
    assert fetched.fetched_bytes == site.total_bytes
    assert counters["blob.sent_bytes"] == sent_bytes
    assert counters["blob.mailed_bytes"] - mailed_bytes == site.total_bytes


def test_a_fetched_model_is_the_holders_and_runs_without_torch(site: Site, cache: Path) -> None:
    progress: list[tuple[int, int]] = []
    fetched = site.fetch(cache, on_progress=lambda here, total: progress.append((here, total)))
    assert fetched.folder == cache / site.folder.name
    assert fetched.fetched_bytes == site.total_bytes == progress[-1][0] == progress[-1][1]
    for path in site.folder.iterdir():
        assert (fetched.folder / path.name).read_bytes() == path.read_bytes()
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [site.folder.name]
    assert [each.card for each in built_models(cache, MODEL)] == [fetched.card]
    record = read_record(fetched.folder)
    assert record is not None
    assert (record.made, record.model.name, record.model.sources) == ("built", MODEL, ())
    # It is there now: nothing crosses the bus again.
    assert site.fetch(cache).fetched_bytes == 0

    chosen = choose(ModelConfig(name=MODEL), cache=cache, packages=Packages(False, True, False))
    assert (chosen.engine, chosen.folder) == ("onnx", fetched.folder)
    logits = []
    for folder in (site.folder, chosen.folder):
        engine = OnnxEngine.load(folder, provider="cpu", threads=1)
        kept = engine.new_cache(16)
        engine.prefill(kept, [5, 6, 7])
        logits.append(engine.step(kept, 8))
        kept.close()
    assert np.array_equal(*logits)


def test_a_fetch_that_was_cut_goes_on_with_what_is_whole(site: Site, cache: Path) -> None:
    came: list[int] = []

    def cut(here_bytes: int, _total: int) -> None:
        came.append(here_bytes)
        if len(came) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        site.fetch(cache, on_progress=cut)
    assert list(built_models(cache)) == []
    partial = cache / f".{site.folder.name}.fetch"
    # What was damaged meanwhile is fetched once more, what does not belong there goes.
    damaged = next(path for path in sorted(partial.iterdir()) if path.stat().st_size)
    damaged.write_bytes(b"?" + damaged.read_bytes()[1:])
    (partial / "of another build").write_bytes(b"x")
    here = PartialModel(partial, manifest_of(site)).here_bytes
    assert 0 < here < came[-1]
    fetched = site.fetch(cache)
    assert fetched.fetched_bytes == site.total_bytes - here
    assert sorted(path.name for path in fetched.folder.iterdir() if path.name[0] != ".") == sorted(
        path.name for path in site.folder.iterdir()
    )


def test_the_command_fetches_stops_at_ctrl_c_and_goes_on(
    site: Site, tmp_path: Path, cache: Path, change: Callable[..., None]
) -> None:
    config = tmp_path / "sprout.toml"
    data_dir = tmp_path / "sprout"
    config.write_text(f'[node]\nname = "sprout"\ndata_dir = "{data_dir}"\n[broker]\nurl = "{site.url}"\n')
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    command = [sys.executable, "-c", "from edge.cli import main; main()", "--config", str(config)]
    command += ["models", "fetch", MODEL, "--from", "tomato", "--json"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    refused = run()
    assert refused.returncode == 1
    assert "does not trust" in refused.stderr
    assert "mindstream keys trust tomato" in refused.stderr
    assert_nothing_was_written(cache)

    Peers(data_dir, load_or_create_identity(data_dir, "sprout")).trust("tomato", site.identity.fingerprint)
    change(lambda chunk: chunk if chunk.index < 12 else None)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    partial = cache / f".{site.folder.name}.fetch"
    manifest = manifest_of(site)

    def here_bytes() -> int:
        held = BuiltFolder(partial, manifest)
        return sum(held.verified_chunk(ref, 0) is not None for ref in held.chunks[:12])

    wait_for(lambda: here_bytes() == 12, "twelve chunks are here")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "what came is kept" in said

    change(lambda chunk: chunk)
    done = run()
    assert done.returncode == 0, done.stderr
    answer = msgspec.json.decode(done.stdout)
    assert answer["folder"] == str(cache / site.folder.name)
    assert 0 < answer["fetched_bytes"] < site.total_bytes
    assert "from an earlier fetch" in done.stderr


# --- what is not there, or comes damaged ----------------------------------------------------------------------


def test_a_model_that_the_holder_has_not_built_so_is_not_found(site: Site, cache: Path) -> None:
    with pytest.raises(NotFound, match="only int8-cpu of it") as refused:
        site.fetch(cache, precision="int4")
    assert f"mindstream models build {MODEL} --precision int4" in refused.value.hint
    with pytest.raises(NotFound, match="built none of it"):
        fetch(site.bus, Keyring(), "tomato", "../../etc", cache=cache)
    assert_nothing_was_written(cache)


def test_a_chunk_damaged_on_the_way_comes_again_and_one_that_always_is_ends_it(
    site: Site, cache: Path, change: Callable[..., None]
) -> None:
    change(lambda chunk: BlobChunk(chunk.index, b"damaged") if chunk.index == 9 else chunk)
    with pytest.raises(BlobError, match="chunk 9 came damaged 3 times"):
        site.fetch(cache)
    assert list(built_models(cache)) == []
    damaged: list[int] = []

    def once(chunk: BlobChunk) -> BlobChunk:
        if chunk.index == 9 and not damaged:
            damaged.append(9)
            return BlobChunk(9, bytes(len(chunk.data)))
        return chunk

    change(once)
    assert site.fetch(cache).folder.is_dir()
    assert damaged


def test_a_holder_whose_file_was_changed_says_that_it_has_lost_it(
    built_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = make_built(built_models["llama"], tmp_path)
    shelf = BuiltShelf(tmp_path, MALLORY)
    signed = shelf.manifest(MODEL, "int8", "cpu")
    assert shelf.manifest(MODEL, "int8", "cpu") is signed
    manifest = open_built(signed, Keyring({"mallory": MALLORY.fingerprint}))
    held = shelf.held(digest(signed.manifest).hex())
    assert held is not None
    (folder / EXTRA).write_bytes(b"short")
    lost = [ref for index, ref in enumerate(held.chunks) if held.verified_chunk(ref, index) is None]
    assert len(lost) == EXTRA_CHUNKS
    assert not any(held.has(ref) for ref in lost)
    with pytest.raises(ModelUnavailable, match="not"):  # and offers it no more
        shelf.manifest(MODEL, "int8", "cpu")
    assert manifest.total_bytes > 0


# --- who must not be believed ---------------------------------------------------------------------------------


def test_who_is_not_trusted_is_not_believed(site: Site, cache: Path) -> None:
    with pytest.raises(UnknownPeer, match="tomato"):
        site.fetch(cache, keyring=Keyring())
    with pytest.raises(BadSignature):
        site.fetch(cache, keyring=Keyring({"tomato": MALLORY.fingerprint}))
    assert_nothing_was_written(cache)


def test_a_manifest_that_was_changed_or_passed_on_is_refused(site: Site, cache: Path, mallory: Mallory) -> None:
    of_tomato = site.runner.shelf.manifest(MODEL, "int8", "cpu")
    mallory.answer = of_tomato
    with pytest.raises(BadSignature, match="signed by tomato"):
        site.fetch(cache, "mallory")
    mallory.answer = SignedBuiltManifest(of_tomato.manifest.replace(b"b2", b"b3"), of_tomato.signature)
    with pytest.raises(BadSignature, match="does not match"):
        site.fetch(cache, "mallory")
    assert_nothing_was_written(cache)


TB = 10**12


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"files": [BuiltFile("../x", 0, bytes(32))]}, MalformedMessage, "plain name"),
        ({"files": [BuiltFile("/etc/cron.d/x", 0, bytes(32))]}, MalformedMessage, "plain name"),
        ({"folder": f"../../{MODEL}-0123456789ab-int8-cpu-b{BUILD}"}, MalformedMessage, "plain name"),
        ({"files": [BuiltFile("model.onnx", 10 * TB, bytes(32))], "total_bytes": 10 * TB}, MalformedMessage, "limit"),
        ({"build": BUILD + 1}, ModelUnavailable, ANOTHER_VERSION),
        ({"model": "another"}, ModelUnavailable, "another model"),
        ({"folder": f"{MODEL}-0123456789ab-int4-cpu-b{BUILD}"}, ModelUnavailable, "another model"),
        ({"folder": "smollm2"}, ModelUnavailable, "another model"),
        ({"card": bytes(32)}, ModelUnavailable, "no built model"),
    ],
)
def test_a_signed_manifest_of_something_else_is_refused_before_anything_is_written(
    changes: dict[str, Any], error: type[MindstreamError], reason: str, site: Site, cache: Path, mallory: Mallory
) -> None:
    mallory.offer(msgspec.structs.replace(manifest_of(site), **changes))
    with pytest.raises(error) as refused:
        site.fetch(cache, "mallory")
    assert reason in refused.value.reason
    assert_nothing_was_written(cache)


def test_more_than_the_disk_has_is_refused_before_anything_is_written(
    site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_fetch, "free_bytes", lambda _folder: 1_000_000)
    with pytest.raises(StorageError, match="1 MB are free") as refused:
        site.fetch(cache)
    assert refused.value.reason == "disk full"
    assert_nothing_was_written(cache)


def _with_file(manifest: BuiltManifest, folder: Path, name: str, data: bytes) -> BuiltManifest:
    """``manifest`` with another file of this name, its chunks and sizes right, as a holder that lies makes it."""
    (folder / name).write_bytes(data)
    files = [
        BuiltFile(each.name, len(data), sha256(data).digest()) if each.name == name else each for each in manifest.files
    ]
    chunks = b"".join(
        digest(body[at : at + MAX_CHUNK_BYTES])
        for body in ((folder / file.name).read_bytes() for file in files)
        for at in range(0, len(body), MAX_CHUNK_BYTES)
    )
    card = next(file.sha256 for file in files if file.name == CARD_NAME)
    total = sum(file.size_bytes for file in files)
    return msgspec.structs.replace(manifest, files=files, chunks=chunks, card=card, total_bytes=total)


@pytest.mark.parametrize("lie", ["file digest", "card of another", "files beside the card", "no graph", "old card"])
def test_files_that_do_not_make_a_built_model_never_become_one(
    lie: str, site: Site, cache: Path, mallory: Mallory, tmp_path: Path
) -> None:
    folder = tmp_path / "lies" / site.folder.name
    shutil.copytree(site.folder, folder)
    manifest = manifest_of(site)
    card = msgspec.json.decode((folder / CARD_NAME).read_bytes(), type=Card)
    if lie == "file digest":
        files = [BuiltFile(each.name, each.size_bytes, each.sha256) for each in manifest.files]
        files[-1] = BuiltFile(files[-1].name, files[-1].size_bytes, bytes(32))
        manifest, why = msgspec.structs.replace(manifest, files=files), "SHA-256"
    elif lie == "card of another":
        other = msgspec.json.encode(msgspec.structs.replace(card, precision="int4"))
        manifest, why = _with_file(manifest, folder, CARD_NAME, other), "its card is of"
    elif lie == "files beside the card":
        manifest, why = _with_file(manifest, folder, EXTRA, b"not the card's"), "names other files"
    elif lie == "old card":
        old = msgspec.json.encode(msgspec.structs.replace(card, build=BUILD - 1))
        manifest, why = _with_file(manifest, folder, CARD_NAME, old), f"build {BUILD - 1} of"
    else:
        graph = b"this is no graph"
        manifest = _with_file(manifest, folder, "model.onnx", graph)
        of_graph = ModelFile("model.onnx", len(graph), sha256(graph).hexdigest())
        card_files = tuple(of_graph if file.name == of_graph.name else file for file in card.files)
        changed = msgspec.json.encode(msgspec.structs.replace(card, files=card_files))
        manifest, why = _with_file(manifest, folder, CARD_NAME, changed), "model.onnx"
    mallory.offer(manifest, folder)
    with pytest.raises((BlobError, ModelUnavailable), match=why):
        site.fetch(cache, "mallory")
    assert_nothing_was_written(cache)
