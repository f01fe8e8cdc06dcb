"""Linear layers in e4m3 on a CUDA device, through `ops.linear`, against the oracle in float64."""

import math

import jaxtyping
import pytest
import torch
from torch import Tensor

from dispec import ops
from dispec.ops.quantization import Quantization, quantize
from tests.fp8_cases import Fp8Case, expect_fp8, expected_rows, make_fp8_case

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ops.has_quantized_kernel("fp8", CUDA, torch.bfloat16), reason="needs a CUDA device with e4m3"
    ),
]

LAYERS = {
    "qkv": (4608, 3584, {"has_norm": True, "has_bias": True}),
    "output": (3584, 3584, {"adds": True}),
    "gate_up": (37888, 3584, {"has_norm": True, "is_gated": True}),
    "down": (3584, 18944, {"adds": True}),
    "small": (1152, 896, {"has_norm": True, "has_bias": True}),
    "odd": (1000, 1001, {"has_norm": True, "has_bias": True, "adds": True}),
    "odd gate": (90, 72, {"adds": True, "has_bias": True, "is_gated": True}),
    "bias, gate": (512, 256, {"adds": True, "has_bias": True, "has_norm": True, "is_gated": True}),
}
TOKENS = [1, 2, 8, 16, 17, 32, 64, 65, 200, 600]


def run(case: Fp8Case) -> Tensor:
    x, weight, bias, norm, residual, is_gated = case
    # The allocator gives the output memory that holds NaN.
    torch.full((len(x), weight.shape[0]), math.nan, dtype=x.dtype, device=CUDA)
    return ops.linear(x, ops.pack(weight), bias, norm=norm, residual=residual, is_gated=is_gated)


@pytest.mark.parametrize("name", LAYERS)
def test_linear(name: str) -> None:
    features, columns, around = LAYERS[name]
    ops.allocate_workspaces(CUDA)
    whole = make_fp8_case(max(TOKENS), features, columns, **around, device="cuda")
    for tokens in TOKENS:
        order = torch.randperm(max(TOKENS), device=CUDA)[:tokens]
        case = whole._replace(
            x=whole.x[order], residual=None if whole.residual is None else whole.residual[order].contiguous()
        )
        residual = None if case.residual is None else case.residual.clone()
        actual = run(case)
        expect_fp8(case, actual)
        assert torch.equal(actual, run(case)), "two calls give the same bits"
        if residual is not None:
            assert torch.equal(case.residual, residual)
    empty = whole._replace(x=whole.x[:0], residual=None if whole.residual is None else whole.residual[:0])
    assert run(empty).shape == (0, features // 2 if whole.is_gated else features)


@pytest.mark.parametrize(("tokens", "columns"), [(1, 3584), (33, 18944), (5, 1001), (2, 72)])
def test_rounding(tokens: int, columns: int) -> None:
    from dispec.ops.triton.fp8_linear import round_rows

    case = make_fp8_case(tokens, 16, columns, device="cuda")
    codes, scales = round_rows(case.x, None)
    expected, expected_scales = expected_rows(case)
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(codes.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_rows_are_rounded_alike_in_every_batch() -> None:
    from dispec.ops.triton.fp8_linear import round_rows

    case = make_fp8_case(65, 16, 3584, has_norm=True, device="cuda")
    codes, scales = round_rows(case.x, case.norm)
    for row in (0, 31, 64):
        one, scale = round_rows(case.x[row : row + 1], case.norm)
        assert torch.equal(one.view(torch.uint8), codes[row : row + 1].view(torch.uint8))
        assert scale == scales[row]


def test_every_configuration_is_exact_for_small_integers() -> None:
    from dispec.ops.triton.fp8_linear import fp8_linear
    from dispec.ops.triton.gemm_tuning import SkinnyGemmConfig

    torch.manual_seed(0)
    x = torch.randint(-8, 9, (37, 1040), device=CUDA).bfloat16()
    x[:, 3] = 448
    weight = torch.randint(-8, 9, (200, 1040), device=CUDA).float()
    weight[:, 3] = 0
    scales = 2.0 ** torch.randint(-3, 3, (200, 1), device=CUDA)
    expected = (x.double() @ (weight.double() * scales).T).bfloat16()
    given = weight.to(torch.float8_e4m3fn), scales.float(), None, None, None, False
    for config in ((64, 128, 1, 4, 3), (64, 256, 3, 4, 3), (128, 128, 2, 4, 4), (128, 256, 1, 8, 3)):
        assert torch.equal(fp8_linear(x, *given, SkinnyGemmConfig(*config)), expected), config


@pytest.mark.parametrize("tokens", [1, 2, 32, 128])
def test_a_recorded_chain_of_layers(tokens: int) -> None:
    """A recorded chain, some with split-K, equals the layers one by one in every replay."""
    ops.allocate_workspaces(CUDA)
    layers = [
        tuple(
            make_fp8_case(tokens, features, columns, **around, device="cuda")
            for features, columns, around in (LAYERS["gate_up"], LAYERS["down"])
        )
        for _ in range(2)
    ]
    packed = [tuple(ops.pack(case.weight) for case in layer) for layer in layers]

    def chain(wait: bool) -> Tensor:
        x = layers[0][0].x
        for (gate_up, _), weights in zip(layers, packed, strict=True):
            gated = ops.linear(x, weights[0], norm=gate_up.norm, is_gated=True)
            x = ops.linear(gated, weights[1], residual=x)
            if wait:
                torch.cuda.synchronize()
        return x

    expected = chain(wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = chain(wait=False)
    for _ in range(20):
        output.fill_(math.nan)
        graph.replay()
        assert torch.equal(output, expected)


def test_compiled_for_all_numbers_of_tokens() -> None:
    case = make_fp8_case(64, 512, 256, has_norm=True, is_gated=True, adds=True, device="cuda")
    weight, ran = ops.pack(case.weight), []

    def layer(x: Tensor, residual: Tensor) -> Tensor:
        return ops.linear(x, weight, norm=case.norm, residual=residual, is_gated=True)

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        ran.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    jaxtyping.config.update("jaxtyping_disable", True)  # the compiler cannot trace through the checks
    try:
        for tokens in (33, 2, 64):
            x, residual = case.x[:tokens].clone(), case.residual[:tokens].clone()
            for tensor in (x, residual):
                torch._dynamo.mark_dynamic(tensor, 0)
            assert torch.equal(compiled(x, residual), layer(x, residual))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert len(ran) == 1


def test_rows_of_a_tied_head() -> None:
    weight = torch.randn(500, 96).bfloat16()
    packed = ops.pack(quantize(weight, Quantization("fp8")).to(CUDA))
    ids = torch.tensor([3, 499, 3, 0], device=CUDA)
    rows = ops.embedding(packed, ids, 96)
    assert rows.dtype is torch.bfloat16
    torch.testing.assert_close(rows.cpu().float(), weight[ids.cpu()].float(), rtol=0.07, atol=0.02)


def test_registration() -> None:
    case = make_fp8_case(5, 64, 96, has_norm=True, has_bias=True, adds=True, device="cuda")
    data, scales, offsets, _, *layout = ops.pack(case.weight)
    arguments = (case.x, data, scales, offsets, *layout, case.bias, *case.norm, case.residual, False)
    # "test_schema" multiplies its arguments, which torch does not do in e4m3.
    torch.library.opcheck(torch.ops.dispec.quantized_linear.default, arguments, test_utils="test_faketensor")
