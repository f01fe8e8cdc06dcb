"""Configurations that `bench.layer` tries for each GEMM of a layer: few, because each takes a compilation."""

# Fields of `SkinnyGemmConfig`.
Candidate = tuple[int, int, int, int, int]

# Without tensor cores a warp takes 256 columns, 16 bytes a thread: with fewer, x changes its layout in every iteration.
_CUDA_CORES: dict[str, list[Candidate]] = {
    "qkv": [(2, 512, 0, 2, 1), (2, 1024, 0, 4, 1), (4, 1024, 0, 4, 1), (4, 256, 0, 1, 1), (2, 256, 0, 1, 1)],
    "output": [(1, 512, 0, 2, 1), (4, 512, 0, 2, 1), (2, 1024, 0, 4, 1), (2, 256, 0, 1, 1), (2, 2048, 0, 4, 1)],
    "gate_up": [(2, 512, 0, 2, 1), (4, 1024, 0, 4, 1), (4, 256, 0, 1, 1), (8, 256, 0, 1, 1), (2, 1024, 0, 4, 1)],
    "down": [(1, 1024, 0, 4, 1), (1, 2048, 0, 8, 1), (2, 2048, 0, 8, 1), (4, 1024, 0, 4, 1), (2, 512, 0, 2, 1)],
}
_TENSOR_CORES: dict[str, list[Candidate]] = {
    "qkv": [(16, 128, 1, 4, 6), (16, 512, 1, 4, 3), (32, 128, 1, 4, 5), (16, 256, 1, 2, 4)],
    "output": [(16, 256, 1, 4, 4), (16, 512, 1, 4, 3), (32, 256, 2, 4, 3), (64, 128, 5, 4, 4), (16, 128, 3, 4, 4)],
    "gate_up": [(64, 128, 1, 4, 3), (64, 128, 1, 4, 5), (32, 256, 1, 4, 4), (128, 128, 1, 4, 4), (128, 128, 1, 8, 3)],
    "down": [(64, 128, 8, 4, 4), (64, 128, 11, 4, 3), (32, 256, 4, 4, 4), (16, 512, 2, 4, 4), (16, 512, 1, 4, 5)],
}
# On tensor cores for 1 to 4 tokens.
_TENSOR_CORES_FEW: dict[str, list[Candidate]] = {
    "qkv": [(16, 256, 1, 4, 4)],
    "output": [(16, 256, 2, 4, 4)],
    "gate_up": [(64, 128, 1, 4, 4)],
    "down": [(64, 128, 5, 4, 4)],
}


def candidates(matrix: str, num_tokens: int) -> list[Candidate]:
    """Return the configurations for one of "qkv", "output", "gate_up" and "down"."""
    if num_tokens > 4:
        return _TENSOR_CORES[matrix]
    return [*_CUDA_CORES[matrix], *_TENSOR_CORES_FEW[matrix]]
