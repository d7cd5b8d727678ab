"""The texts that codecs are measured on: of several kinds, and none of them a part of any calibration."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sysconfig
from pathlib import Path
from typing import Any

from services.model_runner.codecs.texts import description

MAX_CHARACTERS = 24_000
_LOCOMO = Path(__file__).resolve().parent.parent.parent.parent / "shared" / "data" / "locomo_dev5.json"


def measured_texts() -> dict[str, str]:
    """By kind; what is not on this machine is left out. LoCoMo's talks (CC BY-NC 4.0) are for measuring only."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = {
        "python": _joined(folder / "heapq.py", folder / "queue.py", folder / "bisect.py"),
        "legal": _joined(folder / "LICENSE.txt") or _joined(Path("/usr/share/common-licenses/MPL-2.0")),
        "readme": description("openai"),
        "manual": description("regex"),
        "library": description("paho-mqtt"),
        "changelog": description("sentencepiece") + description("charset-normalizer")[6_000:],
        "docstrings": _docstrings(),
        "c": _c_header(),
        **_locomo(),
    }
    return {kind: text[:MAX_CHARACTERS] for kind, text in found.items() if text}


def _joined(*paths: Path) -> str:
    return "".join(path.read_text("utf-8", "replace") for path in paths if path.is_file())


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


def _locomo() -> dict[str, str]:
    if not _LOCOMO.is_file():
        return {}
    data: Any = json.loads(_LOCOMO.read_bytes())
    talk = data[0]["conversation"]
    sessions = [turns for name, turns in talk.items() if name.startswith("session_") and isinstance(turns, list)]
    summaries = [text for part in data[1:3] for text in part.get("session_summary", {}).values()]
    return {
        "dialogue": "\n".join(f"{turn['speaker']}: {turn['text']}" for turns in sessions for turn in turns),
        "narrative": "\n\n".join(summaries),
    }
