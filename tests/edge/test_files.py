"""Files that are whole or not there, and what the disk's refusals become."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edge.files import storage_errors, write_atomically
from protocol.errors import StorageError
from tests.edge.bus_support import ROOT


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_atomically(path, b"old")
    write_atomically(path, memoryview(b"new"), mode=0o640)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    write_atomically(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"writing .*key: No space left.*free some space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        write_atomically(tmp_path / "nowhere" / "key", b"x")


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "right to write"),
        (errno.EIO, "look at"),
    ],
)
def test_each_refusal_says_what_to_do(number: int, hint: str) -> None:
    with pytest.raises(StorageError, match="saving a thing") as caught, storage_errors("saving a thing"):
        raise OSError(number, os.strerror(number))
    assert hint in caught.value.hint
    assert caught.value.reason == os.strerror(number)


def test_a_writer_killed_at_any_moment_leaves_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_atomically(path, b"0" * 100_000)
    program = (
        "import itertools, sys; from pathlib import Path; from edge.files import write_atomically\n"
        "print('on', flush=True)\n"
        "for n in itertools.count(): write_atomically(Path(sys.argv[1]), bytes([48 + n % 10]) * 100_000)"
    )
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(path)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.kill()
        body = path.read_bytes()
        assert len(body) == 100_000
        assert len(set(body)) == 1
