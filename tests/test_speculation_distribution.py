"""Sampled tokens have the target's distribution after every kind of processing, with any draft model.

The probabilities are worked out in NumPy, from the definitions of the parameters. 65,536 draws each, by chi-square.
"""

import itertools

import numpy as np
import pytest
import torch

from dispec.layers.logit_processing import apply_penalties, apply_token_mask, apply_top_k_top_p
from dispec.layers.sampling import sample
from dispec.layers.types import Penalties, Sampling, SamplingFilters

SIZE, COUNT = 24, 65536
SETTINGS = {
    "temperature 1": {},
    "temperature 0.6": {"temperature": 0.6},
    "top-k": {"top_k": 6},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.1},
    "penalties": {"scale": {2: 1.5, 7: 1.5, 11: 1.5}, "addend": {2: -0.8, 7: -0.4}},
    "logit_bias": {"addend": {3: 4.0, 5: -100.0}},
    "allowed tokens": {"allowed": range(4, 15)},
    "all": {"temperature": 1.4, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "addend": {3: 1.0}, "allowed": range(20)},
}
DRAFTS = {"equal": 0.0, "near": 0.5, "far": 4.0}


def target_logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1.5, SIZE)


def draft_logits(name: str) -> np.ndarray:
    return target_logits() + DRAFTS[name] * np.random.default_rng(1).normal(0, 1, SIZE)


def probabilities(
    logits: np.ndarray, temperature=1.0, top_k=SIZE, top_p=1.0, min_p=0.0, scale=(), addend=(), allowed=None
):
    """Return the probabilities by the definitions of the parameters, one token at a time."""
    logits = logits.copy()
    for token, value in dict(scale).items():
        logits[token] = logits[token] / value if logits[token] > 0 else logits[token] * value
    for token, value in dict(addend).items():
        logits[token] += value
    found = np.exp((logits - logits.max()) / temperature)
    if allowed is not None:
        found[[token for token in range(SIZE) if token not in allowed]] = 0
    order = sorted(range(SIZE), key=lambda token: -found[token])
    found[order[top_k:]] = 0
    found /= found.sum()
    kept, mass = [], 0.0
    for token in order:
        if mass < top_p:
            kept.append(token)
        mass += found[token]
    found = np.where(np.isin(np.arange(SIZE), kept), found, 0)
    found = np.where(found >= min_p * found.max(), found, 0)
    return found / found.sum()


def drawn(
    logits: np.ndarray,
    first_seed: int,
    temperature=1.0,
    top_k=SIZE,
    top_p=1.0,
    min_p=0.0,
    scale=(),
    addend=(),
    allowed=None,
):
    """Sample a token for each of `COUNT` seeds, as the engine does."""
    rows = torch.tensor(logits, dtype=torch.float32).expand(COUNT, SIZE).contiguous()
    scale, addend = dict(scale), dict(addend)
    changed = sorted({*scale, *addend})
    if changed:
        places = (torch.arange(COUNT)[:, None] * SIZE + torch.tensor(changed)).flatten()
        scales = torch.tensor([scale.get(token, 1.0) for token in changed])
        addends = torch.tensor([addend.get(token, 0.0) for token in changed])
        rows = apply_penalties(rows, Penalties(places, scales.repeat(COUNT), addends.repeat(COUNT)))
    if allowed is not None:
        word = sum(1 << token for token in allowed)
        rows = apply_token_mask(rows, torch.full((COUNT, 1), word, dtype=torch.int32))
    temperatures = torch.full((COUNT,), float(temperature))
    ones = torch.ones(COUNT)
    rows = apply_top_k_top_p(
        rows, temperatures, SamplingFilters(torch.full((COUNT,), top_k), ones * top_p, ones * min_p)
    )
    return sample(rows, Sampling(temperatures, torch.arange(COUNT) + first_seed, torch.full((COUNT,), 77)))


def chi_square_is_passed(tokens: torch.Tensor, expected: np.ndarray) -> bool:
    """Test at 0.01 %, by the approximation of Wilson and Hilferty (1931). Impossible tokens fail it."""
    observed = np.bincount(tokens.numpy(), minlength=SIZE)
    possible = expected > 0
    if observed[~possible].any():
        return False
    wanted, seen = expected[possible] * COUNT, observed[possible]
    rare = wanted < 5
    if rare.any():
        wanted, seen = np.append(wanted[~rare], wanted[rare].sum()), np.append(seen[~rare], seen[rare].sum())
    degrees = len(wanted) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3
    return bool(((seen - wanted) ** 2 / wanted).sum() < limit)


def speculate(setting: dict, draft: str, first_seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the emitted tokens and the draft tokens, sampled with the same seeds and positions.

    A draft token is accepted where it is the token that the target samples.
    """
    proposed = drawn(draft_logits(draft), first_seed, **setting)
    sampled = drawn(target_logits(), first_seed, **setting)
    return torch.where(proposed == sampled, proposed, sampled), proposed


@pytest.mark.parametrize(
    ("name", "draft"),
    [*((name, "near") for name in SETTINGS), *itertools.product(("temperature 1", "all"), ("equal", "far"))],
)
def test_emitted_tokens_have_the_targets_distribution(name, draft):
    setting = SETTINGS[name]
    expected = probabilities(target_logits(), **setting)
    emitted, proposed = speculate(setting, draft, first_seed=hash_of(name, draft))
    assert chi_square_is_passed(emitted, expected)
    # The draft tokens have the draft's distribution, and their acceptance rate has a lower bound (arXiv:2408.07978).
    own = probabilities(draft_logits(draft), **setting)
    assert chi_square_is_passed(proposed, own)
    distance = np.abs(expected - own).sum() / 2
    acceptance = float((emitted == proposed).float().mean())
    assert acceptance >= (1 - distance) / (1 + distance) - 4 * 0.5 / COUNT**0.5
    assert acceptance <= 1 - distance + 4 * 0.5 / COUNT**0.5
    assert acceptance == 1.0 or draft != "equal"


@pytest.mark.parametrize("draft", ["near", "far"])
@pytest.mark.parametrize("name", ["temperature 1", "top-p", "all"])
def test_accepting_any_possible_draft_token_would_be_noticed(name, draft):
    """The same test fails if a draft token is accepted because the target might have sampled it."""
    setting = SETTINGS[name]
    expected = probabilities(target_logits(), **setting)
    emitted, proposed = speculate(setting, draft, first_seed=hash_of(name, draft))
    possible = torch.tensor(expected > 0)
    assert not chi_square_is_passed(torch.where(possible[proposed], proposed, emitted), expected)


def hash_of(*names: str) -> int:
    """Return a seed for each test, the same one in every run."""
    return sum(ord(letter) * 1_000_003**index for index, letter in enumerate("/".join(names))) % 2**40
