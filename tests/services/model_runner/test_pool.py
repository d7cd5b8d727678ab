"""The pool between model runners on a real broker: what one has read, the others fetch; who lies is found out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.embedded import EmbeddedBroker
from edge.group_keys import GroupKeys
from protocol.errors import UnknownPeer
from protocol.layout import BLOCK_TOKENS
from protocol.pool import read_witness, read_witnesses
from tests.services.model_runner.pool_nodes import BLOCKS, LyingEngine, OtherEngine, PoolNode, prompt, site, wait_heard
from tests.support.waiting import wait_for


@pytest.fixture(scope="module")
def broker_url() -> Iterator[str]:
    with EmbeddedBroker() as broker:
        yield broker.url


@pytest.fixture(scope="module")
def model(small_models: dict[str, Path]) -> Path:
    return small_models["llama"]


def wait_counted(node: PoolNode, counter: str, count: int) -> None:
    wait_for(lambda: node.counters.get(counter, 0) >= count, f"{node.name} has not counted {count} {counter}")


def agreed(node: PoolNode) -> set[str]:
    """Who agrees with every block that a node has put into its pool itself."""
    store, keyring = node.pool.store, node.peers.keyring()
    own = [held.identifier for held in store.all() if held.creator == node.name]
    said = [read_witnesses(store.statements(each), keyring) for each in own]
    return (
        set.intersection(*({each.node for each in one if each.agrees} for one in said)) if len(own) == BLOCKS else set()
    )


def test_a_node_goes_on_from_what_another_has_read_and_says_the_same(
    tmp_path: Path, broker_url: str, model: Path
) -> None:
    with site(tmp_path, broker_url, model, "tomato", "sprout") as (talker, (tomato, sprout)):
        tomato.start()
        sprout.start()
        read = talker.ask(tomato, prompt())
        assert read.usage is not None
        assert read.usage.pooled_tokens == 0
        tomato.wait_entries(BLOCKS)
        wait_heard(sprout, tomato.name, prompt())
        fetched = talker.ask(sprout, prompt())
        assert fetched.tokens == read.tokens
        assert fetched.usage is not None
        assert fetched.usage.pooled_tokens == BLOCKS * BLOCK_TOKENS
        assert (fetched.usage.pooled_from, fetched.usage.pooled_how) == (["tomato"], "exact")
        assert fetched.usage.cached_tokens == BLOCKS * BLOCK_TOKENS
        # It keeps what it has fetched, and is asked for it when the other is away.
        sprout.wait_entries(BLOCKS)
        assert sprout.counters["pool.kept"] == BLOCKS


def test_a_node_that_joins_later_is_given_the_group_key_and_one_that_is_not_trusted_is_not(
    tmp_path: Path, broker_url: str, model: Path
) -> None:
    with site(tmp_path, broker_url, model, "tomato", "sprout") as (talker, (tomato, sprout)):
        stranger = PoolNode(tmp_path, "stranger", broker_url, model)
        stranger.peers.trust("tomato", tomato.identity.fingerprint)
        tomato.start()
        talker.ask(tomato, prompt())
        tomato.wait_entries(BLOCKS)
        sprout.start()
        stranger.start()
        try:
            wait_heard(sprout, tomato.name, prompt())
            assert GroupKeys(sprout.root, sprout.identity, sprout.peers).versions()
            wait_for(lambda: stranger.pool.peers.no_key_of == {"tomato"}, "the stranger has not heard of the pool")
            with pytest.raises(UnknownPeer):
                stranger.pool.peers.ask_for_key("tomato")
            assert GroupKeys(stranger.root, stranger.identity, stranger.peers).versions() == []
            assert stranger.pool.look(prompt(), 0) is None
        finally:
            stranger.stop()


def test_a_node_finds_what_it_has_read_before_it_was_started_again(
    tmp_path: Path, broker_url: str, model: Path
) -> None:
    with site(tmp_path, broker_url, model, "tomato") as (talker, (tomato,)):
        tomato.start()
        read = talker.ask(tomato, prompt())
        tomato.wait_entries(BLOCKS)
        tomato.stop()
        tomato.start()
        wait_for(lambda: tomato.entries == BLOCKS, "the entries are not found again")
        again = talker.ask(tomato, prompt())
        assert again.usage is not None
        assert again.tokens == read.tokens
        assert (again.usage.pooled_tokens, again.usage.pooled_how) == (BLOCKS * BLOCK_TOKENS, "exact")


def test_what_was_damaged_on_the_disk_is_read_again_and_removed(tmp_path: Path, broker_url: str, model: Path) -> None:
    with site(tmp_path, broker_url, model, "tomato") as (talker, (tomato,)):
        tomato.start()
        read = talker.ask(tomato, prompt())
        tomato.wait_entries(BLOCKS)
        tomato.stop()
        files = sorted((tomato.root / "model_runner" / "pool" / "entries").iterdir())
        last = next(each for each in files if not each.name.split(".")[1].startswith("0" * 32))
        body = bytearray(last.read_bytes())
        body[-1000] ^= 1
        last.write_bytes(body)
        tomato.start()
        wait_for(lambda: tomato.entries == BLOCKS, "the entries are not found again")
        again = talker.ask(tomato, prompt())
        assert again.tokens == read.tokens
        assert again.usage is not None
        assert again.usage.pooled_tokens == BLOCK_TOKENS, "the first block is whole"
        assert tomato.counters["pool.damaged"] == 1
        tomato.wait_entries(BLOCKS)  # it was read again, and put in again


def test_a_node_whose_kv_is_altered_is_found_out_by_others_and_its_entries_set_aside_everywhere(
    tmp_path: Path, broker_url: str, model: Path
) -> None:
    with site(tmp_path, broker_url, model, "liar", "tomato", "sprout") as (talker, (liar, tomato, sprout)):
        liar.engine_class = LyingEngine
        for node in (liar, tomato, sprout):
            node.start()
        talker.ask(liar, prompt())
        liar.wait_entries(BLOCKS)
        for node in (tomato, sprout):
            wait_heard(node, liar.name, prompt())
        tomato.pool.rates.read_s = lambda start, end: 0.0  # reading is quick there, so nothing is fetched
        read = talker.ask(tomato, prompt())
        assert read.usage is not None
        assert read.usage.pooled_tokens == 0
        lies = {held.identifier for held in liar.pool.store.all() if held.creator == "liar"}
        assert len(lies) == BLOCKS
        for node in (liar, tomato, sprout):
            wait_for(lambda node=node: said_against(node, lies), f"{node.name} has not heard of it")  # type: ignore[misc]
        # Word against word: nobody's entries are used before a third has read it.
        assert not liar.pool._here([held.name for held in liar.pool.store.all() if held.creator == "liar"])
        third = talker.ask(sprout, prompt())
        assert third.usage is not None
        assert "liar" not in third.usage.pooled_from
        assert third.tokens == read.tokens
        wait_for(lambda: talker.events("pool-set-aside") >= {"liar", "tomato", "sprout"}, "not all have said so")


def said_against(node: PoolNode, entries: set[str]) -> bool:
    """Whether a node has heard of disagreement with all of these."""
    keyring = node.peers.keyring()
    said = [read_witnesses(node.pool.store.statements(each), keyring) for each in entries]
    return all(any(not each.agrees for each in statements) for statements in said)


@pytest.mark.slow
def test_two_who_have_read_the_same_outweigh_one_that_says_otherwise(
    tmp_path: Path, broker_url: str, model: Path
) -> None:
    names = ("liar", "tomato", "sprout", "basil")
    with site(tmp_path, broker_url, model, *names) as (talker, (liar, tomato, sprout, basil)):
        liar.engine_class = LyingEngine
        for node in (liar, tomato, sprout):
            node.start()
            node.pool.rates.read_s = lambda start, end: 0.0
            talker.ask(node, prompt())
            node.wait_entries(BLOCKS)
        # Until then it is one word against one. Sprout may never have seen tomato's, set aside before it joined.
        wait_for(lambda: agreed(sprout) == {"tomato"}, "sprout has not heard that tomato agrees")
        basil.start()

        def vindicated() -> bool:
            plan = basil.pool.look(prompt(), 0)
            return plan is not None and plan.blocks == BLOCKS and plan.holder in ("tomato", "sprout")

        wait_for(vindicated, "what two agree on is not announced")
        said = talker.ask(basil, prompt())
        assert said.usage is not None
        assert said.usage.pooled_tokens == BLOCKS * BLOCK_TOKENS
        assert set(said.usage.pooled_from) <= {"tomato", "sprout"}


@pytest.mark.slow
def test_with_a_quorum_entries_are_used_once_so_many_others_agree(tmp_path: Path, broker_url: str, model: Path) -> None:
    names = ("tomato", "sprout", "garlic", "basil")
    settings = {"trust": "quorum", "quorum": 2}
    with site(tmp_path, broker_url, model, *names, **settings) as (talker, (tomato, sprout, garlic, basil)):
        for node in (tomato, sprout, garlic, basil):
            node.start()
        first = talker.ask(tomato, prompt())
        tomato.wait_entries(BLOCKS)
        for node in (sprout, garlic):  # one witness is not enough for the next
            wait_heard(node, tomato.name, prompt())
            read = talker.ask(node, prompt())
            assert read.usage is not None
            assert read.usage.pooled_tokens == 0
            wait_counted(node, "pool.witnessed", BLOCKS)
        # Any of the three may be who basil asks.
        read_by = {tomato.name: tomato, sprout.name: sprout, garlic.name: garlic}
        for name, node in read_by.items():
            others = read_by.keys() - {name}
            wait_for(
                lambda node=node, others=others: agreed(node) == others,  # type: ignore[misc]
                f"{name} has not heard both witnesses of all it has",
            )
        wait_heard(basil, tomato.name, prompt())
        trusted = talker.ask(basil, prompt())
        assert trusted.usage is not None
        assert trusted.usage.pooled_tokens == BLOCKS * BLOCK_TOKENS
        assert trusted.tokens == first.tokens


@pytest.mark.slow
def test_who_has_read_the_same_before_compares_it_as_soon_as_it_is_announced(
    tmp_path: Path, broker_url: str, model: Path
) -> None:
    with site(tmp_path, broker_url, model, "tomato", "liar") as (talker, (tomato, liar)):
        liar.engine_class = LyingEngine
        tomato.start()
        talker.ask(tomato, prompt())
        tomato.wait_entries(BLOCKS)
        liar.start()
        wait_heard(liar, tomato.name, prompt())
        liar.pool.rates.read_s = lambda start, end: 0.0
        talker.ask(liar, prompt())
        wait_counted(tomato, "pool.disagreed", 2 * BLOCKS)  # each has said it of the other


@pytest.mark.parametrize("accept", ["close", "exact"])
def test_entries_of_other_numerics_are_close_where_that_is_accepted_and_witnesses_tolerate_little(
    tmp_path: Path, broker_url: str, model: Path, accept: str
) -> None:
    with site(tmp_path, broker_url, model, "other", "tomato", accept=accept) as (talker, (other, tomato)):
        other.engine_class, other.other_numerics = OtherEngine, True
        other.start()
        tomato.start()
        talker.ask(other, prompt())
        other.wait_entries(BLOCKS)
        wait_heard(tomato, other.name, prompt())
        said = talker.ask(tomato, prompt())
        assert said.usage is not None
        if accept == "exact":
            assert said.usage.pooled_tokens == 0
            wait_counted(tomato, "pool.witnessed", BLOCKS)
            statement = tomato.pool.store.statements(other.pool.store.all()[0].identifier)[0]
            witness = read_witness(statement, tomato.peers.keyring())
            assert (witness.agrees, witness.how) == (True, "close")
            assert 0 < witness.error < 0.1
        else:
            assert (said.usage.pooled_tokens, said.usage.pooled_how) == (BLOCKS * BLOCK_TOKENS, "close")
            assert said.usage.pooled_from == ["other"]
            # What rests on another's word is neither put in nor vouched for.
            longer = talker.ask(tomato, prompt(blocks=BLOCKS + 1))
            assert longer.usage is not None
            assert tomato.counters.get("pool.put") is None
