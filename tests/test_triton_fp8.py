"""The e4m3 kernels against the oracle, run by Triton's interpreter: see test_triton_kernels."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
numpy = pytest.importorskip("numpy")
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
    pytest.skip("the interpreter of this Triton needs numpy before 2.4", allow_module_level=True)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:

    def test_fp8_in_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
        assert finished.returncode == 0, finished.stdout[-20000:] + finished.stderr[-5000:]

else:
    import triton.language as tl
    from triton.runtime import interpreter

    from dispec.ops.triton import fp8_linear
    from dispec.ops.triton.gemm_tuning import SkinnyGemmConfig
    from dispec.ops.triton.linear_residual import split_counters
    from tests.fp8_cases import Fp8Case, expect_fp8, expected_rows, make_fp8_case

    ONE, WIDE, SPLIT = (
        SkinnyGemmConfig(32, 64, 1, 4, 3),
        SkinnyGemmConfig(64, 128, 1, 4, 3),
        SkinnyGemmConfig(32, 32, 3, 4, 3),
    )
    TYPES = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
    }

    @pytest.fixture(autouse=True)
    def _rounding(monkeypatch: pytest.MonkeyPatch) -> None:
        """Round to the nearest as devices do: the interpreter truncates to bfloat16 and loses carries in e4m3."""

        def convert(data, source, target, _):  # type: ignore[no-untyped-def]
            raw = torch.from_numpy(numpy.frombuffer(data.tobytes(), numpy.uint8).copy())
            rounded = raw.view(TYPES[source]).to(TYPES[target])
            unsigned = numpy.dtype(f"uint{target.primitive_bitwidth}")
            return rounded.view(torch.uint8).numpy().view(unsigned).reshape(data.shape)

        monkeypatch.setattr(interpreter, "_convert_float", convert)

    @pytest.fixture(autouse=True)
    def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
        """Fill what the launchers allocate with NaN, so that an element that is not written shows."""
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))

    def run(case: Fp8Case, config: SkinnyGemmConfig | None) -> Tensor:
        x, weight, *rest = case
        return fp8_linear.fp8_linear(x, weight.codes, weight.scales, *rest, config)

    @pytest.mark.parametrize(("has_bias", "has_norm", "adds"), [(True, True, False), (False, False, True)])
    @pytest.mark.parametrize("is_gated", [False, True])
    @pytest.mark.parametrize(
        ("tokens", "features", "columns", "config"),
        [
            (1, 48, 96, ONE),
            (3, 90, 77, ONE),  # odd numbers of columns and blocks of features
            (5, 128, 300, WIDE),
            (20, 70, 96, SPLIT),
            (2, 34, 81, SPLIT),
            (70, 66, 64, ONE),  # two blocks of tokens
            (67, 40, 100, SPLIT),
            (0, 48, 96, ONE),
            (3, 48, 80, None),  # what the table chooses
        ],
    )
    def test_linear(
        tokens: int,
        features: int,
        columns: int,
        config: SkinnyGemmConfig | None,
        is_gated: bool,
        has_bias: bool,
        has_norm: bool,
        adds: bool,
    ) -> None:
        case = make_fp8_case(
            tokens, features, columns, has_bias=has_bias, has_norm=has_norm, adds=adds, is_gated=is_gated
        )
        expect_fp8(case, run(case, config))
        if config is SPLIT:
            assert not split_counters(case.x.device).any()

    @pytest.mark.parametrize("has_norm", [False, True])
    @pytest.mark.parametrize(("tokens", "columns"), [(5, 96), (3, 77), (1, 1000)])
    def test_rounding(tokens: int, columns: int, has_norm: bool) -> None:
        case = make_fp8_case(tokens, 16, columns, has_norm=has_norm)
        codes, scales = fp8_linear.round_rows(case.x, case.norm)
        expected, expected_scales = expected_rows(case)
        torch.testing.assert_close(scales, expected_scales, rtol=1e-6 if not has_norm else 8e-3, atol=0)
        if has_norm:  # sums in another order may round a few elements to the neighbour
            assert (codes.float() != expected.float()).sum() <= columns // 50
        else:
            assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))

    def test_rows_are_rounded_alike_in_every_batch() -> None:
        case = make_fp8_case(9, 16, 96, has_norm=True)
        codes, scales = fp8_linear.round_rows(case.x, case.norm)
        for row in range(9):
            one, scale = fp8_linear.round_rows(case.x[row : row + 1], case.norm)
            assert torch.equal(one.view(torch.uint8), codes[row : row + 1].view(torch.uint8))
            assert scale == scales[row]

    @pytest.mark.parametrize("config", [ONE, SPLIT])
    def test_small_integers_are_exact(config: SkinnyGemmConfig) -> None:
        """Rows whose largest element is 448 have a scale of 1, and sums of small integers are not rounded."""
        case = make_fp8_case(4, 50, 70)
        x = torch.randint(-8, 9, (4, 70)).bfloat16()
        x[:, 3] = 448
        case.weight.codes.copy_(torch.randint(-8, 9, (50, 70)).float())
        case.weight.codes[:, 3] = 0
        case.weight.scales.copy_(2.0 ** torch.randint(-3, 3, (50, 1)))
        expected = x.double() @ (case.weight.codes.double() * case.weight.scales).T
        assert torch.equal(run(case._replace(x=x), config), expected.bfloat16())

    def test_strided_rows() -> None:
        case = make_fp8_case(4, 50, 96, has_norm=True)
        expected = run(case, ONE)
        for strided in (torch.cat((case.x, case.x), 1)[:, :96], case.x.T.contiguous().T):
            assert torch.equal(run(case._replace(x=strided), ONE), expected)
