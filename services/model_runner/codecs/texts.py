"""Texts to calibrate a model's basis on: several kinds, and on every machine that runs a model.

They are the texts that `mindstream models build` checks with, Python's own reference and sources, and descriptions of
packages. `mindstream bench snapshot` measures on others.
"""

from __future__ import annotations

import importlib.metadata
import sysconfig
from pathlib import Path

from services.model_runner.build_check import load_texts

MAX_CHARACTERS = 9_000
"""Of each text: some 2,000 tokens, so that no kind outweighs the others."""
TEXT_TOKENS = 2_048
_MODULES = ("textwrap", "statistics", "shelve", "cmd")
_PACKAGES = ("rich", "typer", "psutil", "tqdm")


def calibration_texts() -> list[str]:
    """The texts. Those whose package is not installed are left out."""
    from pydoc_data.topics import topics

    texts = ["\n\n".join(text.text for text in load_texts())]
    reference = "\n\n".join(topics[name] for name in sorted(topics))
    texts += [reference[at : at + MAX_CHARACTERS] for at in range(0, 300_000, 60_000)]
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts += [path.read_text("utf-8") for name in _MODULES if (path := folder / f"{name}.py").is_file()]
    texts += [text for name in _PACKAGES if len(text := description(name)) > 2_000]
    return [text[:MAX_CHARACTERS] for text in texts]


def description(package: str) -> str:
    """What an installed package says of itself; empty when it is not installed."""
    try:
        return str(importlib.metadata.metadata(package).get_payload() or "")  # type: ignore[attr-defined]
    except importlib.metadata.PackageNotFoundError:
        return ""
