"""Text to vectors: a small sentence-embedding model on ONNX Runtime.

all-MiniLM-L6-v2 (Reimers and Gurevych, Sentence-BERT, 2019): WordPiece tokens, six layers, the mean of the last hidden
states over the tokens, scaled to length 1; so a dot product is the cosine similarity. Its card reads 256 tokens of a
text and no more; what is longer is cut there, and that is said.

The vocabulary beside this file is that of bert-base-uncased (Google, Apache-2.0), which the model was trained with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edge.models import find
from protocol.errors import ModelUnavailable

DEFAULT_EMBEDDING = "all-minilm-l6-v2"
DIMENSIONS = 384
MAX_TOKENS = 256
"""Of a text, the marks of its beginning and end included."""
BATCH = 32
PACKAGES = ("numpy", "onnxruntime", "tokenizers")

_VOCABULARY = Path(__file__).with_name("wordpiece_uncased.json")


@dataclass(frozen=True)
class Embedded:
    """Vectors of some texts."""

    vectors: Any
    """numpy, (texts, 384), float32, each of length 1."""
    tokens: int
    """Read, of all texts."""
    truncated: list[int]
    """Indexes of the texts that were longer than the model reads."""


def embedding_file(name: str, folders: Sequence[Path] = ()) -> Path | None:
    """The model's file, if it and what runs it are on this machine. Looks, and loads nothing."""
    if not name or any(importlib.util.find_spec(package) is None for package in PACKAGES):
        return None
    try:
        found = find(name, folders)
    except ModelUnavailable:
        return None
    return found.folder / found.file if found is not None and found.file.endswith(".onnx") else None


class Embedder:
    """The model, loaded. Used by one thread at a time.

    Args:
        path: its ONNX file, int8 or float; inputs as BERT's, output (batch, tokens, 384).
        threads: of ONNX Runtime; it does not spin while it waits, because a language model wants the same cores.

    Raises ModelUnavailable.
    """

    def __init__(self, path: Path, *, threads: int = 2) -> None:
        try:
            import onnxruntime
            import tokenizers
        except ImportError as error:
            raise ModelUnavailable(
                f"loading the embedding model {path}: {error.name} is not installed",
                hint="make install EXTRAS=edge,dev",
                reason="missing packages",
            ) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # Its errors are of classes of its own, without a common one that it exports.
            raise ModelUnavailable(
                f"loading the embedding model {path}: {error}",
                hint="`mindstream models verify` tells whether it is damaged",
                reason=type(error).__name__,
            ) from error
        self._inputs = [each.name for each in self._session.get_inputs()]
        self._tokenizer = _tokenizer(tokenizers)

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Vectors of ``texts``, in their order. A text's vector does not depend on its neighbours."""
        import numpy as np

        encoded = [each.ids for each in self._tokenizer.encode_batch(list(texts))]
        truncated = [index for index, ids in enumerate(encoded) if len(ids) > MAX_TOKENS]
        ends = [ids if len(ids) <= MAX_TOKENS else [*ids[: MAX_TOKENS - 1], ids[-1]] for ids in encoded]
        vectors = np.empty((len(ends), DIMENSIONS), np.float32)
        # Texts of like length together: what is padded is computed for nothing.
        order = sorted(range(len(ends)), key=lambda index: len(ends[index]))
        for begin in range(0, len(order), BATCH):
            some = order[begin : begin + BATCH]
            longest = max(len(ends[index]) for index in some)
            ids = np.zeros((len(some), longest), np.int64)
            mask = np.zeros_like(ids)
            for row, index in enumerate(some):
                ids[row, : len(ends[index])] = ends[index]
                mask[row, : len(ends[index])] = 1
            given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            hidden = self._session.run(None, {name: given[name] for name in self._inputs})[0]
            means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            vectors[some] = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        return Embedded(vectors, sum(map(len, ends)), truncated)


def _tokenizer(tokenizers: Any) -> Any:
    """BERT's: lower case, no accents, words cut into the vocabulary's pieces, [CLS] before and [SEP] after."""
    words = msgspec.json.decode(_VOCABULARY.read_bytes(), type=list[str])
    vocabulary = {word: index for index, word in enumerate(words)}
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    )
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return made
