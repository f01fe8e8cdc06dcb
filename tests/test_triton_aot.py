"""Every Triton kernel, compiled without a GPU exactly as the tables launch it: no spills, and it fits.

The launchers run on meta tensors with the kernels replaced by recorders, so what is compiled here follows from
the launches themselves, specialisations included.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from dispec.ops.kv_cache import scale_rows  # noqa: E402
from dispec.ops.norm import Norm  # noqa: E402
from dispec.ops.triton import (  # noqa: E402
    argmax,
    block_transfer,
    decode_attention,
    fp8_linear,
    gated_gemm,
    gated_linear,
    kv_cache,
    linear,
    linear_residual,
    norm_activation,
    prefill_attention,
    qkv_rope_write,
    quantized_layout,
    quantized_linear,
    rope_write,
    skinny_linear,
    token_threshold,
    tuning,
)
from dispec.ops.triton.tuning import PREFILL, Device  # noqa: E402
from tests.layer_cases import Shape, products  # noqa: E402

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes that one program may use
DECODE_SPILLED = 8  # bytes: the assembler of Triton 3.9 spills an address, that of 3.6 does not
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Reads and writes of global memory in PTX; prefetches and parameters are none.
MEMORY_ACCESS = re.compile(r"\b(?:ld|st|atom|red)\.(?:[\w:]+\.)*global|\bcp\.async\.(?:c[ag]\.shared|bulk)")

KERNELS = {
    block_transfer: ("transfer_blocks_kernel",),
    linear_residual: ("linear_residual_kernel",),
    decode_attention: ("decode_kernel", "combine_kernel"),
    skinny_linear: ("gemv_kernel", "split_k_kernel", "reduce_splits_kernel"),
    gated_linear: ("gated_linear_kernel",),
    gated_gemm: ("gated_gemm_kernel",),
    kv_cache: ("write_kv_kernel",),
    quantized_linear: ("quantized_linear_kernel", "dequantize_kernel"),
    norm_activation: ("rms_norm_kernel", "silu_and_mul_kernel"),
    linear: (),
    fp8_linear: ("round_rows_kernel", "fp8_gemm_kernel"),
    prefill_attention: ("prefill_kernel",),
    rope_write: ("rope_write_kernel",),
    qkv_rope_write: ("qkv_rope_write_kernel",),
    token_threshold: ("token_threshold_kernel",),
    argmax: ("argmax_kernel",),
}

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


class Recorder:
    """Replace a kernel and record its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(size > 0 for size in grid)
        assert all(size < 65536 for size in grid[1:])

        def launch(*positional: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in ("num_warps", "num_stages", "launch_pdl") if name in named}
            arguments = dict(zip(self.kernel.arg_names, positional, strict=False)) | named
            assert arguments.keys() == set(self.kernel.arg_names)
            self.launches.append(Launch(self.kernel, arguments, options))

        return launch


def record(monkeypatch: pytest.MonkeyPatch, capability: int, launch: Callable[[], object]) -> list[Launch]:
    launches: list[Launch] = []
    architecture = f"sm_{capability}"
    device = Device(architecture if architecture in PREFILL else "fallback", 132 if capability == 90 else 108)
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
    for module in (*KERNELS, tuning):
        if hasattr(module, "describe"):
            monkeypatch.setattr(module, "describe", lambda _: device)
    launch()
    monkeypatch.undo()
    return launches


def compile_launch(launch: Launch, capability: int) -> Any:
    """Compile as Triton's launcher would: integers that are 1 are constants, multiples of 16 are known as such."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[index,] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def resources(compiled: Any) -> dict[str, int]:
    """Return registers, stack and local bytes of a thread, as the assembler recorded them in the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(size) for name, size in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}


