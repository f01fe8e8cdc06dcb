"""The kernels of a layer's ops against the oracles, run by Triton's interpreter: see test_triton_kernels."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
numpy = pytest.importorskip("numpy")
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
    pytest.skip("the interpreter of this Triton needs numpy before 2.4", allow_module_level=True)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:

    def test_layers_in_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
        assert finished.returncode == 0, finished.stdout[-20000:] + finished.stderr[-5000:]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("options", "printed"),
        [
            (["--tokens", "2,8", "--minutes", "9"], ["2 tokens", "8 tokens"]),
            (["--tokens", "", "--sweep", "--sweep-tokens", "8", "--minutes", "0"], ["SkinnyGemmConfig", "torch alone"]),
        ],
    )
    def test_the_benchmark_of_layers_runs_without_a_gpu(options: list[str], printed: list[str]) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(
            [sys.executable, "-m", "dispec.bench.layer", "--device", "cpu", *options],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert finished.returncode == 0, finished.stderr[-5000:]
        assert all(words in finished.stdout for words in printed), finished.stdout
        assert "Error" not in finished.stdout

else:
    from triton.language import float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from dispec.ops import reference
    from dispec.ops.triton import linear, linear_residual, qkv_rope_write, rope_write
    from dispec.ops.triton.gemm_tuning import GatedGemmConfig, SkinnyGemmConfig
    from tests.layer_cases import (
        Shape,
        expect_product,
        expect_projection,
        make_projection,
        product_arguments,
        products,
    )

    SMALL = Shape(hidden=96, heads=4, kv_heads=2, head_dim=64, intermediate=112)
    WIDE = Shape(hidden=128, heads=3, kv_heads=1, head_dim=128, intermediate=80, block_size=32)
    ODD = Shape(hidden=80, heads=2, kv_heads=2, head_dim=80, intermediate=48)

    # Block sizes that leave a rest of features and of columns, and more tiles than one; None for torch's GEMM.
    SUM = SkinnyGemmConfig(2, 64, 0, 2, fuses_norm=True)
    WIDE_SUM = SkinnyGemmConfig(8, 64, 0, 2, fuses_norm=True)
    DOT = SkinnyGemmConfig(16, 32, 1, 4, 3, fuses_norm=True)
    WIDE_DOT = SkinnyGemmConfig(64, 32, 1, 4, 3, fuses_norm=True)
    NORMED_DOT = SkinnyGemmConfig(16, 32, 1, 4, 3)  # normed by a kernel before it
    SPLIT = SkinnyGemmConfig(16, 32, 3, 4, 3)

    TYPES = (torch.float16, torch.bfloat16)
    both_types = pytest.mark.parametrize("dtype", TYPES, ids=["float16", "bfloat16"])

    # Shapes, rows and configurations of a product, and of a projection.
    PRODUCTS = [
        (SMALL, 1, SUM),
        (SMALL, 2, WIDE_SUM),
        (WIDE, 4, SUM),
        (ODD, 3, WIDE_SUM),
        (SMALL, 1, DOT),
        (WIDE, 8, WIDE_DOT),
        (ODD, 6, DOT),
        (SMALL, 20, NORMED_DOT),
        (SMALL, 5, SPLIT),
        (WIDE, 16, SPLIT),
        (ODD, 3, None),
        (SMALL, 33, None),
        (SMALL, 0, None),
    ]
    PROJECTIONS = [
        (SMALL, 1, SUM),
        (WIDE, 4, WIDE_SUM),
        (ODD, 2, SUM),
        (SMALL, 7, DOT),
        (WIDE, 16, WIDE_DOT),
        (ODD, 3, DOT),
        (WIDE, 5, NORMED_DOT),
        (SMALL, 7, SPLIT),
        (SMALL, 17, None),
        (WIDE, 1, None),
        (ODD, 40, None),
        (SMALL, 0, None),
    ]

    def crossed(cases: list[tuple], others: Iterable[object]) -> list[tuple]:
        """Return each case with each of the others, in one of the two types: each pair of the three occurs."""
        pairs = itertools.product(enumerate(cases), enumerate(others))
        return [(*case, other, TYPES[(number + index) % 2]) for (number, case), (index, other) in pairs]

    @pytest.fixture(autouse=True)
    def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
        """Fill what the launchers allocate with NaN, so that a row that is not written shows."""
        empty = torch.empty

        def poisoned(*size: object, **options: object) -> Tensor:
            tensor = empty(*size, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

        monkeypatch.setattr(torch, "empty", poisoned)

    @pytest.fixture(autouse=True)
    def _bfloat16_dots(monkeypatch: pytest.MonkeyPatch) -> None:
        """Widen bfloat16 operands of a dot: the interpreter stores them as integers and would multiply those."""
        dot = InterpreterBuilder.create_dot

        def widened(self: InterpreterBuilder, a, b, *rest):  # type: ignore[no-untyped-def]
            if a.dtype.is_bf16():
                a, b = (
                    TensorHandle((operand.data.astype(numpy.uint32) << 16).view(numpy.float32), float32)
                    for operand in (a, b)
                )
            return dot(self, a, b, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)

    @pytest.fixture
    def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[SkinnyGemmConfig | None], None]:
        """Replace what the table would choose."""

        def replace(config: SkinnyGemmConfig | None) -> None:
            for module in (linear, qkv_rope_write):
                monkeypatch.setattr(module, "choose_fused_linear", lambda *_, **__: config)

        return replace

    @pytest.mark.parametrize(("shape", "rows", "config", "name", "dtype"), crossed(PRODUCTS, products(SMALL)))
    def test_linear(
        shape: Shape,
        rows: int,
        config: SkinnyGemmConfig | None,
        name: str,
        dtype: torch.dtype,
        choose: Callable[[SkinnyGemmConfig | None], None],
    ) -> None:
        product = products(shape)[name]
        if config is SPLIT and product.is_gated:
            pytest.skip("the gated kernel does not split the columns")
        choose(config)
        arguments = product_arguments(product, rows, dtype)
        if product.adds:
            total = torch.randn(rows, product.features).to(dtype)
            added = total.clone()
            linear.linear_residual(added, *arguments[:3])
            expect_product(arguments, added, total)
        else:
            expect_product(arguments, linear.fused_linear(*arguments))

    @both_types
    @pytest.mark.parametrize(("shape", "rows", "programs"), [(SMALL, 40, 3), (WIDE, 33, 1), (SMALL, 5, 99)])
    def test_gated_gemm(
        shape: Shape,
        rows: int,
        programs: int,
        dtype: torch.dtype,
        choose: Callable[[SkinnyGemmConfig | None], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Of parts of tiles, with programs for several tiles and for none."""
        config = GatedGemmConfig(16, 32, 32, 2, programs, num_warps=4, num_stages=2)
        choose(None)
        monkeypatch.setattr(linear, "choose_gated_gemm", lambda *_: config)
        monkeypatch.setattr(linear, "silu_and_mul", lambda *_: pytest.fail("the gate is in the GEMM"))
        arguments = product_arguments(products(shape)["gate_up"], rows, dtype)
        expect_product(arguments, linear.fused_linear(*arguments))

    @pytest.mark.parametrize(
        ("shape", "rows", "config", "has_head_norms", "dtype"), crossed(PROJECTIONS, [True, False])
    )
    def test_projection(
        shape: Shape,
        rows: int,
        config: SkinnyGemmConfig | None,
        has_head_norms: bool,
        dtype: torch.dtype,
        choose: Callable[[SkinnyGemmConfig | None], None],
    ) -> None:
        choose(config)
        projection = make_projection(
            shape, rows, dtype=dtype, has_bias=not has_head_norms, has_head_norms=has_head_norms, seed=rows
        )
        arguments = projection.arguments()
        expect_projection(projection, arguments, qkv_rope_write.qkv_rope_write(*arguments))

    @pytest.mark.parametrize(
        ("shape", "rows", "has_head_norms", "dtype"), crossed([(SMALL, 33), (WIDE, 16), (ODD, 40)], [True, False])
    )
    def test_projection_of_a_prompt(
        shape: Shape,
        rows: int,
        has_head_norms: bool,
        dtype: torch.dtype,
        choose: Callable[[SkinnyGemmConfig | None], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Programs take several tokens each, the last one fewer."""
        choose(None)
        monkeypatch.setattr(rope_write, "MIN_TILED_WRITE_TOKENS", 16)
        projection = make_projection(shape, rows, dtype=dtype, has_head_norms=has_head_norms, seed=rows)
        arguments = projection.arguments()
        expect_projection(projection, arguments, qkv_rope_write.qkv_rope_write(*arguments))

    @pytest.mark.parametrize("is_gated", [False, True])
    def test_combinations_that_no_layer_uses(is_gated: bool, choose: Callable[[SkinnyGemmConfig | None], None]) -> None:
        """A norm and a bias together, a bias that is added, and a weight and rows that are strided."""
        for config in (SUM, DOT, None):
            choose(config)
            product = products(SMALL)["gate_up"]._replace(is_gated=is_gated, has_bias=True)
            arguments = product_arguments(product, 3)
            x, weight, bias = arguments[:3]
            for strided in ((x.T.contiguous().T, weight), (x, weight.T.contiguous().T)):
                expect_product(arguments, linear.fused_linear(*strided, *arguments[2:]))
                total = torch.zeros(3, product.features, dtype=x.dtype)
                linear.linear_residual(total, *strided, bias)
                expect_product((*arguments[:3], None, 0.0, False), total)

    @pytest.mark.parametrize("config", [SUM, DOT])
    def test_float16_does_not_overflow_before_the_norm(
        config: SkinnyGemmConfig, choose: Callable[[SkinnyGemmConfig | None], None]
    ) -> None:
        choose(config)
        arguments = make_projection(SMALL, 2).arguments()
        arguments[0].mul_(1000)
        arguments[3].mul_(20)  # their product is beyond float16
        assert qkv_rope_write.qkv_rope_write(*arguments).isfinite().all()

    @pytest.mark.parametrize("config", [SUM, DOT])
    def test_pages_are_exact_where_sums_are_exact(
        config: SkinnyGemmConfig, choose: Callable[[SkinnyGemmConfig | None], None]
    ) -> None:
        """Rows of ones and minus ones are their own norm, small integers sum without rounding, right angles turn so."""
        choose(config)
        projection = make_projection(SMALL, 2, dtype=torch.bfloat16)
        x, qkv, bias, norm, _, cosine, sine = projection.before
        x.copy_(torch.where(torch.rand_like(x.float()) < 0.5, -1.0, 1.0))
        qkv.copy_(torch.randint(-1, 2, qkv.shape))
        bias.copy_(torch.randint(-5, 6, bias.shape))
        norm.fill_(1.0)
        cosine.copy_(torch.tensor([[0.0], [-1.0]]))
        sine.copy_(torch.tensor([[1.0], [0.0]]))
        projection = projection._replace(before=(*projection.before[:4], 0.0, cosine, sine))  # no eps
        arguments, expected = projection.arguments(), projection.arguments()
        qkv_rope_write.qkv_rope_write(*arguments)
        reference.qkv_rope_write(*expected)
        for index in (7, 8):
            assert torch.equal(arguments[index].nan_to_num(777.0), expected[index].nan_to_num(777.0))

    def test_split_gemms_reset_their_counters() -> None:
        arguments = product_arguments(products(SMALL)["down"], 2)
        x, weight = arguments[:2]
        results = [linear_residual.norm_linear_residual(x, weight, None, None, None, SPLIT) for _ in range(2)]
        assert torch.equal(*results)
        expect_product(arguments, results[0])
        counters = linear_residual.split_counters(x.device)
        assert len(counters) == linear_residual.MAX_COUNTERS
        assert not counters.any()
