"""A wheelhouse without network: our own wheel, built here, and the core's packages packed as they are installed."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import HeaderParser
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[2]


def copy_sources(folder: Path) -> Path:
    """What a wheel is made of, without what lies about in a checkout: the build backend writes where it works."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(CHECKOUT / name, source)
    for name in ("protocol", "edge", "broker", "services", "bench"):
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    return source


def build_wheel(folder: Path, source: Path) -> Path:
    """The wheel of ``source``, by the build backend that its pyproject.toml names."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(source)], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("mindstream-*.whl")
    return wheel


def build_wheelhouse(folder: Path) -> None:
    """Our wheel and the packages of the core, in ``folder``."""
    with tempfile.TemporaryDirectory() as work:
        wheel = build_wheel(folder, copy_sources(Path(work)))
    pack_needed(wheel, folder)


def other_version(wheelhouse: Path, folder: Path, version: str, change: dict[str, str] | None = None) -> Path:
    """The wheelhouse again, our wheel in it as ``version``, with the text of files changed: name to what is added."""
    folder.mkdir()
    for wheel in wheelhouse.iterdir():
        if not wheel.name.startswith("mindstream-"):
            (folder / wheel.name).hardlink_to(wheel)
    (ours,) = wheelhouse.glob("mindstream-*.whl")
    old = ours.name.split("-")[1]
    with (
        zipfile.ZipFile(ours) as source,
        zipfile.ZipFile(folder / ours.name.replace(old, version), "w") as target,
    ):
        for name in source.namelist():
            body = source.read(name)
            if name.endswith("METADATA"):
                body = re.sub(rb"(?m)^Version: .*$", f"Version: {version}".encode(), body)
            if name.endswith("RECORD"):
                # pip checks no digests; the names must be there.
                body = body.replace(f"-{old}.".encode(), f"-{version}.".encode())
            body += (change or {}).get(name, "").encode()
            target.writestr(name.replace(f"-{old}.dist-info", f"-{version}.dist-info"), body)
    return folder


def pack_needed(wheel: Path, folder: Path) -> None:
    """The packages that ``wheel`` needs, with what those need, packed from this environment."""
    with zipfile.ZipFile(wheel) as opened:
        (metadata,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(opened.read(metadata).decode())
    done: set[str] = set()
    waiting = [Requirement(text) for text in headers.get_all("Requires-Dist") or []]
    while waiting:
        requirement = waiting.pop()
        key = canonicalize_name(requirement.name)
        # Markers that name an extra are not of the core's.
        if key in done or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        done.add(key)
        found = importlib.metadata.distribution(requirement.name)
        _pack(found, folder)
        waiting += [Requirement(text) for text in found.requires or []]


def _pack(found: Distribution, folder: Path) -> None:
    """One installed package as a wheel (PEP 427): its files, less the programs that pip made, and a new RECORD."""
    tags = [line.removeprefix("Tag: ") for line in (found.read_text("WHEEL") or "").splitlines() if "Tag: " in line]
    parts = [sorted({tag.split("-")[index] for tag in tags}) for index in range(3)]
    stem = f"{canonicalize_name(found.name).replace('-', '_')}-{found.version}"
    path = folder / f"{stem}-{'-'.join('.'.join(part) for part in parts)}.whl"
    record = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as wheel:
        for file in found.files or []:
            name = str(file)
            if ".." in file.parts or name.endswith((".pyc", "/RECORD", "/INSTALLER", "/REQUESTED", "/direct_url.json")):
                continue
            body = Path(str(file.locate())).read_bytes()
            wheel.writestr(name, body)
            digest = base64.urlsafe_b64encode(hashlib.sha256(body).digest()).decode().rstrip("=")
            record.append(f"{name},sha256={digest},{len(body)}")
        info = next(str(file).partition("/")[0] for file in found.files or [] if ".dist-info/" in str(file))
        wheel.writestr(f"{info}/RECORD", "\n".join([*record, f"{info}/RECORD,,"]) + "\n")
