"""A GGUF file becomes a folder with safetensors and tokenizer, which loads in a fraction of a second.

Only this step needs torch. It runs in a child process (``python -m edge.model_convert GGUF FOLDER``): the memory is
given back, and the libraries' settings and noise stay there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from broker.child import spawn
from protocol.errors import ModelUnavailable

CONVERSION = 1
"""Part of a converted folder's name: raised when the conversion changes, so that an old folder is not taken."""
_EXIT_PACKAGES_MISSING = 3


def convert_in_child(gguf: Path, folder: Path) -> None:
    """Convert ``gguf`` into ``folder``, which must exist. Raises ModelUnavailable."""
    quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    child = spawn(
        [sys.executable, "-m", "edge.model_convert", str(gguf), str(folder)],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | quiet,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        _, said = child.communicate()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    if child.returncode == 0:
        return
    last_line = said.decode("utf-8", "replace").strip().rpartition("\n")[2]
    if child.returncode == _EXIT_PACKAGES_MISSING:
        raise ModelUnavailable(
            f"converting {gguf.name}: {last_line}", hint="pip install 'mindstream[model]'", reason="packages missing"
        )
    raise ModelUnavailable(
        f"converting {gguf.name}: the conversion ended with code {child.returncode}: {last_line}",
        hint="is there memory (1 GB) and disk (300 MB) for it? `mindstream doctor` tells",
        reason="conversion failed",
    )


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer and weights (bfloat16, as upstream publishes them) of a GGUF file into ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **place)
    model: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.bfloat16, **place)
    # It was dequantised while loading; left in place, these two would have it saved as a GGUF quantisation.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def main(arguments: list[str]) -> int:
    """``python -m edge.model_convert GGUF FOLDER``: the child process of a conversion."""
    try:
        _convert_gguf(Path(arguments[0]), Path(arguments[1]))
    except ImportError as error:
        # transformers raises it as well when one of its own optional packages (gguf, accelerate) is missing.
        print(f"a package is not installed: {' '.join(str(error).split())}", file=sys.stderr)
        return _EXIT_PACKAGES_MISSING
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
