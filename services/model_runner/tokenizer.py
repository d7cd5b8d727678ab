"""A model's tokenizer and chat template as its folder holds them, without transformers and without torch.

What transformers' AutoTokenizer makes of the same folder, it makes as well, token for token and letter for letter (a
test holds that), in a quarter of a second instead of several and without its memory. Only a folder that has no
``tokenizer.json`` (a GGUF file, or SentencePiece alone) is read through transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from protocol.errors import ModelUnavailable

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that a template may name."""


class ModelTokenizer:
    """Token ids and text, both ways."""

    def __init__(self, tokenizer: Tokenizer, template: str, named: Mapping[str, str]) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.template = template
        """The chat template's source; empty where there is none."""
        self._named = dict(named)
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = {token for token, row in added.items() if row.special}
        self._names = {row.content for row in added.values() if row.special and row.content}
        self._name_lengths = sorted({len(name) for name in self._names}, reverse=True)
        # There may be thousands of names, nearly all of which begin with one character.
        self._name_starts = re.compile(
            f"[{re.escape(''.join(sorted({name[0] for name in self._names})))}]" if self._names else r"(?!)"
        )
        # What a normalizer makes the name of a token: full-width letters, for example.
        self._normalizes = tokenizer.normalizer is not None and any(
            row.special and row.normalized for row in added.values()
        )
        self._plain: Tokenizer | None = None
        self._compiled: jinja2.Template | None = None

    @classmethod
    def load(cls, folder: Path, gguf_file: str = "") -> ModelTokenizer:
        """From a model folder, or from the GGUF file in it; nothing is fetched. Raises ModelUnavailable."""
        try:
            if gguf_file or not (folder / "tokenizer.json").is_file():
                return cls._through_transformers(folder, gguf_file)
            return cls._from_files(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            reason = type(error).__name__
            text = str(error)
        except Exception as error:
            if type(error) is not Exception:  # What the tokenizers library raises has no type of its own.
                raise
            reason, text = "damaged", str(error)
        raise ModelUnavailable(
            f"loading the tokenizer in {folder}: {text}",
            hint="install the model again: its folder is not complete",
            reason=reason,
        )

    @classmethod
    def _from_files(cls, folder: Path) -> ModelTokenizer:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = _json(folder / "tokenizer_config.json")
        special = {**_json(folder / "special_tokens_map.json"), **config}
        named = {name: _content(special[name]) for name in _NAMED if special.get(name) is not None}
        # Some folders name tokens here that their tokenizer.json does not know, or does not know as special.
        known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        listed: Mapping[str, Any] = config.get("added_tokens_decoder") or {}
        for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
            if entry["content"] not in known:
                token = AddedToken(**{key: entry[key] for key in entry if key != "special"}, special=entry["special"])
                (tokenizer.add_special_tokens if entry["special"] else tokenizer.add_tokens)([token])
                known[entry["content"]] = token
        for content in named.values():
            if content not in known or not known[content].special:
                tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False)])
        return cls(tokenizer, _template(folder, config), named)

    @classmethod
    def _through_transformers(cls, folder: Path, gguf_file: str) -> ModelTokenizer:
        from transformers import AutoTokenizer

        source = {"gguf_file": gguf_file} if gguf_file else {}
        theirs: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **source)
        template = theirs.chat_template or ""
        return cls(theirs.backend_tokenizer, template if isinstance(template, str) else "", theirs.special_tokens_map)

    @property
    def size(self) -> int:
        """One more than the largest token id."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def to_json(self) -> str:
        """As a ``tokenizer.json`` holds it, all added tokens included."""
        return self._tokenizer.to_str()

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of ``text``; with ``special`` what the model puts around a text is put around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def special_names(self, text: str) -> list[tuple[int, int]]:
        """Where special tokens are written out in ``text``: (start, end) of each, in order."""
        found: list[tuple[int, int]] = []
        at = 0
        for match in self._name_starts.finditer(text):
            start = match.start()
            if start < at:
                continue
            for length in self._name_lengths:
                if text[start : start + length] in self._names:
                    at = start + length
                    found.append((start, at))
                    break
        if found or not self._normalizes:
            return found
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token in self._special_ids]

    def encode_quoted(self, text: str) -> list[int]:
        """Token ids of ``text`` as letters, whatever tokens it is the name of."""
        if self._plain is None:
            plain = Tokenizer.from_str(self._tokenizer.to_str())
            plain.encode_special_tokens = True
            self._plain = plain
        return _within(self._plain, text)

    def encode_after(self, text: str) -> list[int]:
        """Token ids of ``text`` where other text stands before it: some tokenizers put a space before the first."""
        return _within(self._tokenizer, text)

    def decode(self, tokens: Sequence[int], *, special: bool) -> str:
        """Text of ``tokens``; with ``special`` the special tokens are written out."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=not special)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The template's text for ``messages``, up to where the assistant speaks. Raises jinja2.TemplateError."""
        if self._compiled is None:
            self._compiled = _environment().from_string(self.template)
        return self._compiled.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **self._named,
        )


def _within(tokenizer: Tokenizer, text: str) -> list[int]:
    for before in ("\n", "a"):
        first = tokenizer.encode(before, add_special_tokens=False).ids
        both = tokenizer.encode(before + text, add_special_tokens=False).ids
        if both[: len(first)] == first:
            return list(both[len(first) :])
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return found


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _template(folder: Path, config: Mapping[str, Any]) -> str:
    """The chat template: a file of its own, or in the configuration, where there may be several."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template") or ""
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default", "")
    if not isinstance(found, str):
        raise ValueError("its chat template is no text")
    return found


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, by which templates mark what the assistant said: here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.Environment:
    """What chat templates are written for (transformers' own environment): sandboxed, for they come from outside."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja's own escapes what HTML would take amiss.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)  # noqa: DTZ005 - the date that the user's clock shows

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
