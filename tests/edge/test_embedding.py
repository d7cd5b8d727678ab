"""The embedding model: what means the same lies close together, and nothing depends on a text's neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge.embedding import DEFAULT_EMBEDDING, MAX_TOKENS, Embedder, embedding_file
from protocol.errors import ModelUnavailable

np = pytest.importorskip("numpy", reason="numpy is not installed: make install (extra `edge`)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: make install (extra `edge`)")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: make install (extra `edge`)")


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    path = embedding_file(DEFAULT_EMBEDDING)
    if path is None:
        pytest.skip("the embedding model is not installed: mindstream models pull all-minilm-l6-v2")
    return Embedder(path, threads=1)


ALIKE = (
    ("A man is eating food.", "A man eats something."),
    ("How do I reset my password?", "I forgot my password, what can I do?"),
    ("The cat sleeps on the sofa.", "A kitten is napping on the couch."),
    ("The key is under the flower pot.", "You find the key beneath the plant pot."),
    ("It will rain tomorrow.", "The forecast says rain for the next day."),
)


def test_sentences_that_mean_the_same_are_nearer_than_all_others(embedder: Embedder) -> None:
    left = embedder.embed([one for one, _ in ALIKE]).vectors
    right = embedder.embed([other for _, other in ALIKE]).vectors
    similarity = left @ right.T
    assert list(similarity.argmax(1)) == list(range(len(ALIKE)))
    assert similarity.diagonal().min() > 0.5
    assert similarity[~np.eye(len(ALIKE), dtype=bool)].max() < 0.4


def test_vectors_have_length_one_and_do_not_depend_on_their_neighbours(embedder: Embedder) -> None:
    texts = ["short", "a text that is somewhat longer than the first one", "x " * 100, "short"]
    together = embedder.embed(texts).vectors
    assert together.shape == (4, 384)
    assert together.dtype == np.float32
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert np.array_equal(together[0], together[3])
    for text, vector in zip(texts, together, strict=True):
        assert float(embedder.embed([text]).vectors[0] @ vector) > 0.999


def test_what_is_longer_than_the_model_reads_is_cut_and_said(embedder: Embedder) -> None:
    found = embedder.embed(["word " * 1000, "word", "word " * 254, "word " * 300])
    assert found.truncated == [0, 3]
    assert found.tokens == 3 * MAX_TOKENS + 3
    assert float(found.vectors[0] @ found.vectors[3]) > 0.9999
    assert embedder.embed([]).vectors.shape == (0, 384)


def test_token_ids_are_those_of_the_models_own_tokenizer(embedder: Embedder) -> None:
    # Made with the tokenizer.json of sentence-transformers/all-MiniLM-L6-v2.
    expected: dict[str, Any] = EXPECTED
    for text, ids in expected.items():
        assert embedder._tokenizer.encode(text).ids == ids, text


def test_a_model_that_is_not_there_or_is_none_is_unavailable(tmp_path: Path) -> None:
    assert embedding_file("") is None
    assert embedding_file("no-such-model") is None
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ModelUnavailable, match=r"model\.onnx"):
        Embedder(path)


EXPECTED = {
    "Hello, world!": [101, 7592, 1010, 2088, 999, 102],
    "Ünïcödé NAÏVE café": [101, 27260, 15743, 7668, 102],
    "東京 is big": [101, 1879, 1755, 2003, 2502, 102],
    "🎉 party": [101, 100, 2283, 102],
    "untranslatable": [101, 4895, 6494, 3619, 20051, 3085, 102],
    "": [101, 102],
    "a\u200db\x00c": [101, 5925, 102],
}
