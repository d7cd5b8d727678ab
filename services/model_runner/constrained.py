"""Answers that are JSON of a given JSON Schema: which tokens may come next, and when the answer is whole.

The grammar is llguidance's (MIT, one abi3 wheel for every Python and both architectures, what vLLM and OpenAI use): it
derives each mask from the schema while the answer grows, in some 50 µs, so nothing is precomputed for a vocabulary
and a schema is ready in a millisecond. The mask is laid on the logits before the sampler's own filters; log-
probabilities and entropy stay the model's own.

Nothing of a matcher is kept: what it has taken are tokens, and they make it again, here or on another node.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.errors import InvalidPrompt, ModelError, SnapshotRefused
from services.model_runner.generation import GenerationState
from services.model_runner.tokenizer import ModelTokenizer

MAX_SCHEMA_CHARACTERS = 65_536

_MOST_SCHEMAS = 64
"""Schemas kept ready: programs ask for the same ones again and again."""

_OPTIONS: Any = {
    "lenient": False,  # What the library does not know is refused, never left out.
    # Between two parts of the JSON: small models otherwise go on with blank lines for ever.
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,16}",
    "whitespace_flexible": True,
    "coerce_one_of": False,
    "item_separator": ",",
    "key_separator": ":",
}
"""Of the grammar; a schema cannot change them."""


class Constraint:
    """One answer's grammar: where it stands after the tokens that it has taken. Used by one thread at a time."""

    def __init__(self, schema: str, matcher: Any, vocab_size: int) -> None:
        self.schema = schema
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def ended(self) -> bool:
        """Whether the answer is whole, and nothing may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come next, shape (vocab_size,): an end of sequence where the answer is whole.

        Raises ModelError when the grammar has become too complex to go on with.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = np.unpackbits(bits, count=min(self._vocab_size, 8 * len(bits)), bitorder="little").view(np.bool_)
        if len(mask) < self._vocab_size:  # Logits are often wider than the tokenizer, for the hardware's sake.
            mask = np.concatenate((mask, np.zeros(self._vocab_size - len(mask), dtype=np.bool_)))
        return mask

    def take(self, token: int) -> None:
        """Go on by ``token``, one of those allowed. Raises ModelError for another."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ModelError(
                f"constraining an answer by its JSON schema: {_brief(self._matcher.get_error())}",
                hint="use a simpler schema",
                field="json_schema",
                reason="grammar failed",
            )


class Grammars:
    """Constraints for one model. Thread-safe.

    Args:
        tokenizer: the model's.
        vocab_size: how many logits it has.
        eos_token_ids: its ends of sequence.
    """

    def __init__(self, tokenizer: ModelTokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._eos = sorted(token for token in eos_token_ids if token < tokenizer.size)
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._ready: OrderedDict[str, Any] = OrderedDict()

    def check(self, schema: str) -> None:
        """Raises InvalidPrompt, naming ``json_schema``, unless answers can be constrained by ``schema``."""
        self._fresh(schema)

    def warm(self, schema: str) -> None:
        """Make ready what ``begin`` will need, on a thread that holds up nobody; says nothing of a bad schema."""
        with contextlib.suppress(InvalidPrompt):
            self._fresh(schema)

    def begin(self, schema: str, said: Sequence[int] = ()) -> Constraint:
        """The constraint of an answer, of which ``said`` has been said already.

        Raises InvalidPrompt as ``check``, and SnapshotRefused when what was said does not fit the schema.
        """
        matcher = self._fresh(schema)
        if said and matcher.try_consume_tokens(list(said)) != len(said):
            raise SnapshotRefused(
                f"going on with an answer of {len(said):,} tokens that a JSON schema constrains: they do not fit it",
                hint="begin the answer anew",
                field="json_schema",
                reason="tokens do not fit",
            )
        return Constraint(schema, matcher, self._vocab_size)

    def attach(self, state: GenerationState) -> None:
        """Give ``state`` the constraint that its settings ask for, where it stands. Raises as ``begin``."""
        schema, count = state.settings.json_schema, state.constrained_tokens
        if not schema:
            state.constraint = None
        elif state.constraint is None or state.constraint.schema != schema:
            state.constraint = self.begin(schema, state.tokens[len(state.tokens) - count :] if count else ())

    def _fresh(self, schema: str) -> Any:
        """A matcher at its beginning."""
        with self._lock:
            known = self._ready.get(schema)
            if known is None:
                known = self._ready[schema] = self._compile(schema)
                while len(self._ready) > _MOST_SCHEMAS:
                    self._ready.popitem(last=False)
            self._ready.move_to_end(schema)
            return known.deep_copy()

    def _compile(self, schema: str) -> Any:
        if len(schema) > MAX_SCHEMA_CHARACTERS:
            raise _refused(
                f"it has {len(schema):,} characters, at most {MAX_SCHEMA_CHARACTERS:,} are taken", "too long"
            )
        try:
            parsed = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise _refused(f"it is no JSON: {error}", "no JSON") from error
        if not isinstance(parsed, (dict, bool)):
            raise _refused("it is neither an object nor true or false", "no schema")
        if parsed is False:
            raise _refused("nothing fits false", "impossible")
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError as error:
            raise _refused(
                "this node has no llguidance",
                "llguidance is not installed",
                "install the package llguidance on the node",
            ) from error
        try:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(
                    self._source.to_json(),
                    n_vocab=max(self._vocab_size, self._source.size),
                    eos_token=self._eos or None,
                )
            # Options can be given with an object only, and {} says the same as true.
            grammar = LLMatcher.grammar_from_json_schema("{}" if parsed is True else schema, overrides=_OPTIONS)
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        except ValueError as error:
            raise _refused(_brief(str(error)), "unsupported") from error
        if matcher.is_error():
            raise _refused(_brief(matcher.get_error()), "invalid, unsupported or impossible")
        if not any(matcher.compute_bitmask()):
            raise _refused("no text fits it", "impossible")
        return matcher


def _refused(
    text: str, reason: str, hint: str = "correct the schema, or use fewer of JSON Schema's keywords"
) -> InvalidPrompt:
    return InvalidPrompt(
        f"setting up an answer by its JSON schema: {text}", hint=hint, field="json_schema", reason=reason
    )


def _brief(text: str) -> str:
    """The first line of what the library says, which may go on with the whole grammar."""
    line = " ".join(text.split("\n\n")[0].split())
    return line if len(line) <= 300 else f"{line[:300]}…"
