"""Inputs and expected results of `token_threshold` for its CPU, interpreter and GPU tests."""

import torch
from torch import Tensor

from dispec.ops import reference


def weights_of(logits: Tensor) -> Tensor:
    logits = logits.float()
    return torch.exp(logits - logits.amax(-1, keepdim=True))


def cases(size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (weights, top_k, top_p): all settings on peaked, flat, tied, masked, constant, nearly constant rows."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(6, size, generator=generator)
    masked = noise[4] * 2
    masked[torch.rand(size, generator=generator) < 0.5] = -torch.inf
    masked[0] = 9.0
    rows = [
        noise[0] * 6,
        noise[1] * 0.1,
        (noise[2] * 3).bfloat16().float(),
        (noise[3] * 2).round(),
        masked,
        torch.full((size,), 1.5),
        noise[5] * 40,  # most weights are 0, some subnormal
    ]
    settings = [
        (top_k, top_p)
        for top_k in (1, 2, 7, 300, max(size - 1, 1), size, size + 1, 2**31 - 1)
        for top_p in (1e-9, 0.1, 0.5, 0.9, 0.9999, 1.0)
    ]
    top_k, top_p = zip(*settings * (len(rows) + 1), strict=True)
    adjacent = 1 - torch.arange(size) * 2.0**-24  # each the float32 next to the one before
    weights = torch.cat([weights_of(torch.stack(rows)), adjacent[None]]).repeat_interleave(len(settings), 0)
    return weights, torch.tensor(top_k, dtype=torch.int32), torch.tensor(top_p)


def expect_thresholds(actual: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor) -> None:
    """Expect the oracle's threshold, or the next weight where rounding puts the sum on the other side of top_p."""
    expected = reference.token_threshold(weights, top_k, top_p)
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    for row in (actual != expected).nonzero()[:, 0].tolist():
        assert top_p[row] < 1
        only_k = reference.token_threshold(weights[row : row + 1], top_k[row : row + 1], torch.ones(1))
        kept = weights[row][weights[row] >= only_k].double()
        low, high = sorted((actual[row].item(), expected[row].item()))
        assert kept[kept > low].min() == high, "neighbours"
        short = kept[kept >= high].sum() - top_p[row] * kept.sum()
        assert abs(short) <= 1e-6 * kept.sum()
