"""A snapshot of another variant: read under a certificate, refused without one, its tokens read again."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make install (extra `model`)")

from protocol.manifest import open_private  # noqa: E402
from protocol.sealing import DataKey  # noqa: E402
from protocol.variants import Variant  # noqa: E402
from services.model_runner import snapshot  # noqa: E402
from services.model_runner.codecs.int8 import Int8  # noqa: E402
from services.model_runner.engine import Engine  # noqa: E402
from services.model_runner.generation import begin  # noqa: E402
from services.model_runner.pairing import variant_settings  # noqa: E402
from services.model_runner.snapshot import Packed, pack, read, restore  # noqa: E402
from services.model_runner.transformers_engine import TransformersEngine  # noqa: E402
from services.model_runner.variants import Permit, variant_of  # noqa: E402

KEY = DataKey(bytes(32))
TOKENS = [(index * index * 3 + 5 * index) % 256 for index in range(300)]


@pytest.fixture(scope="module")
def short(small_models: dict[str, Path]) -> TransformersEngine:
    return TransformersEngine.load(small_models["llama"], device="cpu", dtype="bfloat16", threads=1)


@pytest.fixture(scope="module")
def wide(small_models: dict[str, Path]) -> TransformersEngine:
    return TransformersEngine.load(small_models["llama"], device="cpu", dtype="float32", threads=1)


def packed(engine: Engine, **wishes: object) -> Packed:
    state = begin(engine, TOKENS, capacity_tokens=400)
    engine.prefill(state.cache, TOKENS[:-1])
    return pack(engine, state, conversation="garden", creator="tomato", key=KEY, **wishes)  # type: ignore[arg-type]


def read_on(engine: Engine, made: Packed, variant: Permit | None, lossy: bool = False) -> snapshot.Unpacked:
    private = open_private(made.manifest, KEY)
    return restore(engine, read(engine, made.manifest, private, KEY, made.chunks, variant=variant, lossy=lossy))


def test_without_a_permit_the_tokens_are_read_again(short: TransformersEngine, wide: TransformersEngine) -> None:
    found = read_on(wide, packed(short), None)
    assert (found.how, found.state.cache.length) == ("recomputed", 0)
    assert "dtype" in found.reason


@pytest.mark.parametrize(("computed", "recent"), [(0, 0), (2, 0), (0, 50)])
def test_with_one_the_kv_is_used_in_the_dtype_that_the_model_has(
    short: TransformersEngine, wide: TransformersEngine, computed: int, recent: int
) -> None:
    for source, target in ((short, wide), (wide, short)):
        found = read_on(target, packed(source), Permit(variant_of(source), computed, "by a certificate", recent))
        assert (found.how, found.reason, found.logits) == ("variant", "by a certificate", None)
        assert found.state.tokens == TOKENS
        assert found.state.cache.length == len(TOKENS) - 1
        own = target.new_cache(400)
        target.prefill(own, TOKENS[:-1])
        expected, step = target.step(own, TOKENS[-1]), target.step(found.state.cache, TOKENS[-1])
        assert 0 < abs(expected - step).max() < 0.5


def test_logits_of_another_variant_are_no_check_of_the_first_step(
    short: TransformersEngine, wide: TransformersEngine
) -> None:
    state = begin(short, TOKENS, capacity_tokens=400)
    short.prefill(state.cache, TOKENS[:-1])
    logits = short.step(short.fork(state.cache, len(TOKENS) - 1, 400), TOKENS[-1])  # type: ignore[arg-type]
    found = read_on(wide, packed(short, logits=logits), Permit(variant_of(short), 0, ""))
    assert found.logits is None


def test_a_permit_of_another_variant_permits_nothing(short: TransformersEngine, wide: TransformersEngine) -> None:
    other = msgspec.structs.replace(variant_of(short), dtype="float16")
    assert read_on(wide, packed(short), Permit(other, 0, "")).how == "recomputed"


def test_a_codec_that_is_not_exact_is_still_asked_for(short: TransformersEngine, wide: TransformersEngine) -> None:
    made = packed(short, codec=Int8())
    by_certificate = Permit(Variant.of(made.manifest.digests, made.manifest.fingerprint), 1, "by a certificate")
    assert read_on(wide, made, by_certificate).how == "recomputed"
    assert read_on(wide, made, by_certificate, lossy=True).how == "variant"


def test_kv_of_other_shapes_is_refused_before_anything_is_allocated(
    small_models: dict[str, Path], short: TransformersEngine
) -> None:
    from protocol.errors import SnapshotRefused

    other = TransformersEngine.load(small_models["gemma3"], device="cpu", dtype="float32", threads=1)
    made = packed(short)
    with pytest.raises(SnapshotRefused, match="layers"):
        read_on(other, made, Permit(variant_of(short), 0, ""))
    huge = msgspec.structs.replace(made.manifest, kv_dtype="float64")
    with pytest.raises(SnapshotRefused, match="kv_dtype"):
        snapshot.intake(short, huge, open_private(made.manifest, KEY), KEY, None, Permit(variant_of(short), 0, ""))


def test_a_variant_is_named_by_precision_or_adapter(tmp_path: Path) -> None:
    from edge.config import ModelConfig
    from protocol.errors import ConfigError

    own = ModelConfig(adapter="/adapters/mine")
    assert variant_settings(own, "own") == own
    named = {name: variant_settings(own, name) for name in ("transformers", "int4", str(tmp_path))}
    assert [(each.engine, each.precision, each.adapter) for each in named.values()] == [
        ("transformers", "auto", ""),
        ("onnx", "int4", ""),
        ("transformers", "auto", str(tmp_path)),
    ]
    with pytest.raises(ConfigError, match="neither"):
        variant_settings(own, "int5")
