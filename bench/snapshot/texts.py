"""The texts that codecs are measured on, and those on which their settings were frozen: no text is both, and none is a
part of any calibration (services/model_runner/codecs/texts.py).

All lie on a machine with Debian's usual packages and Python: the names of packages stand beside them. LoCoMo's talks
(CC BY-NC 4.0) are for measuring only.
"""

from __future__ import annotations

import gzip
import importlib.util
import inspect
import json
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.model_runner.codecs.texts import description

MAX_CHARACTERS = 24_000
_LOCOMO = Path(__file__).resolve().parent.parent.parent.parent / "shared" / "data" / "locomo_dev5.json"
_REPOSITORY = Path(__file__).resolve().parent.parent.parent
_STDLIB = Path(sysconfig.get_paths()["stdlib"])
_SHARE = Path("/usr/share")


def measured_texts() -> dict[str, str]:
    """By kind; what is not on this machine is left out. Nothing was set or chosen after a look at them."""
    found = {
        # An article by S. Burke and J. Lachler on how languages count, from Debian's package `perl`.
        "essay": _joined(*sorted(_SHARE.glob("perl/5.*.*/Locale/Maketext/TPJ13.pod"))[:1]),
        "narrative": _summaries(3, 5),
        "dialogue": _talk(4),
        # The messages that Python's own tests of `email` read (on Debian: package `libpython3-testsuite`).
        "e-mail": _joined(*(_STDLIB / "test" / "test_email" / "data").glob("msg_*.txt")),
        "python": _joined(_STDLIB / "tarfile.py"),
        "configuration": _without_blank(
            _joined(
                _SHARE / "doc/mosquitto/examples/mosquitto.conf", _SHARE / "doc/mosquitto/examples/mosquitto.conf.gz"
            )
        ),
        "manual page": _joined(_SHARE / "man/man1/gzip.1.gz", _SHARE / "man/man1/tar.1.gz"),
        "german": _joined(_SHARE / "man/de/man1/dpkg.1.gz"),
        "json": _signatures(),
        "table": _joined(_SHARE / "zoneinfo/zone1970.tab"),
        "shell": _joined(_REPOSITORY / "systemd" / "install.sh", *sorted((_REPOSITORY / "systemd").glob("*.service"))),
        "news": _joined(_STDLIB / "idlelib" / "NEWS.txt"),
    }
    return {kind: text[:MAX_CHARACTERS] for kind, text in found.items() if text}


def development_texts() -> dict[str, str]:
    """Those that settings were chosen on: by kind, what is not on this machine is left out."""
    found = {
        "python": _joined(_STDLIB / "heapq.py", _STDLIB / "queue.py", _STDLIB / "bisect.py"),
        "legal": _joined(_STDLIB / "LICENSE.txt") or _joined(_SHARE / "common-licenses" / "MPL-2.0"),
        "readme": description("openai"),
        "manual": description("regex"),
        "library": description("paho-mqtt"),
        "changelog": description("sentencepiece") + description("charset-normalizer")[6_000:],
        "docstrings": _docstrings(),
        "c": _c_header(),
        "dialogue": _talk(0),
        "narrative": _summaries(1, 3),
    }
    return {kind: text[:MAX_CHARACTERS] for kind, text in found.items() if text}


def _joined(*paths: Path) -> str:
    return "".join(_read(path) for path in paths if path.is_file())


def _read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "replace")


def _without_blank(text: str) -> str:
    """Without lines of nothing but a comment sign."""
    return re.sub(r"(?m)^#?\s*\n", "", text)


def _signatures() -> str:
    """Records of functions of the standard library."""
    import calendar
    import collections
    import fractions
    import ipaddress
    import shutil

    rows: list[dict[str, Any]] = []
    for module in (shutil, calendar, ipaddress, fractions, collections):
        for name, found in sorted(vars(module).items()):
            if name.startswith("_") or not callable(found) or getattr(found, "__module__", "") != module.__name__:
                continue
            try:
                parameters = [str(each) for each in inspect.signature(found).parameters.values()]
            except (TypeError, ValueError):
                parameters = []
            about = (inspect.getdoc(found) or "").partition("\n\n")[0]
            rows.append(
                {
                    "module": module.__name__,
                    "name": name,
                    "kind": type(found).__name__,
                    "parameters": parameters,
                    "about": about,
                }
            )
    return json.dumps(rows, indent=1)


def _docstrings() -> str:
    import numpy as np

    functions = (np.einsum, np.histogram, np.linspace, np.pad, np.unique, np.where)
    return "\n\n".join(inspect.getdoc(each) or "" for each in functions)


def _c_header() -> str:
    spec = importlib.util.find_spec("numpy")
    if spec is None or spec.origin is None:
        return ""
    include = Path(spec.origin).parent / "_core" / "include" / "numpy"
    return _joined(include / "ufuncobject.h", include / "npy_math.h")


def _locomo() -> list[dict[str, Any]]:
    return json.loads(_LOCOMO.read_bytes()) if _LOCOMO.is_file() else []


def _talk(number: int) -> str:
    """What two people say in one of the conversations."""
    lines = []
    for talk in _locomo()[number : number + 1]:
        sessions: Sequence[Any] = [turns for name, turns in talk["conversation"].items() if name.startswith("session_")]
        lines += [
            f"{turn['speaker']}: {turn['text']}" for turns in sessions if isinstance(turns, list) for turn in turns
        ]
    return "\n".join(lines)


def _summaries(start: int, stop: int) -> str:
    return "\n\n".join(text for part in _locomo()[start:stop] for text in part.get("session_summary", {}).values())
