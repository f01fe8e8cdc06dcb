"""Choosing tokens: greedy is the argmax, draws follow the softmax, noise depends on seed and position alone."""

import pytest
import torch

from dispec import ops
from dispec.layers.logit_processing import apply_top_k_top_p
from dispec.layers.sampling import greedy, sample
from dispec.layers.types import Sampling, SamplingFilters
from dispec.ops import reference, uniform_noise
from tests.instruction_sets import EMULATED_AMX, identifier, usable_instruction_sets, use

pytestmark = pytest.mark.smoke

# Sampling has no tiles: emulated ones are those of AVX512.
INSTRUCTION_SETS = [item for item in usable_instruction_sets() if item is not EMULATED_AMX]


@pytest.fixture(autouse=True, params=[*(INSTRUCTION_SETS or ["kernel"]), "torch"], ids=identifier)
def kind(request, monkeypatch) -> str:
    """Every test runs with the CPU's kernels of each instruction set and without."""
    if request.param == "torch":
        monkeypatch.setattr(ops, "has_sample_kernel", lambda device: False)
        return "torch"
    if request.param != "kernel":
        use(request.param, monkeypatch)
    elif not ops.has_sample_kernel(torch.device("cpu")):
        pytest.skip("the CPU kernels could not be built")
    return "kernel"


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
    assert torch.equal(greedy(logits), logits.argmax(-1))
    assert torch.equal(greedy(logits.bfloat16()), logits.bfloat16().float().argmax(-1))


