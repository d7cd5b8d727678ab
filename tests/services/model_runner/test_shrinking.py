"""Pruned snapshots and budgets, as they are asked for, on a small model with a real broker."""

from __future__ import annotations

import numpy as np
import pytest

from protocol.errors import ModelError
from services.model_runner.generation import generate
from services.model_runner.positions import positions_of
from services.model_runner.saving import read_extra
from tests.services.model_runner.test_saving import ANY, Node, bus, node

__all__ = ["bus", "node"]  # fixtures

PROMPT = "One sat. Then Ada came, 1843. " * 12


def test_a_conversation_is_saved_pruned_and_its_certificate_says_what_it_has_lost(node: Node) -> None:
    node.answer("talk", PROMPT)
    saved = node.save("talk", codec="lossless", prune="heavy:0.5")
    opened = node.opened(saved.snapshot)
    cached = opened.manifest.cached_tokens
    assert saved.kept_tokens == opened.manifest.kept_tokens == round(0.5 * cached)
    assert saved.fidelity is not None
    assert saved.fidelity.measured == ["mean_kl", "top1"]
    assert float(saved.fidelity.mean_kl or 0) > 0
    assert saved.ratio > 2
    (created,) = opened.provenance
    assert created.statement.details == {"kept": saved.kept_tokens, "of": cached, "by": "heavy"}
    assert node.resumed(saved.snapshot).how == "recomputed"
    resumed = node.resumed(saved.snapshot, lossy=True)
    assert (resumed.how, resumed.state.cache.pruned, resumed.state.cache.length) == ("lossy", True, cached)
    assert resumed.state.tokens == node.resumed(saved.snapshot).state.tokens
    whole = node.resumed(node.save("talk").snapshot)
    assert (whole.how, whole.state.cache.pruned) == ("exact", False)


@pytest.mark.parametrize("prune", ["last:100", "window:4,60", "anchors:0.4"])
def test_every_pruner_can_be_asked_for_with_a_rung(node: Node, prune: str) -> None:
    node.answer("talk", PROMPT)
    saved = node.save("talk", codec="int8", prune=prune, **ANY)
    assert (saved.codec, 0 < saved.kept_tokens < saved.tokens - 1) == ("int8", True)
    resumed = node.resumed(saved.snapshot, lossy=True)
    resumed.state.finish_reason = ""
    assert resumed.state.cache.pruned
    positions = positions_of(node.loaded.engine.export_layers(resumed.state.cache))
    assert positions is not None
    assert len(positions) == saved.kept_tokens
    list(generate(node.loaded.engine, resumed.state))


def test_what_was_said_to_be_salient_is_an_anchor_wherever_the_conversation_goes_on(node: Node) -> None:
    node.answer("talk", "what was said before " * 4)
    start = len(node.loaded.conversations.get("talk").state.tokens)
    node.answer("talk", "what matters " * 4, salience=1.0)
    end = len(node.loaded.conversations.get("talk").state.tokens)
    node.answer("talk", "what was said after " * 12)
    salient = [(start, 1.0), (end, 0.0)]
    assert node.loaded.conversations.get("talk").salient == salient

    def kept(identifier: str) -> int:
        held = positions_of(node.loaded.engine.export_layers(node.resumed(identifier, lossy=True).state.cache))
        assert held is not None
        return int(((held >= start) & (held < end)).sum())

    pruned = node.save("talk", prune="anchors:0.5", **ANY)
    node.loaded.conversations.get("talk").salient.clear()
    other = node.save("talk", prune="anchors:0.5", **ANY)
    assert kept(pruned.snapshot) > kept(other.snapshot)
    opened = node.opened(pruned.snapshot)
    assert read_extra(opened.manifest, opened.private).salient == salient
    # Of a snapshot as of a conversation.
    node.loaded.conversations.get("talk").salient.extend(salient)
    made = node.transcode(node.save("talk").snapshot, codec="raw", prune="anchors:0.5", **ANY)
    assert kept(made.snapshot) == kept(pruned.snapshot)


def test_a_snapshot_is_pruned_with_its_way_and_the_first_one_stays(node: Node) -> None:
    node.answer("talk", PROMPT)
    source = node.save("talk", label="kept")
    made = node.transcode(source.snapshot, codec="lossless", prune="window:4,100")
    opened = node.opened(made.snapshot)
    assert [step.statement.kind for step in opened.provenance] == ["created", "pruned"]
    details = opened.provenance[1].statement.details
    cached = opened.manifest.cached_tokens
    assert details == {"from": bytes.fromhex(source.snapshot), "kept": 104, "of": cached, "by": "window"}
    assert (made.kept_tokens, made.label) == (104, "kept")
    again = node.transcode(made.snapshot, codec="lossless", prune="window:4,50")
    chain = node.opened(again.snapshot).provenance
    assert [step.statement.kind for step in chain] == ["created", "pruned", "pruned"]
    assert again.kept_tokens == 54
    coded = node.transcode(made.snapshot, codec="int8", **ANY)
    assert node.opened(coded.snapshot).provenance[-1].statement.kind == "transcoded"
    assert coded.kept_tokens == 104
    assert node.resumed(source.snapshot).how == "exact"


@pytest.mark.parametrize("ratio", [3.0, 7.0])
def test_a_budget_is_met_and_what_was_tried_is_told(node: Node, ratio: float) -> None:
    node.answer("talk", PROMPT)
    saved = node.save("talk", budget_ratio=ratio, **ANY)
    assert saved.ratio >= ratio
    assert saved.fidelity is not None
    assert saved.fidelity.tested_tokens > 0
    assert saved.tried
    resumed = node.resumed(saved.snapshot, lossy=True)
    assert resumed.state.cache.pruned == (0 < saved.kept_tokens < saved.tokens - 1)
    logits = node.loaded.engine.step(resumed.state.cache, resumed.state.tokens[-1])
    assert np.isfinite(logits).all()


def test_a_budget_that_costs_more_than_is_allowed_is_refused_with_its_figures(node: Node) -> None:
    node.answer("talk", PROMPT)
    before = node.store.identifiers()
    with pytest.raises(ModelError, match="mean KL") as caught:
        node.save("talk", budget_ratio=7.0, most_kl=1e-9)
    assert caught.value.reason == "not faithful enough"
    assert node.store.identifiers() == before


def test_a_pruner_and_a_rung_can_be_named_for_a_budget(node: Node) -> None:
    node.answer("talk", PROMPT)
    saved = node.save("talk", codec="rotated4", prune="window:0.8", budget_ratio=6.0, **ANY)
    assert saved.codec == "rotated4"
    assert saved.ratio >= 6
    assert saved.kept_tokens < 0.8 * saved.tokens
    assert node.opened(saved.snapshot).provenance[0].statement.details["by"] == "window"


def test_an_engine_without_explicit_positions_prunes_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.answer("talk", PROMPT)
    monkeypatch.setattr(node.loaded.engine, "explicit_positions", False)
    with pytest.raises(ModelError) as caught:
        node.save("talk", prune="heavy:0.5")
    assert (caught.value.field, caught.value.reason) == ("wishes.prune", "no explicit positions")
    saved = node.save("talk", budget_ratio=3.0, **ANY)
    assert (saved.codec, saved.kept_tokens) == ("rotated4", 0)
    with pytest.raises(ModelError, match="no rung"):
        node.save("talk", budget_ratio=50.0, **ANY)


def test_a_wish_that_cannot_be_read_saves_nothing(node: Node) -> None:
    node.answer("talk", PROMPT)
    with pytest.raises(ModelError, match="no pruner"):
        node.save("talk", prune="half")
