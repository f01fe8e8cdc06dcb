"""Configurations that `bench.layer` tries for each product of a layer: few, because each takes a compilation."""

# Features a program, columns a tile, splits (0: without tensor cores), warps, stages.
Candidate = tuple[int, int, int, int, int]

# Without tensor cores a warp takes 256 columns, 16 bytes a thread: with fewer, x would change its layout in every turn.
_SUMS: dict[str, list[Candidate]] = {
    "qkv": [(2, 512, 0, 2, 1), (2, 1024, 0, 4, 1), (4, 1024, 0, 4, 1), (4, 256, 0, 1, 1), (2, 256, 0, 1, 1)],
    "output": [(1, 512, 0, 2, 1), (4, 512, 0, 2, 1), (2, 1024, 0, 4, 1), (2, 256, 0, 1, 1), (2, 2048, 0, 4, 1)],
    "gate_up": [(2, 512, 0, 2, 1), (4, 1024, 0, 4, 1), (4, 256, 0, 1, 1), (8, 256, 0, 1, 1), (2, 1024, 0, 4, 1)],
    "down": [(1, 1024, 0, 4, 1), (1, 2048, 0, 8, 1), (2, 2048, 0, 8, 1), (4, 1024, 0, 4, 1), (2, 512, 0, 2, 1)],
}
_DOTS: dict[str, list[Candidate]] = {
    "qkv": [(16, 128, 1, 4, 6), (16, 512, 1, 4, 3), (32, 128, 1, 4, 5), (16, 256, 1, 2, 4)],
    "output": [(16, 256, 1, 4, 4), (16, 512, 1, 4, 3), (32, 256, 2, 4, 3), (64, 128, 5, 4, 4), (16, 128, 3, 4, 4)],
    "gate_up": [(64, 128, 1, 4, 3), (64, 128, 1, 4, 5), (32, 256, 1, 4, 4), (128, 128, 1, 4, 4), (128, 128, 1, 8, 3)],
    "down": [(64, 128, 8, 4, 4), (64, 128, 11, 4, 3), (32, 256, 4, 4, 4), (16, 512, 2, 4, 4), (16, 512, 1, 4, 5)],
}
# Of the others for 1 to 4 rows, in case that many programs which wait little are the slower ones.
_TENSOR_CORES: dict[str, list[Candidate]] = {
    "qkv": [(16, 256, 1, 4, 4)],
    "output": [(16, 256, 2, 4, 4)],
    "gate_up": [(64, 128, 1, 4, 4)],
    "down": [(64, 128, 5, 4, 4)],
}


def candidates(product: str, rows: int) -> list[Candidate]:
    """What to try for one of the products "qkv", "output", "gate_up" and "down"."""
    return [*_SUMS[product], *_TENSOR_CORES[product]] if rows <= 4 else _DOTS[product]
