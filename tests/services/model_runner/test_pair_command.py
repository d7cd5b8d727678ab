"""`mindstream models pair` as a process, on a small model and an adapter of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make install (extra `model`)")

from bench.lora import train_lora  # noqa: E402
from tests.support.nodes import CHECKOUT  # noqa: E402

PROGRAM = [sys.executable, "-c", "from edge.cli import main; main()"]


def run(config: Path, *arguments: str) -> Any:
    return subprocess.run(
        [*PROGRAM, "--config", str(config), "models", "pair", *arguments],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_a_pair_is_measured_and_its_certificate_kept(small_models: dict[str, Path], tmp_path: Path) -> None:
    config = tmp_path / "mindstream.toml"
    config.write_text(
        f'[node]\nname = "tomato"\ndata_dir = "{tmp_path / "data"}"\n'
        f'[model]\nname = "{small_models["llama"]}"\ndtype = "float32"\nthreads = 1\n'
    )
    train_lora(small_models["llama"], [list(range(60)), list(range(60, 120))], tmp_path / "lora", steps=2, rate=1e-2)
    done = run(config, str(tmp_path / "lora"), "transformers", "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["texts"], len(made["layers"])) == (6, 3)
    assert [each["computed_layers"] for each in made["reuses"]][:1] == [0]
    assert "layer 2 of the other" in done.stderr
    assert len(list((tmp_path / "data" / "model_runner" / "variants").iterdir())) == 1
    refused = run(config, "transformers", "transformers")
    assert refused.returncode == 1
    assert "one variant" in refused.stderr


def test_a_variant_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    config = tmp_path / "mindstream.toml"
    config.write_text(f'[node]\nname = "tomato"\ndata_dir = "{tmp_path / "data"}"\n')
    refused = run(config, "transformers", "int5")
    assert refused.returncode != 0
    assert "int5" in refused.stderr
    assert not (tmp_path / "data" / "model_runner" / "variants").exists()
