"""How much there is of everything, without a clock: ops per layer, rows of the head, large allocations, threads.

How many graphs are compiled, and that no more come, is in test_compile.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jaxtyping
import psutil
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from dispec import LLM, SamplingParams
from dispec.engine.scheduling.scheduler_output import SchedulerOutput
from dispec.layers.config import ModelConfig
from dispec.layers.model import decoder_layer, logits
from dispec.ops.cpu.library import has_packed_linear
from tests import commands
from tests.allocations import largest_allocation, smallest_matrix_or_cache
from tests.checkpoints import save_tiny
from tests.running_server import serving

LAYERS = 3
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=500,
    hidden_size=128,
    intermediate_size=192,
    num_layers=LAYERS,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=640,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
# Calls of our ops in one layer, and other operations that compute something, in bf16 with the CPU's own kernels.
# Views are free; every other call costs its dispatch, which at one sequence is a third of a step.
OPS_PER_LAYER = {"tiled_linear": 4, "rope_write": 1, "paged_attention": 1}
OTHERS_PER_LAYER = 0
OTHERS_PER_STEP = 9  # zeroed inputs, embeddings, rotation, rows of the head, argmax


def make(**options) -> LLM:
    fixed = {"load_format": "dummy", "device": "cpu", "kv_cache_memory": "4MiB", "max_num_seqs": 16}
    return LLM(CONFIG, **fixed | {"dtype": "bfloat16", "enforce_eager": True} | options)


def greedy(max_tokens: int = 8) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def steps(llm: LLM, prompts: dict[int, int]) -> Iterator[SchedulerOutput]:
    """Steps that are scheduled but not run, which is for who reads them; `prompts` are lengths and their numbers."""
    engine = llm.engine
    for length, count in prompts.items():
        for index in range(count):
            engine.add([(7 * index + token) % 500 for token in range(length)], greedy())
    while engine.has_work:
        step = engine.scheduler.schedule()
        yield step
        engine.scheduler.commit(step, engine.runner.run(step))


class Calls(TorchDispatchMode):
    """Counts the operations that are called, those that only look at a tensor in another way excepted."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func._schema.name.split("::")
        if space == "dispec":
            self.ours[name] += 1
        elif not func.is_view and name not in ("empty", "detach", "_unsafe_view"):
            self.others[name] += 1
        return func(*args, **kwargs or {})


@contextmanager
def unchecked() -> Iterator[None]:
    """Shape checks look at tensors, which are calls as well."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.skipif(not has_packed_linear(), reason="needs the CPU's own kernels")
@pytest.mark.parametrize("kind", ["prefill", "decode", "mixed"])
def test_ops_of_a_layer(kind, monkeypatch):
    llm = make(max_num_batched_tokens=64)
    lengths = {20: 3} if kind == "decode" else {20: 2, 100: 1}
    # The first step starts prompts; the second goes on with the long one while the others decode.
    found = next(step for index, step in enumerate(steps(llm, lengths)) if index == (kind != "prefill"))
    inner = Calls()

    def count(*args):
        with inner:
            return decoder_layer(*args)

    monkeypatch.setattr("dispec.layers.model.decoder_layer", count)
    with unchecked(), Calls() as whole:
        llm.engine.runner.run(found)
    expected = {} if kind == "decode" else OPS_PER_LAYER  # a decode's layers are one C++ call, of which torch sees none
    assert {name: calls / LAYERS for name, calls in inner.ours.items()} == expected
    assert inner.others.total() <= OTHERS_PER_LAYER * LAYERS
    assert whole.others.total() <= OTHERS_PER_STEP


@pytest.mark.parametrize("tokens", [64, 128])
def test_the_head_sees_the_rows_that_are_sampled_and_no_others(tokens, monkeypatch):
    llm = make(max_num_batched_tokens=tokens, enable_prefix_caching=False)
    rows: list[int] = []

    def head(x, *others):
        rows.append(len(x))
        return logits(x, *others)

    monkeypatch.setattr("dispec.layers.steps.logits", head)
    llm.generate([list(range(100))] * 3, greedy(max_tokens=4))
    assert sum(rows) == 3 * 4
    # A chunk that ends no prompt wants no logits; where it fits, a prompt is read to its end at once.
    assert rows[:2] == ([0, 1] if tokens == 64 else [1, 2])
    assert len(rows) == len(llm.engine.records)


def test_a_step_allocates_nothing_as_large_as_a_weight_matrix_or_the_cache():
    llm = make(max_num_batched_tokens=32)
    smallest = smallest_matrix_or_cache(llm.engine.runner.weights, llm.engine.runner.kv_cache)
    assert largest_allocation(lambda: llm.generate([[1, 2, 3]] * 3, greedy())) < smallest
    # What it would see: a copy of a layer's keys.
    keys = llm.engine.runner.kv_cache.keys[0]
    assert largest_allocation(keys.clone) >= smallest


def test_threads_of_the_processes(tmp_path, monkeypatch):
    """No pool of a library that we have no use for: each of its threads is one that takes a core from the engine's."""
    monkeypatch.setattr(commands, "THREADS", "2")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    save_tiny(tmp_path, "llama")
    with serving(tmp_path) as server:
        assert server.completion("the quick brown fox " * 8, 8).status_code == 200
        front = psutil.Process(server.process.pid)
        (engine,) = front.children()
        # The event loop, its four workers at most, the log's writer, who reads from the engine and who waits for its
        # end; the socket library's two.
        assert front.num_threads() <= 8 + 2
        # The one that steps, OpenMP's second and the kernels' second; the one that waits for the front's end; the
        # socket library's two.
        assert engine.num_threads() <= 3 + 1 + 2
        libraries = Path(f"/proc/{front.pid}/maps").read_text()
        assert "libtorch" not in libraries
        assert "openblas" not in libraries
        assert "libgomp" not in libraries
