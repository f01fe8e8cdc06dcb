"""Logit processing, drawing and log-probabilities trace into whole graphs that serve every number of rows."""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from dispec.layers.logit_processing import apply_penalties, apply_token_mask, apply_top_k_top_p
from dispec.layers.logprobs import logprobs
from dispec.layers.sampling import greedy, sample
from dispec.layers.types import Logprobs, Penalties, Sampling, SamplingFilters

VOCAB = 501
GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def unchecked() -> Iterator[None]:
    """A function whose shapes are checked does not trace; every other test module runs with the checks on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def choose(
    logits: Tensor, edits: Penalties, allowed: Tensor, filters: SamplingFilters, sampling: Sampling
) -> tuple[Tensor, Tensor, Logprobs]:
    restricted = apply_top_k_top_p(
        apply_token_mask(apply_penalties(logits, edits), allowed), sampling.temperature, filters
    )
    chosen = sample(restricted, sampling)
    return restricted, chosen, logprobs(logits, greedy(logits), 20)


def inputs(rows: int, entries: int, dtype: torch.dtype) -> tuple[Tensor, Penalties, Tensor, SamplingFilters, Sampling]:
    torch.manual_seed(rows)
    logits = (torch.randn(rows, VOCAB) * 4).to(dtype)
    edits = Penalties(torch.randperm(rows * VOCAB)[:entries].int(), torch.rand(entries) + 0.7, torch.randn(entries))
    allowed = torch.randint(-(2**31), 2**31 - 1, (rows, -(-VOCAB // 32))).int()
    filters = SamplingFilters(
        torch.randint(1, 2 * VOCAB, (rows,)).int(), torch.rand(rows).clamp(min=0.01), torch.rand(rows) / 9
    )
    seed, position = torch.randint(0, 2**62, (rows,)), torch.arange(rows).int()
    return logits, edits, allowed, filters, Sampling(torch.rand(rows).round(decimals=1) * 2, seed, position)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_one_graph_for_all_sizes_that_computes_what_eager_does(device, dtype):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(choose, fullgraph=True, dynamic=True)
    for rows, entries in ((3, 17), (2, 40), (11, 5), (64, 333)):
        arguments = torch.utils._pytree.tree_map(lambda x: x.to(device), inputs(rows, entries, dtype))
        restricted, chosen, likely = compiled(*arguments)
        expected_restricted, expected_chosen, expected_likely = choose(*arguments)
        torch.testing.assert_close(restricted, expected_restricted, rtol=1e-5, atol=1e-5)
        assert torch.equal(chosen, expected_chosen)
        assert torch.equal(likely.rank, expected_likely.rank)
        torch.testing.assert_close(likely.top_logprobs, expected_likely.top_logprobs, rtol=1e-5, atol=1e-5)
        assert (likely.logprob == likely.top_logprobs[:, 0]).all()
        assert (likely.rank == 1).all()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
