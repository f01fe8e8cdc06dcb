"""Frequencies of rotary positions (arXiv:2104.09864)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dispec.layers.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig) -> Float[Tensor, "D2"]:
    """Return each dimension pair's rotation in radians per position, in float32, after the config's scaling."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "frequency_factors":
        return frequencies / torch.tensor(scaling.frequency_factors, dtype=torch.float32)
    if scaling.kind == "llama3":
        # The share of each frequency that is kept: 0 for few turns over the original context, 1 for many.
        turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0, 1)
        return (1 - kept) * (frequencies / scaling.factor) + kept * frequencies
    return _yarn_frequencies(frequencies, scaling, config)


def _yarn_frequencies(
    frequencies: Float[Tensor, "D2"], scaling: RopeScaling, config: ModelConfig
) -> Float[Tensor, "D2"]:
    def dimension_of(turns: float) -> float:
        original = scaling.original_max_position_embeddings
        return config.head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(config.head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies * (1 - stretched) + frequencies / scaling.factor * stretched
