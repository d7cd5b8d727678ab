"""A process with one engine and one model, told what to do a line of JSON at a time.

Each engine has a process of its own: its memory is its own, and no other library's threads wait beside its own. They
are all there at once and take turns, so that what disturbs the machine disturbs all of them.
"""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import msgspec

from bench.engines.loading import Which, load
from protocol.errors import ModelError
from services.model_runner.engine import Engine
from services.model_runner.generation import GenerationSettings, GenerationState, accept, begin, generate
from services.model_runner.sampling import Sampler, SamplingSettings

_CHECKOUT = Path(__file__).resolve().parents[2]
_PROGRAM = "from bench.engines.child import main; main()"


class Told(msgspec.Struct, omit_defaults=True):
    """A command."""

    do: str
    """``read``, ``decode``, ``batch``, ``memory``."""
    prompts: list[list[int]] = []
    count: int = 0
    """New tokens of each."""


class Did(msgspec.Struct):
    """Its answer."""

    seconds: float = 0.0
    tokens: list[list[int]] = []
    rss_bytes: int = 0
    versions: str = ""
    error: str = ""


class Subject(ABC):
    """What is measured."""

    versions: str

    @abstractmethod
    def read(self, prompt: list[int]) -> float:
        """Read all but the last token into a fresh cache, which ``decode`` then goes on from; seconds."""

    @abstractmethod
    def decode(self, count: int) -> tuple[float, list[int]]:
        """``count`` greedy tokens after what was read last, which stays as it is; seconds and tokens."""


class OurEngine(Subject):
    """One of ours, through the generation loop that the model runner uses."""

    def __init__(self, which: Which) -> None:
        self._engine: Engine = load(which)
        self._base: GenerationState | None = None
        print_of = self._engine.fingerprint
        self.versions = f"{print_of.engine_version}, {print_of.device}, {print_of.dtype}, {print_of.threads} threads"

    def read(self, prompt: list[int]) -> float:
        if self._base is not None:
            self._base.cache.close()
        self._base = self._begin(prompt, 1)
        started = time.perf_counter()
        self._engine.prefill(self._base.cache, prompt[:-1])
        return time.perf_counter() - started

    def decode(self, count: int) -> tuple[float, list[int]]:
        base = self._base
        assert base is not None
        cache = self._engine.fork(base.cache, base.cache.length, base.cache.capacity_tokens)
        assert cache is not None
        settings = GenerationSettings(count, ignore_eos=True)
        state = GenerationState(list(base.tokens), cache, Sampler(SamplingSettings()), settings)
        started = time.perf_counter()
        tokens = [token.token for token in generate(self._engine, state)]
        seconds = time.perf_counter() - started
        cache.close()
        return seconds, tokens

    def batch(self, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
        """``count`` greedy tokens of each, computed together."""
        states = [self._begin(prompt, count) for prompt in prompts]
        for state in states:
            self._engine.prefill(state.cache, state.tokens[:-1])
        for _ in range(count):
            rows = self._engine.step_batch([(state.cache, state.tokens[-1]) for state in states])
            for state, logits in zip(states, rows, strict=True):
                accept(self._engine, state, logits)
        for state in states:
            state.cache.close()
        return [state.answer for state in states]

    def _begin(self, prompt: list[int], count: int) -> GenerationState:
        return begin(self._engine, prompt, settings=GenerationSettings(count, ignore_eos=True))


class Stock(Subject):
    """transformers' own model with its default cache, attention and ``generate``."""

    def __init__(self, which: Which) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self._torch = torch
        if which.threads:
            torch.set_num_threads(which.threads)
        dtype = "bfloat16" if which.dtype == "auto" else which.dtype
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            which.folder, dtype=getattr(torch, dtype), local_files_only=True
        )
        self._model = loaded
        self._model.to(which.device).eval()
        self._model.generation_config.eos_token_id = None
        self.versions = (
            f"torch {torch.__version__} transformers {transformers.__version__}, {dtype}, "
            f"{torch.get_num_threads()} threads"
        )
        self._prompt: list[int] = []
        self._cache: Any = None

    def read(self, prompt: list[int]) -> float:
        torch = self._torch
        self._cache = None
        self._prompt = prompt
        ids = torch.tensor([prompt[:-1]], device=self._model.device)
        with torch.inference_mode():
            started = time.perf_counter()
            self._cache = self._model(ids, use_cache=True, logits_to_keep=1).past_key_values
            self._wait()
            return time.perf_counter() - started

    def decode(self, count: int) -> tuple[float, list[int]]:
        torch = self._torch
        cache = copy.deepcopy(self._cache)
        ids = torch.tensor([self._prompt], device=self._model.device)
        with torch.inference_mode():
            self._wait()
            started = time.perf_counter()
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=count,
                do_sample=False,
            )
            tokens: list[int] = output[0, len(self._prompt) :].tolist()
            return time.perf_counter() - started, tokens

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            self._torch.cuda.synchronize()


class EngineProcess:
    """The process, seen from outside; to be used as a context."""

    def __init__(self, which: Which) -> None:
        self.which = which
        self.label = which.label
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, msgspec.json.encode(which).decode()],
            cwd=_CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.versions = ""

    def __enter__(self) -> EngineProcess:
        try:
            self.versions = self._answer().versions
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def read(self, prompt: Sequence[int]) -> float:
        """Seconds to read all but the last token."""
        return self._do(Told("read", [list(prompt)])).seconds

    def decode(self, count: int) -> tuple[float, list[int]]:
        """Seconds for ``count`` tokens after what was read last, and those tokens."""
        did = self._do(Told("decode", count=count))
        return did.seconds, did.tokens[0]

    def batch(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """``count`` tokens of each prompt, computed together."""
        return self._do(Told("batch", [list(prompt) for prompt in prompts], count)).tokens

    def rss_bytes(self) -> int:
        """Memory of the process that is in use now."""
        return self._do(Told("memory")).rss_bytes

    def _do(self, told: Told) -> Did:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(told) + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Did:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        did = msgspec.json.decode(line, type=Did) if line else Did(error=f"it ended with code {self._process.wait()}")
        if did.error:
            raise ModelError(f"measuring {self.label} in {self.which.folder}: {did.error}", reason="engine failed")
        return did

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()  # The end of its input ends it.
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _carry_out(subject: Subject, told: Told) -> Did:
    if told.do == "read":
        return Did(seconds=subject.read(told.prompts[0]))
    if told.do == "decode":
        seconds, tokens = subject.decode(told.count)
        return Did(seconds=seconds, tokens=[tokens])
    if told.do == "batch":
        if not isinstance(subject, OurEngine):
            raise ModelError("computing a batch with stock generate(): it is measured one prompt at a time")
        return Did(tokens=subject.batch(told.prompts, told.count))
    import psutil

    return Did(rss_bytes=psutil.Process().memory_info().rss)


def main() -> None:
    """The process."""
    which = msgspec.json.decode(sys.argv[1], type=Which)
    answers: IO[bytes] = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # libraries print

    def answer(did: Did) -> None:
        answers.write(msgspec.json.encode(did) + b"\n")

    try:
        subject = Stock(which) if which.kind == "stock" else OurEngine(which)
    except Exception as error:  # noqa: BLE001 - the benchmark is told, and says it
        answer(Did(error=f"{type(error).__name__}: {error}"))
        return
    answer(Did(versions=subject.versions))
    for line in itertools.takewhile(bool, sys.stdin):
        try:
            answer(_carry_out(subject, msgspec.json.decode(line, type=Told)))
        except Exception as error:  # noqa: BLE001 - the same
            answer(Did(error=f"{type(error).__name__}: {error}"))
