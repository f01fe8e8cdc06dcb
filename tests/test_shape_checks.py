"""The checks of shapes and types under which the tests run."""

import pytest
import torch
from jaxtyping import TypeCheckError

from dispec.layers.rope import rope_frequencies
from dispec.layers.sampling import scale_by_temperature
from tests import shape_checks


@pytest.mark.smoke
def test_a_wrong_shape_or_type_is_an_error() -> None:
    with pytest.raises(TypeCheckError, match="temperature"):
        scale_by_temperature(torch.zeros(2, 5), torch.ones(3))
    with pytest.raises(TypeCheckError, match="config"):
        rope_frequencies({"head_dim": 64})  # type: ignore[arg-type]


def test_a_function_is_checked_at_its_first_calls_in_each_test() -> None:
    right, wrong = torch.ones(2), torch.ones(1)
    for _ in range(shape_checks.MAX_CHECKS):
        scale_by_temperature(torch.zeros(2, 5), right)
    scale_by_temperature(torch.zeros(2, 5), wrong)
    shape_checks.check_again()
    with pytest.raises(TypeCheckError, match="temperature"):
        scale_by_temperature(torch.zeros(2, 5), wrong)