def test_draws_follow_the_softmax():
    torch.manual_seed(0)
    logits = torch.randn(20) * 2
    for temperature in (0.5, 1.0, 2.0):
        expect_draws(logits, logits, temperature, torch.softmax(logits / temperature, -1))


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(5, 1.0, 0.0), (20, 0.7, 0.0), (20, 1.0, 0.1), (10, 0.8, 0.15), (1, 0.1, 1.0)]
)
@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_restricted_draws_follow_what_is_left_of_the_softmax(top_k, top_p, min_p, temperature):
    """By definition, without the functions under test: keep, in falling order, while each filter says so."""
    torch.manual_seed(1)
    logits = torch.randn(20) * 2
    order = logits.argsort(descending=True)
    kept = torch.softmax(logits[order] / temperature, -1)[:top_k]
    before = kept.cumsum(0) - kept
    kept = kept[before < top_p * kept.sum()]
    kept = kept[kept >= min_p * kept[0]]
    expected = torch.zeros(20)
    expected[order[: len(kept)]] = kept / kept.sum()
    filters = SamplingFilters(torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
    restricted = apply_top_k_top_p(logits[None], torch.tensor([temperature]), filters)[0]
    expect_draws(logits, restricted, temperature, expected)


def expect_draws(logits: torch.Tensor, restricted: torch.Tensor, temperature: float, expected: torch.Tensor) -> None:
    """40,000 draws of restricted logits against the probabilities, by chi-square at 0.1 %."""
    draws = 40_000
    chosen = sample(restricted.expand(draws, len(logits)), sampling(temperature, [99] * draws, list(range(draws))))
    observed = torch.bincount(chosen, minlength=len(logits))
    assert (observed[expected == 0] == 0).all(), "drawn, but ruled out"
    expected = expected * draws
    likely = expected >= 5
    if likely.sum() > 1:
        chi_square = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
        degrees = int(likely.sum()) - 1
        # The quantile by Wilson and Hilferty's cube root, to within 3 %: 43.8 at 19 degrees.
        assert chi_square < degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3


@pytest.mark.parametrize("noise", [1.0, 1 - 2.0**-24, 2.0**-33])
def test_a_token_of_minus_infinity_is_never_sampled_at_any_noise(monkeypatch, kind, noise):
    if kind == "kernel":
        pytest.skip("the kernel makes its noise itself: see the next test")
    monkeypatch.setattr(
        ops, "uniform_noise", lambda seed, position, tokens: torch.full((len(seed), len(tokens)), noise)
    )
    logits = torch.full((2, 40), -torch.inf)
    logits[0, 17], logits[1, [5, 30]] = -80.0, 3.0
    assert sample(logits, sampling(1.0, [1, 2], [3, 4])).tolist() == [17, 5]


def test_a_token_of_minus_infinity_is_not_drawn_for_noise_of_its_own_making():
    extremes = torch.tensor([37_656_488, 46_559_640])  # of 2**27 tokens those whose numbers are largest and smallest
    numbers = uniform_noise(torch.tensor([3]), torch.tensor([4]), extremes)[0]
    assert numbers[0] == 1
    assert numbers[1] < 2.0**-30
    for order in ([0, 1], [1, 0]):
        logits = torch.full((1, 40), -torch.inf)
        logits[0, 17] = -80.0
        token_ids = torch.arange(40)
        token_ids[17], token_ids[5] = extremes[order]
        assert sample(logits, sampling(1.0, [3], [4]), token_ids).tolist() == [17]
    # The least noise there is, -2.8, against a token whose logit makes 0.7 less of its noise.
    row = sampling(1.0, [3], [4])
    token_ids = torch.tensor([int(extremes[0]), 7])
    least, other = reference.sampling_scores(torch.zeros(1, 2), *row, token_ids)[0]
    assert least == pytest.approx(-2.81, abs=0.01)
    assert sample(torch.tensor([[0.0, float(least - 0.7 - other)]]), row, token_ids) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_draws_are_those_of_masked_logits(dtype):
    if not ops.has_sample_kernel(torch.device("cpu")):
        pytest.skip("without the kernel, logits are masked before")
    torch.manual_seed(3)
    for rows, size in ((1, 1), (5, 17), (40, 60), (7, 4130)):
        logits = (torch.randn(rows, size) * 3).to(dtype)
        allowed = torch.randint(-(2**31), 2**31 - 1, (rows, -(-size // 32)), dtype=torch.int32)
        allowed[::3, 1:] = 0
        allowed[:, 0] |= 1
        values = Sampling(torch.rand(rows).round(), torch.arange(rows), torch.arange(rows, dtype=torch.int32))
        for token_ids in (None, torch.randperm(50_000)[:size]):
            expected = sample(reference.mask_tokens(logits, allowed), values, token_ids)
            assert torch.equal(sample(logits, values, token_ids, allowed), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_are_those_of_the_definition(dtype):
    """Also past the columns that a thread takes at a time, and for rows that lie apart."""
    torch.manual_seed(2)
    for rows, size in ((1, 1), (3, 17), (40, 60), (1, 4100)):
        logits = (torch.randn(2 * rows, size + 3) * 3).to(dtype)[::2, :size]
        temperature = torch.rand(rows).round(decimals=1) * 2 if rows > 1 else torch.ones(1)
        seed = torch.randint(-(2**62), 2**62, (rows,))
        position = torch.randint(0, 100_000, (rows,), dtype=torch.int32)
        for token_ids in (None, torch.randperm(50_000)[:size]):
            chosen = sample(logits, Sampling(temperature, seed, position), token_ids)
            values = reference.sampling_scores(logits, temperature, seed, position, token_ids)
            best = values.gather(1, chosen[:, None])[:, 0]
            torch.testing.assert_close(best, values.amax(-1), rtol=0, atol=3e-5)  # a near tie may fall either way
            assert (chosen == values.argmax(-1)).double().mean() > 0.97 or rows < 34
            assert torch.equal(chosen[temperature == 0], logits.float().argmax(-1)[temperature == 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_greedy_row_beside_sampled_ones_takes_the_first_of_equal_logits(dtype):
    """Also where they are in parts of the row that different threads take."""
    logits = torch.zeros(2, 13_000, dtype=dtype)
    logits[0, [5000, 5001, 9000, 12_999]] = 1
    values = sampling([0.0, 1.0], [0, 0], [0, 0])
    assert sample(logits, values)[0] == 5000


def test_tiny_temperatures_are_greedy_and_not_infinite():
    torch.manual_seed(0)
    logits = torch.rand(3, 50) * 20
    for temperature in (1e-6, 1e-30, 1e-44):
        assert torch.equal(sample(logits, sampling(temperature, [1, 2, 3], [4, 5, 6])), greedy(logits))
        filters = SamplingFilters(torch.tensor([5] * 3), torch.tensor([0.9] * 3), torch.tensor([0.1] * 3))
        restricted = apply_top_k_top_p(logits, torch.full((3,), temperature), filters)
        assert torch.equal(restricted.isfinite().sum(-1), torch.ones(3, dtype=torch.int64))


def test_the_noise_of_a_seed_stays_the_same_from_version_to_version():
    noise = uniform_noise(torch.tensor([0, 12345, -(2**62)]), torch.tensor([0, 7, 100_000]), torch.tensor([0, 49151]))
    assert (noise.double() * 2**32).long().tolist() == [
        [4195613184, 2200827392],
        [1608622592, 783457984],
        [1428359936, 1691235840],
    ]


def test_noise_is_uniform_and_independent_across_seed_position_and_column():
    by_position = uniform_noise(torch.full((512,), 7), torch.arange(512), torch.arange(2048))
    by_seed = uniform_noise(torch.arange(512), torch.full((512,), 3), torch.arange(2048))
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
    base = uniform_noise(torch.tensor([5]), torch.tensor([5]), torch.arange(64))
    for bit in range(63):
        assert not torch.equal(base, uniform_noise(torch.tensor([5 ^ (1 << bit)]), torch.tensor([5]), torch.arange(64)))
    for bit in range(24):
        assert not torch.equal(base, uniform_noise(torch.tensor([5]), torch.tensor([5 ^ (1 << bit)]), torch.arange(64)))


def test_noise_ignores_the_rest_of_the_batch():
    seeds, positions = torch.tensor([1, -(2**63), 3]), torch.tensor([10, 20, 30])
    together = uniform_noise(seeds, positions, torch.arange(50))
    for row in range(3):
        alone = uniform_noise(seeds[row : row + 1], positions[row : row + 1], torch.arange(50))
        assert torch.equal(together[row : row + 1], alone)
