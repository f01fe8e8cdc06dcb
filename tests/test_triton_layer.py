"""The kernels of a whole layer against the oracle, run by Triton's interpreter on the CPU: see test_triton_kernels."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
numpy = pytest.importorskip("numpy")
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
    pytest.skip("the interpreter of this Triton needs numpy before 2.4", allow_module_level=True)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:

    @pytest.mark.slow
    def test_layers_in_the_interpreter(tmp_path: Path) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k"]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        halves = {half: tmp_path / f"{half}.txt" for half in ("bfloat16", "not bfloat16")}
        processes = {}
        with ExitStack() as stack:
            for half, said in halves.items():  # each keeps one core busy for a minute
                file = stack.enter_context(said.open("w"))
                started = subprocess.Popen([*command, half], env=environment, stdout=file, stderr=subprocess.STDOUT)
                processes[half] = stack.enter_context(started)
            for process in processes.values():
                stack.callback(process.kill)
            for half, process in processes.items():
                assert process.wait(timeout=600) == 0, halves[half].read_text()[-20000:]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--rows", "2,8", "--minutes", "9"], ["2 rows as one op", "8 rows as one op", "8 rows as parts"]),
            (["--rows", "", "--sweep", "--sweep-rows", "8", "--minutes", "0"], ["FewRowsConfig", "torch alone"]),
        ],
    )
    def test_the_benchmark_of_layers_runs_without_a_gpu(options: list[str], said: list[str]) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(
            [sys.executable, "-m", "bench.layer", "--device", "cpu", *options],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert finished.returncode == 0, finished.stderr[-5000:]
        assert all(words in finished.stdout for words in said), finished.stdout
        assert "Error" not in finished.stdout

else:
    from triton.language import float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from ops import reference
    from ops.norm import Norm
    from ops.triton import add_product, decoder_layer, rotate_product
    from ops.triton.tuning import FewRowsConfig, LayerConfig
    from tests.layer_cases import Layer, Shape, expect_layer, make_layer

    TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 8e-2}
    SMALL = Shape(hidden=96, heads=4, kv_heads=2, head_dim=64, intermediate=112)
    WIDE = Shape(hidden=128, heads=3, kv_heads=1, head_dim=128, intermediate=80, block_size=32)
    ODD = Shape(hidden=80, heads=2, kv_heads=2, head_dim=80, intermediate=48)

    # Block sizes that leave a rest of features and of columns, and more tiles than one.
    SUMS = LayerConfig(*[FewRowsConfig(block_n, 64, 0, 2) for block_n in (4, 2, 8, 2)])
    DOTS = LayerConfig(
        FewRowsConfig(16, 32, 1, 4, 3),
        FewRowsConfig(32, 32, 2, 4, 3),
        FewRowsConfig(64, 32, 1, 4, 3),
        FewRowsConfig(16, 32, 3, 4, 3),
    )
    APART = DOTS._replace(folds_norm=False)
    TORCH = LayerConfig(None, None, None, None)
    MIXED = LayerConfig(None, SUMS.output, None, DOTS.down)

    @pytest.fixture(autouse=True)
    def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the launchers allocate is NaN, so that a row nobody writes is seen."""
        empty = torch.empty

        def poisoned(*size: object, **options: object) -> Tensor:
            tensor = empty(*size, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

        monkeypatch.setattr(torch, "empty", poisoned)

    @pytest.fixture(autouse=True)
    def _bfloat16_dots(monkeypatch: pytest.MonkeyPatch) -> None:
        """The interpreter keeps bfloat16 as integers, and its dot takes them for such."""
        dot = InterpreterBuilder.create_dot

        def widened(self: InterpreterBuilder, a, b, *rest):  # type: ignore[no-untyped-def]
            if a.dtype.is_bf16():
                a, b = (
                    TensorHandle((operand.data.astype(numpy.uint32) << 16).view(numpy.float32), float32)
                    for operand in (a, b)
                )
            return dot(self, a, b, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)

    def expect_right(layer: Layer, config: LayerConfig) -> None:
        arguments = layer.arguments()
        actual = decoder_layer.decoder_layer(*arguments, config=config)
        expect_layer(layer, actual, *arguments[14:16], TOLERANCE[actual.dtype])

    @pytest.mark.parametrize(
        ("dtype", "head_norms"), [(torch.float16, True), (torch.bfloat16, False)], ids=["float16", "bfloat16"]
    )
    @pytest.mark.parametrize(
        ("shape", "contexts", "query_len", "padding", "config"),
        [
            (SMALL, [1], 1, 0, SUMS),
            (SMALL, [37], 1, 1, SUMS),
            (SMALL, [16, 17, 64], 1, 0, SUMS),
            (SMALL, [33], 4, 0, SUMS),
            (WIDE, [70, 33], 1, 2, SUMS),
            (ODD, [5, 90], 1, 0, SUMS),
            (SMALL, [7], 1, 0, DOTS),
            (SMALL, [16, 17, 64, 5, 1], 1, 1, DOTS),
            (WIDE, [31, 32, 33, 97, 64, 3, 128], 1, 1, DOTS),
            (SMALL, [20, 4, 65, 19], 4, 1, DOTS),  # 20 rows
            (ODD, [*range(1, 18)], 1, 0, APART),  # 17 rows
            (SMALL, [9, 70], 1, 1, SUMS._replace(output=None)),
            (SMALL, [16, 17, 64], 1, 1, TORCH),
            (WIDE, [40, 4], 4, 0, TORCH),
            (SMALL, [16, 17, 64], 1, 1, MIXED),
        ],
    )
    def test_layer(
        shape: Shape,
        contexts: list[int],
        query_len: int,
        padding: int,
        config: LayerConfig,
        dtype: torch.dtype,
        head_norms: bool,
    ) -> None:
        expect_right(
            make_layer(
                shape,
                contexts,
                query_len,
                padding=padding,
                dtype=dtype,
                head_norms=head_norms,
                qkv_bias=not head_norms,
                output_bias=len(contexts) == 3,
            ),
            config,
        )

    def test_a_layer_without_biases() -> None:
        expect_right(make_layer(SMALL, [9, 30], qkv_bias=False), SUMS)
        expect_right(make_layer(SMALL, [9, 30], qkv_bias=False), DOTS)

    def test_the_table_knows_a_configuration_for_every_step() -> None:
        expect_right(make_layer(SMALL, [9, 30]), None)

    def test_float16_keeps_rows_that_are_large_before_they_are_normed() -> None:
        layer = make_layer(SMALL, [9, 30])
        layer.before[0].mul_(1000)
        layer.before[1].mul_(20)  # the product of the two is no float16
        for config in (SUMS, DOTS):
            query = rotate_product.rotate_product(
                layer.before[0],
                layer.before[2],
                layer.before[3],
                Norm(layer.before[1], 1e-6),
                rotate_product.Slots(*(pages.clone() for pages in layer.pages), layer.after[0], *layer.before[12:14]),
                SMALL.heads,
                config.qkv,
            )
            assert query.isfinite().all()

    @pytest.mark.parametrize("config", [SUMS, DOTS])
    def test_pages_hold_the_very_bits_where_sums_are_exact(config: LayerConfig) -> None:
        """Rows of ones and minus ones are their own norm, small integers sum without rounding, right angles turn so."""
        layer = make_layer(SMALL, [9, 30], dtype=torch.bfloat16)
        layer.before[0].copy_(torch.where(torch.rand_like(layer.before[0].float()) < 0.5, -1.0, 1.0))
        layer.before[1].fill_(1.0)
        layer.before[2].copy_(torch.randint(-1, 2, layer.before[2].shape))
        layer.before[3].copy_(torch.randint(-5, 6, layer.before[3].shape))
        layer = layer._replace(before=(*layer.before[:11], 0.0, *layer.before[12:]))  # no eps
        layer.before[12].copy_(torch.tensor([[0.0], [-1.0]]))
        layer.before[13].copy_(torch.tensor([[1.0], [0.0]]))
        arguments = layer.arguments()
        decoder_layer.decoder_layer(*arguments, config=config)
        expected = layer.arguments()
        reference.decoder_layer(*expected)
        for index in (14, 15):
            assert torch.equal(arguments[index].nan_to_num(777.0), expected[index].nan_to_num(777.0))

    def test_splits_are_summed_in_one_order_whoever_is_last() -> None:
        layer = make_layer(SMALL, [9, 30])
        x, weight = layer.before[0], layer.before[9]
        config = FewRowsConfig(16, 32, 3, 4, 3)
        results = [add_product.add_product(x, weight, None, None, None, config) for _ in range(2)]
        assert torch.equal(*results)
        expected = x.double() @ weight.double().T
        torch.testing.assert_close(results[0].double(), expected, atol=2e-2, rtol=1e-2)
