"""What a step and a server take, without a clock: rows of the head, large allocations, threads."""

from pathlib import Path

import psutil
import pytest

from dispec import LLM, SamplingParams
from dispec.layers.config import ModelConfig
from dispec.layers.model import logits
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


def make(**options) -> LLM:
    fixed = {"load_format": "dummy", "device": "cpu", "kv_cache_memory": "4MiB", "max_num_seqs": 16}
    return LLM(CONFIG, **fixed | {"dtype": "bfloat16", "enforce_eager": True} | options)


def greedy(max_tokens: int = 8) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


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
    # A chunk that ends no prompt samples nothing; a prompt that fits is computed in one step.
    assert rows[:2] == ([0, 1] if tokens == 64 else [1, 2])
    assert len(rows) == len(llm.engine.records)


def test_a_step_allocates_nothing_as_large_as_a_weight_matrix_or_the_cache():
    llm = make(max_num_batched_tokens=32)
    smallest = smallest_matrix_or_cache(llm.engine.runner.weights, llm.engine.runner.kv_cache)
    assert largest_allocation(lambda: llm.generate([[1, 2, 3]] * 3, greedy())) < smallest
    # A copy of a layer's keys would be noticed.
    keys = llm.engine.runner.kv_cache.keys[0]
    assert largest_allocation(keys.clone) >= smallest


def test_threads_of_the_processes(tmp_path, monkeypatch):
    """No library starts a pool that is not used: each of its threads would take a core from the engine's."""
    monkeypatch.setattr(commands, "THREADS", "2")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    save_tiny(tmp_path, "llama")
    with serving(tmp_path) as server:
        assert server.completion("the quick brown fox " * 8, 8).status_code == 200
        frontend = psutil.Process(server.process.pid)
        (engine,) = frontend.children()
        # The event loop, at most four workers of it, the log's writer, the engine's reader and its waiter; the socket
        # library's two.
        assert frontend.num_threads() <= 8 + 2
        # The one that steps, OpenMP's second and the kernels' second; the one that waits for the server's end; the
        # socket library's two.
        assert engine.num_threads() <= 3 + 1 + 2
        libraries = Path(f"/proc/{frontend.pid}/maps").read_text()
        assert "libtorch" not in libraries
        assert "openblas" not in libraries
        assert "libgomp" not in libraries
