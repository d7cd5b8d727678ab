"""A small LoRA training, so that benchmarks and tests have adapters that were really trained, in PEFT's format.

No trainer for users: a fixed rate, no evaluation, no resuming.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from bench.report import Progress, silent
from services.model_runner.adapter import CONFIG_NAME, WEIGHTS_NAME

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class _LoraLinear(torch.nn.Module):
    """A frozen linear layer with a trained low-rank change beside it."""

    def __init__(self, base: torch.nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a = torch.nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.base(rows)
        return found + self.scale * functional.linear(functional.linear(rows, self.a), self.b)


def train_lora(
    model_folder: Path,
    windows: Sequence[Sequence[int]],
    out: Path,
    *,
    targets: Sequence[str] = TARGETS,
    rank: int = 8,
    alpha: int = 16,
    steps: int = 60,
    rate: float = 1e-3,
    seed: int = 1,
    progress: Progress = silent,
) -> float:
    """Train an adapter of the model in ``model_folder`` to foretell ``windows`` (token ids, one window a step, in
    turns), and write it to ``out``. Returns the mean loss of the last tenth of the steps, in nats a token."""
    torch.manual_seed(seed)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    model = loaded.eval()  # without dropout
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lora = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets:
            lora[name] = _LoraLinear(module, rank, alpha / rank)
            model.set_submodule(name, lora[name])
    optimizer = torch.optim.AdamW([each for part in lora.values() for each in (part.a, part.b)], lr=rate)
    losses = []
    for step in range(steps):
        ids = torch.tensor([list(windows[step % len(windows)])])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = functional.cross_entropy(logits, ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([each for part in lora.values() for each in (part.a, part.b)], 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 4 == 0:
            progress(f"training {out.name}: step {step + 1} of {steps}, {losses[-1]:.3f} nats a token")
    _write(out, model_folder, lora, targets, rank, alpha)
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _write(
    out: Path, model_folder: Path, lora: dict[str, _LoraLinear], targets: Sequence[str], rank: int, alpha: int
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, part in lora.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = part.a.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = part.b.detach().contiguous()
    save_file(tensors, out / WEIGHTS_NAME)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model_folder.name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "bias": "none",
        "inference_mode": True,
    }
    (out / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
