"""Small models of real architectures with random weights, written to a folder as a real one is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make install (extra `model`)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make install (extra `model`)")

from edge.db import Database, open_database  # noqa: E402
from services.model_runner.conversations import CONVERSATIONS  # noqa: E402
from services.model_runner.transformers_engine import TransformersEngine  # noqa: E402
from tests.support.once import once_a_run  # noqa: E402

THREADS = 1
"""Two would wait for each other longer than so small a product takes."""
WINDOW = 40
VOCABULARY = 256 + 3
FAMILIES = ("llama", "qwen2", "gemma3")

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'narrator' %}{{ raise_exception('no narrator here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "bos_token_id": None,
}


def _config(family: str) -> Any:
    if family == "llama":
        return transformers.LlamaConfig(**_SIZES, head_dim=32, num_hidden_layers=3)
    if family == "qwen2":  # Biases, two full layers and then two sliding ones.
        return transformers.Qwen2Config(
            **_SIZES, num_hidden_layers=4, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
        )
    # One KV head, normalised queries and keys, five sliding layers to a full one, two RoPE bases.
    sizes = _SIZES | {"num_attention_heads": 4, "num_key_value_heads": 1}
    return transformers.Gemma3TextConfig(**sizes, head_dim=32, num_hidden_layers=7, sliding_window=WINDOW)


def _tokenizer() -> Any:
    """Every byte is a token, so that any character is cut into as many tokens as it has bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name) for name in ("<|im_start|>", "<|im_end|>", "<pad>")])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a Llama, a Qwen2 with sliding layers and a Gemma 3, by family."""
    return make_small_models(tmp_path_factory)


def make_small_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same, for the tests of another service."""

    def make(root: Path) -> None:
        for family in FAMILIES:
            torch.manual_seed(7)
            model = transformers.AutoModelForCausalLM.from_config(_config(family), dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():  # Random weights speak too evenly to tell right from wrong.
                    if parameter.dim() == 2:
                        parameter.mul_(3)
            model.save_pretrained(root / family)
            _tokenizer().save_pretrained(root / family)

    root = once_a_run(tmp_path_factory, "small-models", make)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(params=["llama", "qwen2", "gemma3"])
def small_model(request: pytest.FixtureRequest, small_models: dict[str, Path]) -> Path:
    return small_models[request.param]


@pytest.fixture(scope="session")
def engine(small_models: dict[str, Path]) -> TransformersEngine:
    """The Llama, in the dtype chosen for this machine."""
    return TransformersEngine.load(small_models["llama"], name="small-llama", device="cpu", threads=THREADS)


@pytest.fixture(scope="session")
def built_models(small_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small models built for ONNX Runtime as int8 (``llama``, …) and float32 (``llama-fp32``, …), unchecked.

    Each folder is laid out as a built model's, without its card.
    """
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed: make install (extra `build`)")
    from services.model_runner.build import build

    wanted = {
        name: (source, precision)
        for family, source in small_models.items()
        for precision, name in (("int8", family), ("fp32", f"{family}-fp32"))
    }

    def make(root: Path) -> None:
        for name, (source, precision) in wanted.items():
            (root / name).mkdir()
            build(source, root / name, precision, "cpu", False, lambda _said: None)

    root = once_a_run(tmp_path_factory, "built-models", make)
    return {name: root / name for name in wanted}


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    """Where conversations are kept."""
    found = open_database(tmp_path / "conversations.db", schema=CONVERSATIONS)
    yield found
    found.close()
