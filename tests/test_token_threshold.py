"""The threshold of top_k and top_p on a CPU against its oracle, and properties of any threshold."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dispec import ops
from dispec.ops import reference
from tests.threshold_cases import cases, weights_of

pytestmark = pytest.mark.smoke

module = importlib.import_module("dispec.ops.token_threshold")  # the package's attribute of that name is the function


@pytest.mark.parametrize("size", [1, 2, 5, 255, 256, 257, 1000, 5003])
def test_every_setting_on_every_kind_of_row(size):
    arguments = cases(size)
    assert torch.equal(ops.token_threshold(*arguments), reference.token_threshold(*arguments))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(-30, 0, width=16), min_size=1, max_size=40),
    st.integers(1, 45),
    st.floats(2**-20, 1, width=32),
)
def test_enough_is_kept_and_no_more(logits, top_k, top_p):
    weights = weights_of(torch.tensor([logits]))
    threshold = ops.token_threshold(weights, torch.tensor([top_k]), torch.tensor([top_p]))
    row = weights[0].double()
    counted = [t for t in row.unique() if (row >= t).sum() >= min(top_k, len(row))]
    top = row[row >= max(counted)]
    # Sums in another order may differ in their last bits.
    target = float(torch.tensor(top_p)) * top.sum() * (1 - 1e-12)
    enough = [t for t in top.unique() if top[top >= t].sum() >= target]
    assert torch.equal(row >= threshold.item(), row >= (max(enough) if top_p < 1 else max(counted)))


def test_a_row_does_not_depend_on_the_others(monkeypatch):
    weights, top_k, top_p = cases(3001, seed=1)
    together = ops.token_threshold(weights, top_k, top_p)
    for row in range(len(weights)):
        assert torch.equal(
            ops.token_threshold(weights[row : row + 1], top_k[row : row + 1], top_p[row : row + 1]),
            together[row : row + 1],
        )
    monkeypatch.setattr(module, "_PREFIX", 1)  # nearly every row is sorted
    assert torch.equal(ops.token_threshold(weights, top_k, top_p), together)


def test_a_usual_row_is_not_sorted(monkeypatch):
    monkeypatch.setattr(module, "_sorted_threshold", None)
    torch.manual_seed(0)
    weights = weights_of(torch.randn(4, 50_000) * 5)
    ops.token_threshold(weights, torch.tensor([50, 200, 50_000, 1]), torch.tensor([0.9, 1.0, 0.8, 0.5]))


def test_no_rows_and_rows_of_nan():
    empty = torch.zeros(0)
    assert ops.token_threshold(torch.zeros(0, 9), empty.int(), empty).shape == (0,)
    broken = torch.full((2, 900), torch.nan)
    ops.token_threshold(broken, torch.tensor([5, 400]), torch.tensor([0.5, 0.5]))  # must end; the result is unspecified


def test_registration():
    arguments = (weights_of(torch.randn(3, 40)), torch.tensor([5, 40, 1]), torch.tensor([0.5, 1.0, 1.0]))
    torch.library.opcheck(torch.ops.dispec.token_threshold.default, arguments)
