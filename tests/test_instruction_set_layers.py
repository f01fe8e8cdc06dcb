"""Layers in one call give the bits of each layer in turn, with the kernels of each instruction set."""

import pytest
import torch

from dispec import ops
from dispec.ops.kv_cache import LARGEST_CODE
from tests.instruction_sets import instruction_set  # noqa: F401
from tests.test_layer_kernel import CONFIGS, compare_with_each_layer, quantized_weights, random_weights

pytestmark = pytest.mark.usefixtures("instruction_set")


@pytest.mark.parametrize("kind", CONFIGS)
def test_bits_are_those_of_each_layer_in_turn(kind: str) -> None:
    for weights in (random_weights(CONFIGS[kind]), quantized_weights(CONFIGS[kind])):
        for size, query_len in ((1, 1), (2, 3), (7, 5), (33, 1)):
            compare_with_each_layer(CONFIGS[kind], weights, size, query_len)


@pytest.mark.parametrize("dtype", LARGEST_CODE)
def test_bits_are_those_of_each_layer_in_turn_with_a_quantised_cache(dtype: torch.dtype) -> None:
    weights = random_weights(CONFIGS["llama"], ops.Quantization("int8"))
    compare_with_each_layer(CONFIGS["llama"], weights, 3, 2, dtype)