def machine_code(compiled: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([CUOBJDUMP, "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout


def check(launch: Launch, capability: int, widest_load: bool = True, spilled: int = 0) -> Any:
    """Return the compiled launch, which must not spill and fits the device."""
    compiled = compile_launch(launch, capability)
    used = resources(compiled)
    shared = compiled.metadata.shared
    shape = {name: value for name, value in launch.arguments.items() if name.isupper() and name != "H"}
    print(f"sm_{capability} {launch.kernel.__name__} {shape} {launch.options}: {used['REG']} registers, {shared} B")
    assert used["STACK"] <= spilled, "spills"
    assert used["LOCAL"] == 0, "spills"
    assert shared <= SHARED_MEMORY[capability]
    if widest_load:
        # With loads of less than 16 bytes the kernel is several times slower.
        ptx = compiled.asm["ptx"]
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10|ld\.global[.\w:]*\.v4\.b32", ptx)
    if launch.arguments.get("OVERLAPS"):
        check_waits(compiled.asm["ptx"])
    return compiled


def check_waits(ptx: str) -> None:
    """Check that a kernel that starts early waits once, before its first access to global memory."""
    parts = re.split(r"griddepcontrol\.wait *;", ptx)
    assert [bool(MEMORY_ACCESS.search(part)) for part in parts] == [False, True]


def cache(head_dim: int, block_size: int, kv_heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rows = head_dim + scale_rows(dtype)
    keys = torch.empty(4096, kv_heads, rows, block_size, dtype=dtype, device="meta")
    return keys, keys.new_empty(4096, kv_heads, block_size, rows)


def projected(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    rows = torch.empty(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, device="meta")
    return rows[:, :heads]


def integers(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")


HALF, FULL = torch.bfloat16, torch.float32
# head dim, block size, query heads, key heads, queries per sequence, dtype
DECODES = [
    (64, 16, 14, 2, 1, HALF),
    (64, 16, 9, 3, 16, HALF),
    (80, 16, 32, 32, 1, HALF),
    (128, 16, 12, 2, 1, HALF),
    (128, 64, 32, 8, 1, HALF),
    (128, 32, 12, 2, 8, HALF),
    (256, 16, 8, 4, 1, HALF),
    (256, 16, 8, 4, 16, HALF),
    (128, 16, 12, 2, 1, FULL),
    (128, 16, 12, 2, 8, FULL),
]
PREFILLS = [
    (64, 16, 14, 2, HALF),
    (80, 32, 32, 32, HALF),
    (128, 16, 12, 2, HALF),
    (128, 64, 32, 8, torch.float16),
    (256, 16, 8, 4, HALF),
    (128, 16, 12, 2, FULL),
]


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize(("head_dim", "block_size", "heads", "kv_heads", "query_len", "dtype"), DECODES)
def test_decode(
    monkeypatch: pytest.MonkeyPatch,
    head_dim: int,
    block_size: int,
    heads: int,
    kv_heads: int,
    query_len: int,
    dtype: torch.dtype,
    capability: int,
) -> None:
    keys, values = cache(head_dim, block_size, kv_heads, dtype)
    batch = 1 if head_dim == 128 else 32
    query = projected(batch * query_len, heads, kv_heads, head_dim, dtype)
    tables = integers(batch, 32768 // block_size)
    launches = record(
        monkeypatch,
        capability,
        lambda: decode_attention.decode(query, keys, values, tables, integers(batch), query_len, 0.125),
    )
    assert len(launches) == 2
    check(launches[0], capability, spilled=DECODE_SPILLED)
    if query_len == 1:
        check(launches[1], capability)


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("width", ["wide", "narrow"])
@pytest.mark.parametrize(("head_dim", "block_size", "heads", "kv_heads", "dtype"), PREFILLS)
def test_prefill(
    monkeypatch: pytest.MonkeyPatch,
    head_dim: int,
    block_size: int,
    heads: int,
    kv_heads: int,
    dtype: torch.dtype,
    width: str,
    capability: int,
) -> None:
    keys, values = cache(head_dim, block_size, kv_heads, dtype)
    tokens = 8192 if width == "wide" else 40
    query = projected(tokens, heads, kv_heads, head_dim, dtype)
    tables = integers(2, 8192 // block_size)
    (launch,) = record(
        monkeypatch,
        capability,
        lambda: prefill_attention.prefill(query, keys, values, tables, integers(3), integers(2), 0.125),
    )
    padded = 128 if head_dim == 80 else head_dim
    expected = PREFILL[f"sm_{capability}"][padded, dtype.itemsize][0 if width == "wide" else 1]
    assert launch.arguments["BLOCK_M"] == expected.block_m
    # On an H100 the widest tiles are the fastest although a few registers do not fit.
    check(launch, capability, spilled=96 if (capability, width) == (90, "wide") else 0)


# e4m3 has no conversions before compute capability 8.9.
QUANTIZED = [(torch.int8, 90), (torch.float8_e4m3fn, 90), (torch.int8, 80)]


@pytest.mark.parametrize(
    ("head_dim", "block_size", "heads", "kv_heads", "query_len", "cache_dtype", "capability"),
    [
        *((128, 16, 12, 2, 1, *kind) for kind in QUANTIZED),
        (128, 32, 12, 2, 8, torch.int8, 90),
        (64, 16, 14, 2, 1, torch.int8, 80),
        (256, 64, 8, 4, 16, torch.float8_e4m3fn, 90),
    ],
)
def test_decode_of_a_quantized_cache(
    monkeypatch: pytest.MonkeyPatch,
    head_dim: int,
    block_size: int,
    heads: int,
    kv_heads: int,
    query_len: int,
    cache_dtype: torch.dtype,
    capability: int,
) -> None:
    keys, values = cache(head_dim, block_size, kv_heads, cache_dtype)
    query = projected(query_len, heads, kv_heads, head_dim, HALF)
    tables = integers(1, 32768 // block_size)
    launches = record(
        monkeypatch,
        capability,
        lambda: decode_attention.decode(query, keys, values, tables, integers(1), query_len, 0.125),
    )
    check(launches[0], capability, spilled=DECODE_SPILLED)


@pytest.mark.parametrize(("cache_dtype", "capability"), QUANTIZED)
@pytest.mark.parametrize("tokens", [8192, 40])
def test_prefill_of_a_quantized_cache(
    monkeypatch: pytest.MonkeyPatch, tokens: int, cache_dtype: torch.dtype, capability: int
) -> None:
    keys, values = cache(128, 16, 2, cache_dtype)
    query = projected(tokens, 12, 2, 128, HALF)
    (launch,) = record(
        monkeypatch,
        capability,
        lambda: prefill_attention.prefill(query, keys, values, integers(2, 512), integers(3), integers(2), 0.125),
    )
    check(launch, capability)


@pytest.mark.parametrize(("cache_dtype", "capability"), QUANTIZED)
@pytest.mark.parametrize("tokens", [1, 2048])
def test_writes_to_a_quantized_cache(
    monkeypatch: pytest.MonkeyPatch, tokens: int, cache_dtype: torch.dtype, capability: int
) -> None:
    keys, values = cache(128, 16, 2, cache_dtype)
    rows = torch.empty(tokens, 16, 128, dtype=HALF, device="meta")
    angles = torch.empty(tokens, 64, device="meta")
    slots = rope_write.KVSlots(keys, values, integers(tokens), angles, angles)

    def launch() -> None:
        kv_cache.write_kv(keys, values, rows[:, 12:14], rows[:, 14:], slots.slot_mapping)
        rope_write.rope_write(rows.flatten(1), rows[0, 0], rows[0, 0], 1e-6, slots)

    for one in record(monkeypatch, capability, launch):
        check(one, capability, widest_load=False)


@pytest.mark.parametrize("tokens", [1, 2048])
@pytest.mark.parametrize(("head_dim", "block_size"), [(80, 32), (128, 16), (256, 64)])
def test_write_kv(monkeypatch: pytest.MonkeyPatch, head_dim: int, block_size: int, tokens: int) -> None:
    keys, values = cache(head_dim, block_size, 2, HALF)
    rows = torch.empty(tokens, 16, head_dim, dtype=HALF, device="meta")
    (launch,) = record(
        monkeypatch,
        90,
        lambda: kv_cache.write_kv(keys, values, rows[:, 12:14], rows[:, 14:], integers(tokens)),
    )
    check(launch, 90, widest_load=False)


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("size", [100, 50_257, 151_936, 262_144])
def test_token_threshold(monkeypatch: pytest.MonkeyPatch, size: int, capability: int) -> None:
    weights = torch.empty(4, size, device="meta")
    launches = record(
        monkeypatch,
        capability,
        lambda: token_threshold.token_threshold(weights, integers(4), weights.new_empty(4)),
    )
    assert len(launches) == 1
    check(launches[0], capability, widest_load=size % 16 == 0)


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize(("rows", "size"), [(1, 151_936), (32, 151_936), (128, 49_152), (600, 50_257)])
def test_argmax(monkeypatch: pytest.MonkeyPatch, rows: int, size: int, capability: int) -> None:
    logits = torch.empty(rows, size, dtype=HALF, device="meta")
    (launch,) = record(monkeypatch, capability, lambda: argmax.argmax(logits))
    check(launch, capability, widest_load=size % 16 == 0)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "features", "columns", "kernels"),
    [
        (2, 2048, 1536, ["gemv_kernel"]),
        (1, 896, 896, ["gemv_kernel"]),
        (8, 1536, 1536, ["split_k_kernel"]),
        (2, 17920, 1536, ["split_k_kernel"]),
        (32, 9728, 896, ["split_k_kernel"]),
        (32, 1536, 8960, ["split_k_kernel", "reduce_splits_kernel"]),
        (2, 151936, 1536, ["split_k_kernel"]),
        (64, 128256, 4096, ["split_k_kernel"]),
    ],
)
def test_skinny_linear(
    monkeypatch: pytest.MonkeyPatch, rows: int, features: int, columns: int, kernels: list[str], has_bias: bool
) -> None:
    x = torch.empty(rows, columns, dtype=HALF, device="meta")
    weight = torch.empty(features, columns, dtype=HALF, device="meta")
    bias = weight.new_empty(features) if has_bias else None
    launches = record(monkeypatch, 90, lambda: skinny_linear.linear(x, weight, bias))
    assert [launch.kernel.__name__ for launch in launches] == kernels
    for launch in launches:
        check(launch, 90, widest_load=launch.kernel.__name__ != "reduce_splits_kernel")


@pytest.mark.parametrize(("rows", "features"), [(16, 1536), (33, 17920), (65, 151936)])
def test_large_gemms_are_torchs(monkeypatch: pytest.MonkeyPatch, rows: int, features: int) -> None:
    x = torch.empty(rows, 1536, dtype=HALF, device="meta")
    assert not record(monkeypatch, 90, lambda: skinny_linear.linear(x, x.new_empty(features, 1536), None))


# Shape of a layer, and whether it has head norms.
MODELS = {
    "qwen2.5-1.5b": (Shape(1536, 12, 2, 128, 8960), False),
    "qwen2.5-0.5b": (Shape(896, 14, 2, 64, 4864), False),
    "qwen3-0.6b": (Shape(1024, 16, 8, 128, 3072), True),
    "llama-3.1-8b": (Shape(4096, 32, 8, 128, 14336), False),
}


def layer_launches(
    monkeypatch: pytest.MonkeyPatch, capability: int, rows: int, model: str, dtype: torch.dtype = HALF
) -> list[Launch]:
    """Return the launches of a layer without its attention."""
    shape, has_norms = MODELS[model]

    def floats(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    def launch() -> None:
        x, norm = floats(rows, shape.hidden), floats(shape.hidden)
        rotation = [torch.empty(rows, shape.head_dim // 2, device="meta") for _ in range(2)]
        pages = cache(shape.head_dim, 16, shape.kv_heads, dtype)
        head_norm = floats(shape.head_dim) if has_norms else None
        bias = None if has_norms else floats(shape.qkv)
        given = (*rotation, *pages, integers(rows), head_norm, head_norm)
        qkv_rope_write.qkv_rope_write(x, floats(shape.qkv, shape.hidden), bias, norm, 1e-6, *given)
        for name in ("output", "gate_up", "down"):
            features, columns, has_norm, adds, is_gated, _ = products(shape)[name]
            wide, weight = floats(rows, columns), floats(features, columns)
            if adds:
                linear.linear_residual(x, wide, weight, None)
            else:
                linear.fused_linear(wide, weight, None, norm if has_norm else None, 1e-6, is_gated)

    return record(monkeypatch, capability, launch)


def kernels_of_layer(capability: int, rows: int, model: str) -> list[str]:
    """Return the kernels that are not torch's."""
    shape, has_head_norms = MODELS[model]
    fused = ["linear_residual_kernel", "rope_write_kernel"] if has_head_norms else ["qkv_rope_write_kernel"]
    if rows <= 2 or (capability == 80 and rows <= 16):
        projection = fused
        output = ["linear_residual_kernel"]
    elif rows <= 16:
        projection = ["rms_norm_kernel", "linear_residual_kernel", "rope_write_kernel"]
        if shape.qkv > 132 * 32 or shape.hidden < 1536:  # one program for all columns of a few features
            projection = fused
        output = ["linear_residual_kernel"]
    else:
        projection = ["rms_norm_kernel", "rope_write_kernel"]
        output = ["linear_residual_kernel"] * (capability == 90 and rows <= 32 and shape.hidden == 4096)
    norms = ["rms_norm_kernel"] * (capability == 90 or rows > 16)
    gate = ["gated_linear_kernel"] if capability == 90 or rows <= 32 else ["silu_and_mul_kernel"]
    down = ["linear_residual_kernel"] * (capability == 90 or rows <= 16)
    return [*projection, *output, *norms, *gate, *down]


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rows", [2, 4, 8, 16, 32, 64])
def test_layer(monkeypatch: pytest.MonkeyPatch, rows: int, model: str, capability: int) -> None:
    launches = layer_launches(monkeypatch, capability, rows, model)
    assert [launch.kernel.__name__ for launch in launches] == kernels_of_layer(capability, rows, model)
    for launch in launches:
        assert launch.options.get("launch_pdl", False) == launch.arguments["OVERLAPS"] == (capability == 90)
        check(launch, capability, widest_load=launch.kernel.__name__ != "rope_write_kernel")


@pytest.mark.parametrize("rows", [2, 8])
def test_float16_layer(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    for launch in layer_launches(monkeypatch, 90, rows, "qwen2.5-1.5b", torch.float16):
        check(launch, 90, widest_load=launch.kernel.__name__ != "rope_write_kernel")


@pytest.mark.parametrize("rows", [128, 600])
def test_gemms_of_many_tokens_are_torchs(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = layer_launches(monkeypatch, 90, rows, "qwen2.5-1.5b")
    expected = ["rms_norm_kernel", "rope_write_kernel", "rms_norm_kernel", "silu_and_mul_kernel"]
    assert [launch.kernel.__name__ for launch in launches] == expected
    for launch in launches:
        assert "launch_pdl" not in launch.options
        check(launch, 90, widest_load=launch.kernel.__name__ != "rope_write_kernel")


@pytest.mark.parametrize("model", MODELS)
def test_gated_gemm_of_a_long_prompt(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = layer_launches(monkeypatch, 90, 2048, model)
    assert [launch.kernel.__name__ for launch in launches][-1] == "gated_gemm_kernel"
    compiled = check(launches[-1], 90, widest_load=False)
    # An assembler that takes a result to be read too early waits after each product.
    code = machine_code(compiled)
    assert 0 < code.count("WARPGROUP.DEPBAR") <= code.count("HGMMA") // 3


# N and K of the weights of Qwen2.5-7B.
FP8_SHAPES = {"qkv": (4608, 3584), "output": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}


@pytest.mark.parametrize("rows", [1, 8, 32, 64])
def test_fp8_linear(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    for name, (features, columns) in {**FP8_SHAPES, "head": (152064, 3584), "odd": (1000, 1001)}.items():
        x = torch.empty(rows, columns, dtype=HALF, device="meta")
        weight = torch.empty(features, columns, dtype=torch.float8_e4m3fn, device="meta")
        norm = None if name in ("output", "down") else Norm(x.new_empty(columns), 1e-6)
        added = x.new_empty(rows, features) if norm is None else None
        bias = x.new_empty(features) if name in ("qkv", "odd") else None
        given = (weight, torch.empty(features, 1, device="meta"), bias, norm, added, name == "gate_up")
        rounding, gemm = record(monkeypatch, 90, lambda x=x, given=given: fp8_linear.fp8_linear(x, *given))
        check(rounding, 90, widest_load=name != "odd")
        compiled = check(gemm, 90, widest_load=name != "odd")
        assert "wgmma.mma_async" in compiled.asm["ptx"]


@pytest.mark.parametrize("rows", [1, 64])
def test_fp8_linear_on_ada(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    x = torch.empty(rows, 3584, dtype=HALF, device="meta")
    weight = torch.empty(4608, 3584, dtype=torch.float8_e4m3fn, device="meta")
    given = weight, torch.empty(4608, 1, device="meta"), None, None, None, False
    rounding, gemm = record(monkeypatch, 89, lambda: fp8_linear.fp8_linear(x, *given))
    check(rounding, 89)
    assert re.search(r"mma.sync.*e4m3", check(gemm, 89).asm["ptx"])


QUANTIZED_LAYERS = {  # output features, columns, whether norm, gate and residual surround it
    "qkv": (4608, 3584, True, False, False),
    "gate_up": (37888, 3584, True, True, False),
    "down": (3584, 18944, False, False, True),
    "head": (151936, 1536, False, False, False),
}


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize(
    ("tokens", "name", "kind", "group", "has_offsets"),
    [
        (1, "qkv", "int4", 128, False),
        (1, "gate_up", "int8", 128, False),
        (8, "down", "int4", 128, True),
        (16, "gate_up", "int4", 32, True),
        (32, "qkv", "int4", 32, False),
        (64, "gate_up", "int4", 128, False),
        (64, "down", "int8", None, False),
        (16, "head", "int8", 128, False),
        (300, "gate_up", "int8", 128, False),
        (2048, "down", "int4", 32, True),
    ],
)
def test_quantized_linear(
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    name: str,
    kind: str,
    group: int | None,
    has_offsets: bool,
    capability: int,
) -> None:
    features, columns, has_norm, is_gated, adds = QUANTIZED_LAYERS[name]
    size = group or columns
    words = quantized_layout.block_words(kind, size, columns)
    blocks = columns // (words * quantized_layout.CODES[kind])
    data = torch.empty(features // 16, blocks, 16, words, dtype=torch.int16, device="meta")
    scales = torch.empty(columns // size, features, dtype=torch.float16, device="meta")
    x = torch.empty(tokens, columns, dtype=HALF, device="meta")
    norm = Norm(x.new_empty(columns), 1e-6) if has_norm and tokens == 1 else None
    residual = x.new_empty(tokens, features) if adds else None
    offsets = scales if has_offsets else None
    launches = record(
        monkeypatch,
        capability,
        lambda: quantized_linear.quantized_linear(
            x, data, scales, offsets, features, kind, size, None, norm, residual, is_gated
        ),
    )
    expected = "dequantize_kernel" if tokens > 512 else "quantized_linear_kernel"
    assert {launch.kernel.__name__ for launch in launches} == {expected}
    check(launches[0], capability)


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("num_words", [4096, 1088])  # a page of 7B in bf16, and of 1.5B in int8
def test_transfer_blocks(monkeypatch: pytest.MonkeyPatch, num_words: int, capability: int) -> None:
    cache = torch.empty(28, 4096, num_words, dtype=torch.int64, device="meta")
    blocks = torch.empty(64, dtype=torch.int64, device="meta")

    def launch() -> None:
        block_transfer.fold_blocks(cache, cache, blocks)
        block_transfer.transfer_blocks(cache, cache, blocks, cache, cache, blocks)

    for one in record(monkeypatch, capability, launch):
        compiled = check(one, capability, widest_load=False)
        assert re.search(r"ld\.global[.\w:]*\.v2\.b64", compiled.asm["ptx"])
