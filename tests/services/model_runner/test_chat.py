"""Text out of tokens without cut characters, stop texts, and turns that keep the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from protocol.errors import InvalidPrompt, ModelUnavailable
from services.model_runner.chat import ChatFormat

EOS = 257


@pytest.fixture(scope="session")
def chat(small_models: dict[str, Path]) -> ChatFormat:
    return ChatFormat.load(small_models["llama"])


def spoken(chat: ChatFormat, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = chat.stream(stop)
    parts = [stream.push(token) for token in tokens]
    parts.append(stream.finish())
    assert "".join(parts) == stream.text
    return parts, stream.stopped


@hypothesis_settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_comes_out_whole_when_every_byte_is_a_token(chat: ChatFormat, text: str) -> None:
    parts, _ = spoken(chat, chat.encode(text, special=False))
    assert "".join(parts) == text
    for part in parts:
        assert part == "" or part in text  # No part of a character is ever given out.


def test_a_character_is_given_out_with_its_last_byte(chat: ChatFormat) -> None:
    parts, _ = spoken(chat, chat.encode("é😀!", special=False))
    assert parts == ["", "é", "", "", "", "😀", "!", ""]


def test_bytes_that_are_no_text_do_not_hold_up_the_answer_for_ever(chat: ChatFormat) -> None:
    broken = chat.encode("😀", special=False)[:1] * 40 + chat.encode("done", special=False)
    stream = chat.stream()
    assert "".join(stream.push(token) for token in broken).endswith("done")


def test_an_unfinished_character_is_shown_at_the_end(chat: ChatFormat) -> None:
    parts, _ = spoken(chat, chat.encode("a😀", special=False)[:-1])
    assert "".join(parts) == "a\N{REPLACEMENT CHARACTER}"


def test_a_stop_text_is_found_across_tokens_and_is_not_part_of_the_answer(chat: ChatFormat) -> None:
    parts, stopped = spoken(chat, chat.encode("one END two", special=False), ("END", "never"))
    assert ("".join(parts), stopped) == ("one ", True)


def test_what_only_begins_like_a_stop_text_is_given_out(chat: ChatFormat) -> None:
    parts, stopped = spoken(chat, chat.encode("EN, EEND", special=False), ("ENDE",))
    assert ("".join(parts), stopped) == ("EN, EEND", False)
    parts, stopped = spoken(chat, chat.encode("aab aaab", special=False), ("aaab",))
    assert ("".join(parts), stopped) == ("aab ", True)


def test_the_earliest_stop_text_wins(chat: ChatFormat) -> None:
    stream = chat.stream(("cd", "b"))
    assert "".join(stream.push(token) for token in chat.encode("abcd", special=False)) == "a"


def test_the_end_of_sequence_is_no_text(chat: ChatFormat) -> None:
    parts, _ = spoken(chat, [*chat.encode("bye", special=False), EOS])
    assert "".join(parts) == "bye"


def test_a_stream_fed_what_was_said_elsewhere_stands_where_the_other_stood(chat: ChatFormat) -> None:
    tokens = chat.encode("süß END", special=False)
    for at in range(len(tokens)):
        first, second = chat.stream(("END",)), chat.stream(("END",))
        said = "".join(first.push(token) for token in tokens[:at])
        assert "".join(second.push(token) for token in tokens[:at]) == said
        rest = "".join(second.push(token) for token in tokens[at:]) + second.finish()
        assert said + rest == "süß "


USER = {"role": "user", "content": "Hi"}


def test_a_next_turn_reads_only_what_is_new(chat: ChatFormat) -> None:
    held = [*chat.prompt([USER]), *chat.encode("Hello!", special=False), EOS]
    turn = chat.next_turn(held, [USER, {"role": "assistant", "content": "Hello!"}, USER])
    assert turn.extends
    assert chat.decode(turn.tokens, special=True) == "\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    # The answer was cut by its length: the end of sequence is read with the next turn.
    turn = chat.next_turn(held[:-1], [USER, {"role": "assistant", "content": "Hello!"}, USER])
    assert turn.extends
    assert turn.tokens[0] == EOS


def test_a_changed_history_is_read_afresh(chat: ChatFormat) -> None:
    held = [*chat.prompt([USER]), *chat.encode("Hello!", special=False), EOS]
    messages = [USER, {"role": "assistant", "content": "Changed"}, USER]
    assert chat.next_turn(held, messages) == (False, chat.prompt(messages))


def test_a_first_turn_is_the_whole_prompt(chat: ChatFormat) -> None:
    assert chat.next_turn([], [USER]) == (False, chat.prompt([USER]))


def test_what_the_template_refuses_is_an_invalid_prompt(chat: ChatFormat) -> None:
    with pytest.raises(InvalidPrompt, match="no narrator here"):
        chat.prompt([{"role": "narrator", "content": "once"}])
    with pytest.raises(InvalidPrompt, match="no messages"):
        chat.prompt([])


def test_a_base_model_has_no_chat(chat: ChatFormat, small_models: dict[str, Path], tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((small_models["llama"] / name).read_bytes())
    base = ChatFormat.load(tmp_path)
    assert not base.has_template
    assert base.encode("abc")
    with pytest.raises(ModelUnavailable, match="base model"):
        base.prompt([USER])


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="loading the tokenizer"):
        ChatFormat.load(tmp_path)


def test_a_piece_is_a_tokens_text_within_a_text(chat: ChatFormat) -> None:
    space, letter, part = chat.encode(" xé", special=False)[:3]
    assert [chat.piece(token) for token in (space, letter, part, EOS)] == [
        " ",
        "x",
        "\N{REPLACEMENT CHARACTER}",
        "<|im_end|>",
    ]
