"""Distributions of the next token, and how far two of them are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LogProbabilities = npt.NDArray[np.float64]


def log_probabilities(logits: npt.NDArray[Any]) -> LogProbabilities:
    """Natural logarithms, float64, of logits of any shape whose last axis is the vocabulary."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found: LogProbabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def compare(expected: LogProbabilities, found: LogProbabilities) -> tuple[float, float]:
    """Mean Kullback-Leibler divergence in nats, of ``found`` from ``expected``, and the share of equal likeliest
    tokens.

    Both are of shape (positions, vocabulary).
    """
    divergence = float((np.exp(expected) * (expected - found)).sum(1).mean())
    return max(0.0, divergence), float((expected.argmax(1) == found.argmax(1)).mean())
