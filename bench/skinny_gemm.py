"""Time linear layers of few tokens on a CUDA device: the kernels of `ops.triton.skinny_linear` beside torch's.

    python -m dispec.bench.skinny_gemm                # what the table chooses
    python -m dispec.bench.skinny_gemm --sweep        # other configurations as well

Timed inside a CUDA graph, over enough weights that none is still in the L2 cache.
"""

from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from dispec.bench.kernels import COLD_BYTES, seconds_per_call

# Hidden size, intermediate size, output features of the QKV projection, vocabulary size.
MODELS = {
    "qwen2.5-0.5b": (896, 4864, 1152, 151936),
    "qwen2.5-1.5b": (1536, 8960, 2048, 151936),
    "llama-3.1-8b": (4096, 14336, 6144, 128256),
}


def weight_shapes(model: str) -> dict[str, tuple[int, int]]:
    """Return [N, K] of each weight of a model."""
    hidden, intermediate, qkv, vocab = MODELS[model]
    return {
        "qkv": (qkv, hidden),
        "output": (hidden, hidden),
        "gate, up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
        "head": (vocab, hidden),
    }


def time_linear(x: Tensor, weights: list[Tensor], config: object, by_torch: bool = False) -> float:
    """Return seconds of one linear layer, over all the weights in turn."""
    from dispec.ops.triton.gemm_tuning import SkinnyGemmConfig
    from dispec.ops.triton.skinny_linear import linear

    assert config is None or isinstance(config, SkinnyGemmConfig)
    calls = [
        partial(torch.nn.functional.linear, x, weight) if by_torch else partial(linear, x, weight, None, config)
        for weight in weights
    ]
    return seconds_per_call(calls * (24 // len(calls) + 1))


def candidates(num_tokens: int, out_features: int, in_features: int) -> list[tuple[Any, ...]]:
    """Return configurations to try beside what the table chooses."""
    found: list[tuple[Any, ...]] = []
    if num_tokens <= 4 and out_features <= 8192:
        found += [(2, 512, 0, 2), (4, 512, 0, 4), (4, 1024, 0, 4)]
    if out_features >= 64 * 100:
        found += [(64, 128, 1, 4, 3), (64, 128, 1, 4, 5), (64, 256, 1, 4, 3), (128, 128, 1, 4, 4), (32, 128, 1, 4, 5)]
    if out_features <= 64 * 132:
        found += [(64, 128, splits, 4, 5) for splits in (1, 2, 3, 4, 5, 6, 8, 9) if out_features * splits <= 64 * 300]
        found += [(16, 128, 1, 4, 5), (32, 128, 2, 4, 5)]
    return found


def main(
    tokens: Annotated[str, typer.Option(help="Comma-separated numbers of tokens.")] = "2,4,8,16,32,64",
    models: Annotated[str, typer.Option(help="Comma-separated, of " + ", ".join(MODELS))] = ",".join(MODELS),
    sweep: Annotated[bool, typer.Option(help="Try other configurations.")] = False,
) -> None:
    """Print microseconds and GB/s of each linear layer of the models."""
    from dispec.ops.triton.gemm_tuning import SkinnyGemmConfig, choose_linear
    from dispec.ops.triton.tuning import describe

    device = describe(torch.device("cuda", torch.cuda.current_device()))
    for model in models.split(","):
        for name, (out_features, in_features) in weight_shapes(model).items():
            size = 2 * out_features * in_features
            copies = max(2, min(64, COLD_BYTES // size))
            weights = [
                torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) for _ in range(copies)
            ]
            for count in map(int, tokens.split(",")):
                x = torch.randn(count, in_features, device="cuda", dtype=torch.bfloat16)
                chosen = choose_linear(device, count, out_features, in_features)
                by_torch = time_linear(x, weights, None, by_torch=True)
                line = (
                    f"{model} {name:<9} {count:>3} tokens: torch {by_torch * 1e6:7.2f} us {size / by_torch / 1e9:5.0f}"
                )
                if chosen is not None:
                    ours = time_linear(x, weights, chosen)
                    line += f", ours {ours * 1e6:7.2f} us {size / ours / 1e9:5.0f} GB/s {by_torch / ours:5.2f}x"
                    line += f" {tuple(chosen)}"
                print(line, flush=True)
                if sweep:
                    times = [
                        (time_linear(x, weights, SkinnyGemmConfig(*candidate)), candidate)
                        for candidate in candidates(count, out_features, in_features)
                    ]
                    for seconds, candidate in sorted(times)[:4]:
                        print(f"    {seconds * 1e6:7.2f} us {size / seconds / 1e9:5.0f} GB/s {candidate}", flush=True)


if __name__ == "__main__":
    typer.run(main)
