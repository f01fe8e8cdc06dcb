"""Choosing tokens: greedy is the argmax, draws follow the softmax, noise depends on seed and position alone."""

import torch

from layers.sampling import sample, uniform_noise
from layers.types import Sampling


def sampling(temperature, seeds, positions) -> Sampling:
    rows = len(seeds)
    return Sampling(
        torch.tensor(temperature if isinstance(temperature, list) else [temperature] * rows, dtype=torch.float32),
        torch.tensor(seeds, dtype=torch.int64),
        torch.tensor(positions, dtype=torch.int32),
    )


def test_greedy_rows_are_the_argmax_beside_sampled_ones():
    torch.manual_seed(0)
    logits = torch.randn(4, 100)
    chosen = sample(logits, sampling([0.0, 1.0, 0.0, 5.0], [1, 2, 3, 4], [5, 6, 7, 8]))
    assert torch.equal(chosen[[0, 2]], logits.argmax(-1)[[0, 2]])
    assert torch.equal(sample(logits, None), logits.argmax(-1))


def test_draws_follow_the_softmax():
    """Chi-square over 40,000 draws of 20 tokens, for several temperatures; the 0.1 % quantile at 19 degrees."""
    torch.manual_seed(0)
    logits = torch.randn(20) * 2
    for temperature in (0.5, 1.0, 2.0):
        draws = 40_000
        rows = logits.expand(draws, 20)
        chosen = sample(rows, sampling(temperature, [99] * draws, list(range(draws))))
        expected = torch.softmax(logits / temperature, -1) * draws
        observed = torch.bincount(chosen, minlength=20)
        likely = expected >= 5
        chi_square = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
        assert chi_square < 43.8


def test_noise_is_uniform_and_independent_across_seed_position_and_column():
    by_position = uniform_noise(torch.full((512,), 7), torch.arange(512), 2048)
    by_seed = uniform_noise(torch.arange(512), torch.full((512,), 3), 2048)
    for noise in (by_position, by_seed):
        assert noise.min() > 0
        assert noise.max() <= 1
        histogram = torch.histc(noise.double(), bins=64, min=0, max=1)
        expected = noise.numel() / 64
        assert ((histogram - expected) ** 2 / expected).sum() < 103.4  # 0.1 % at 63 degrees
        standard = (noise.double() - 0.5) * 12**0.5
        for lag in (1, 2, 255):
            assert abs((standard[lag:] * standard[:-lag]).mean()) < 0.004
            assert abs((standard[:, lag:] * standard[:, :-lag]).mean()) < 0.004


def test_all_bits_of_seed_and_position_matter():
    base = uniform_noise(torch.tensor([5]), torch.tensor([5]), 64)
    for bit in range(63):
        assert not torch.equal(base, uniform_noise(torch.tensor([5 ^ (1 << bit)]), torch.tensor([5]), 64))
    for bit in range(24):
        assert not torch.equal(base, uniform_noise(torch.tensor([5]), torch.tensor([5 ^ (1 << bit)]), 64))


def test_noise_ignores_the_rest_of_the_batch():
    seeds, positions = torch.tensor([1, -(2**63), 3]), torch.tensor([10, 20, 30])
    together = uniform_noise(seeds, positions, 50)
    for row in range(3):
        alone = uniform_noise(seeds[row : row + 1], positions[row : row + 1], 50)
        assert torch.equal(together[row : row + 1], alone)
