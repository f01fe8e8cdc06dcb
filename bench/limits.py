"""The least time in which a machine could do a workload: what no engine can pass, to see how much is left."""

import math

import torch
from torch import Tensor

from dispec.bench.machine import Rates, seconds_of
from dispec.bench.workload import Workload
from dispec.layers.config import ModelConfig
from dispec.layers.weights import declare

ELEMENT = 2  # bytes of a bf16 number


def weight_read_bytes(config: ModelConfig) -> int:
    """Bytes of the weights that every step reads whole, in bf16: all but the embedding, of which it reads rows."""
    numbers = sum(math.prod(spec.shape) for spec in declare(config) if spec.name != "embedding")
    if config.tie_embeddings:
        numbers += config.vocab_size * config.hidden_size  # as the head
    return numbers * ELEMENT


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of all weights in bf16."""
    return sum(math.prod(spec.shape) for spec in declare(config)) * ELEMENT


def kv_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens, in bf16."""
    return tokens * 2 * config.num_layers * config.num_kv_heads * config.head_dim * ELEMENT


def decode_step_seconds(rates: Rates, config: ModelConfig, sequences: int, context: float) -> float:
    """A decode step at best: every weight read once and every product at full rate, whichever takes longer."""
    weights = weight_read_bytes(config)
    moved = weights + sequences * kv_bytes(config, 1) * context
    return max(moved / rates.bytes_per_second, weights / ELEMENT * 2 * sequences / rates.flop_per_second)


def prefill_seconds(rates: Rates, config: ModelConfig, tokens: int) -> float:
    """The products of a prompt at full rate. The head is in, for every token; attention is not."""
    return 2 * weight_read_bytes(config) / ELEMENT * tokens / rates.flop_per_second


def seconds_at_best(rates: Rates, config: ModelConfig, workload: Workload, decode_only: bool = False) -> float:
    """A workload at best; `decode_only` leaves its prompts out."""
    steps = workload.output_tokens if decode_only else workload.output_tokens - 1
    context = workload.prompt_tokens + workload.output_tokens / 2
    decode = steps * decode_step_seconds(rates, config, workload.concurrency, context)
    if decode_only:
        return decode
    return decode + prefill_seconds(rates, config, workload.concurrency * workload.prompt_tokens)


class Products:
    """All matrix products of a model's step and nothing else, on random weights, by the library's own bf16 products:
    oneDNN's on packed weights where the CPU has them. What an engine would reach if all the rest took no time."""

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
        self.widths = [shape[1] for shape in shapes]
        self.packs = packs

    @torch.inference_mode()
    def seconds(self, rows: int, repeats: int = 9) -> float:
        """The fastest of several steps of so many rows."""
        inputs = {
            width: torch.randn(rows, width, dtype=torch.bfloat16, device=self.device) for width in set(self.widths)
        }

        def step() -> None:
            for weight, width in zip(self.weights, self.widths, strict=True):
                if self.packs:
                    torch.ops.mkldnn._linear_pointwise(inputs[width], weight, None, "none", [], "")
                else:
                    torch.nn.functional.linear(inputs[width], weight)

        step()
        return min(seconds_of(step, self.device) for _ in range(repeats))
