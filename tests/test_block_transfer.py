"""Copies and folds of KV blocks against the oracle, on every device that this machine has."""

import pytest
import torch

from dispec import ops
from dispec.ops import reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(3, 9, 128), (2, 5, 4), (1, 7, 2050)]  # the last one: a tile that is not full


def words(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return words of random bits, those with all bits equal among them."""
    noise = torch.Generator().manual_seed(seed)
    found = torch.randint(-(2**63), 2**63 - 1, shape, dtype=torch.int64, generator=noise)
    found[..., 0], found[..., -1] = 0, -1
    return found


def on(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_folds_are_the_oracles(shape: tuple[int, int, int], device: str) -> None:
    keys, values, blocks = words(*shape), words(*shape, seed=1), torch.tensor([3, 0, 4, 3])
    found = ops.fold_blocks(*(tensor.to(on(device)) for tensor in (keys, values, blocks)))
    assert torch.equal(found.cpu(), reference.fold_blocks(keys, values, blocks))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_transferred_and_their_folds_returned(shape: tuple[int, int, int], device: str) -> None:
    num_layers, num_blocks, num_words = shape
    source = words(*shape), words(*shape, seed=1)
    caches = [words(num_layers, num_blocks + 4, num_words, seed=seed) for seed in (2, 3)]
    theirs, own = torch.tensor([4, 1, 3]), torch.tensor([0, num_blocks + 3, 2])
    there = [tensor.to(on(device)) for tensor in (*source, theirs, *caches, own)]
    folds = ops.transfer_blocks(*there)
    for cache, half in zip(caches, source, strict=True):
        for new, old in zip(own.tolist(), theirs.tolist(), strict=True):
            cache[:, new] = half[:, old]
    assert all(map(torch.equal, caches, (there[3].cpu(), there[4].cpu())))
    assert torch.equal(folds.cpu(), reference.fold_blocks(*source, theirs))


def test_changes_of_any_bits_change_the_fold() -> None:
    keys, values, block = words(2, 1, 64), words(2, 1, 64, seed=1), torch.tensor([0])
    folds = {tuple(ops.fold_blocks(keys, values, block)[0].tolist())}
    num_changes = 0
    for position in range(64):
        for bit in range(64):
            for pair in ((position,), (position, (position + 1) % 64)):  # also the same bit of two neighbours
                changed = keys.clone()
                changed[1, 0, list(pair)] ^= -(2**63) if bit == 63 else 1 << bit
                folds.add(tuple(ops.fold_blocks(changed, values, block)[0].tolist()))
                num_changes += 1
    for first in range(63):
        swapped = keys.clone()
        swapped[1, 0, first], swapped[1, 0, first + 1] = keys[1, 0, first + 1], keys[1, 0, first]
        folds.add(tuple(ops.fold_blocks(swapped, values, block)[0].tolist()))
        num_changes += 1
    assert len(folds) == 1 + num_changes


def test_no_blocks_have_no_folds() -> None:
    none = torch.tensor([], dtype=torch.int64)
    assert ops.fold_blocks(words(3, 2, 8), words(3, 2, 8), none).shape == (0, 6)


def test_opcheck() -> None:
    cache, blocks = (words(2, 3, 8), words(2, 3, 8)), torch.tensor([1, 2])
    torch.library.opcheck(torch.ops.dispec.fold_blocks.default, (*cache, blocks))
    torch.library.opcheck(
        torch.ops.dispec.transfer_blocks.default, (*cache, blocks, words(2, 5, 8), words(2, 5, 8), blocks)
    )
