"""The least time of a workload on a machine, by its bandwidth and its matrix rate."""

import math

import torch
from torch import Tensor

from dispec.bench.machine import Rates, seconds_of
from dispec.bench.workload import Workload
from dispec.layers.config import ModelConfig
from dispec.layers.weight_specs import declare

ELEMENT = 2  # bytes of a bf16 number


def weight_read_bytes(config: ModelConfig) -> int:
    """Return bytes of the weights that every step reads whole, in bf16: all but the embedding."""
    numbers = sum(math.prod(spec.shape) for spec in declare(config) if spec.name != "embedding")
    if config.tie_embeddings:
        numbers += config.vocab_size * config.hidden_size  # as the head
    return numbers * ELEMENT


def weight_bytes(config: ModelConfig) -> int:
    """Return bytes of all weights in bf16."""
    return config.num_parameters * ELEMENT


def kv_bytes(config: ModelConfig, tokens: int) -> int:
    """Return bytes of the keys and values of `tokens` tokens, in bf16."""
    return tokens * 2 * config.num_layers * config.num_kv_heads * config.head_dim * ELEMENT


def decode_step_seconds(rates: Rates, config: ModelConfig, sequences: int, context: float) -> float:
    """Return the least seconds of a decode step: to read every weight once or to multiply, the longer of both."""
    weights = weight_read_bytes(config)
    moved = weights + sequences * kv_bytes(config, 1) * context
    return max(moved / rates.bytes_per_second, weights / ELEMENT * 2 * sequences / rates.flop_per_second)


def prefill_seconds(rates: Rates, config: ModelConfig, tokens: int) -> float:
    """Return seconds of a prompt's GEMMs at full rate, with the head for every token and without attention."""
    return 2 * weight_read_bytes(config) / ELEMENT * tokens / rates.flop_per_second


def seconds_at_best(rates: Rates, config: ModelConfig, workload: Workload, decode_only: bool = False) -> float:
    """Return the least seconds of a workload. decode_only: without its prompts."""
    steps = workload.output_tokens if decode_only else workload.output_tokens - 1
    context = workload.prompt_tokens + workload.output_tokens / 2
    decode = steps * decode_step_seconds(rates, config, workload.concurrency, context)
    if decode_only:
        return decode
    return decode + prefill_seconds(rates, config, workload.concurrency * workload.prompt_tokens)


class StepGemms:
    """The GEMMs of a model's step on random weights, by torch's bf16 kernels: a step in which all else took no time.

    A CPU takes oneDNN's packed weights where it has them.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.device = device
        shapes = [spec.shape for spec in declare(config) if spec.kind == "matrix"]
        if config.tie_embeddings:
            shapes.append((config.vocab_size, config.hidden_size))
        packs = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.weights: list[Tensor] = []
        for shape in shapes:
            weight = torch.randn(shape, dtype=torch.bfloat16, device=device)
            self.weights.append(torch.ops.mkldnn._reorder_linear_weight(weight, 32) if packs else weight)
        self.in_features = [shape[1] for shape in shapes]
        self.packs = packs

    @torch.inference_mode()
    def seconds(self, num_tokens: int, repeats: int = 9) -> float:
        """Return the seconds of the fastest of several steps of `num_tokens` tokens."""
        inputs = {
            size: torch.randn(num_tokens, size, dtype=torch.bfloat16, device=self.device)
            for size in set(self.in_features)
        }

        def step() -> None:
            for weight, size in zip(self.weights, self.in_features, strict=True):
                if self.packs:
                    torch.ops.mkldnn._linear_pointwise(inputs[size], weight, None, "none", [], "")
                else:
                    torch.nn.functional.linear(inputs[size], weight)

        step()
        return min(seconds_of(step, self.device) for _ in range(repeats))
