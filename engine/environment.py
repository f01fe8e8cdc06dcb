"""Probes of this machine: each does a small piece of the engine's work and reports whether it works."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch._dynamo.utils import counters

from dispec.engine.engine import Engine
from dispec.engine.execution.compiled_steps import begin_replay, compile_function
from dispec.engine.execution.execution_plan import ExecutionPlan, plan_for
from dispec.engine.options import DTYPE_NAMES, EngineOptions
from dispec.engine.sampling_params import SamplingParams
from dispec.layers.config import ModelConfig
from dispec.ops.cpu.instruction_sets import instruction_set
from dispec.ops.cpu.library import build, is_enabled
from dispec.ops.cuda import library as cuda_library
from dispec.ops.cuda import prefill_attention
from dispec.ops.linear import PackedWeight, linear, pack

# bf16 keeps 8 bits: a product of rounded inputs, summed in float32, ends within one rounding of the exact one.
_BF16_TOLERANCE = 2**-7

_TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128,
    hidden_size=128,
    intermediate_size=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)


class Outcome(NamedTuple):
    """The outcome of a probe. reason: of a failure; empty otherwise."""

    works: bool
    reason: str
    seconds: float


class Device(NamedTuple):
    """A CUDA device that torch sees."""

    name: str
    title: str
    capability: str
    total_bytes: int
    free_bytes: int


def versions() -> dict[str, str | None]:
    """Return the version of torch, and of the CUDA that it was built for, if any."""
    return {"torch": torch.__version__, "cuda": torch.version.cuda}


def threads() -> int:
    """Return the number of CPU threads that an engine takes by default."""
    return EngineOptions(model=_TINY, load_format="dummy").num_threads()


def cuda_devices() -> list[Device]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append(Device(f"cuda:{index}", properties.name, capability, total, free))
    return found


def plans(device: str, *, compiles: bool) -> dict[str, ExecutionPlan]:
    """Return how steps run on a device by default, by the names of the dtypes that it runs.

    compiles: whether the compiler works there.
    """
    found: dict[str, ExecutionPlan] = {}
    for dtype in DTYPE_NAMES:
        options = EngineOptions(
            model=_TINY, load_format="dummy", device=device, dtype=dtype, compile=None if compiles else "off"
        )
        try:
            found[dtype] = plan_for(options, options.torch_device(), _TINY.head_dim)
        except ValueError:  # the device does not run the dtype
            continue
    return found


def try_engine(device: str) -> Outcome:
    """Generate a few tokens with a tiny random model, eagerly. On CUDA this runs the Triton kernels."""

    def run() -> None:
        options = EngineOptions(
            model=_TINY,
            load_format="dummy",
            device=device,
            kv_cache_memory="8MiB",
            max_num_seqs=1,
            max_num_batched_tokens=64,
            enforce_eager=True,
        )
        engine = Engine(options)
        sequence = engine.add(list(range(40)), SamplingParams(temperature=0, max_tokens=4))
        while engine.has_work:
            engine.step()
        _require(sequence.num_output_tokens == 4, f"{sequence.num_output_tokens} tokens came instead of 4")

    return _attempt(run)


def try_compiler(device: str) -> Outcome:
    """Compile a small function in an empty cache, with a C++ compiler on CPU and Triton on CUDA."""

    def run() -> None:
        x = torch.linspace(-2, 2, 64, device=device)
        function = compile_function(_small_function, replays=False)
        _require_same(function(x), _small_function(x), "the compiled function gives wrong numbers")

    with _empty_compile_cache():
        return _attempt(run)


def try_bf16(device: str) -> Outcome:
    """Multiply in bf16, and compare with float32."""

    def run() -> None:
        a, b = (_random(128, 128, seed).to(device, torch.bfloat16) for seed in (0, 1))
        _require_close(a @ b, a.float() @ b.float())

    return _attempt(run)


def cpu_instruction_set() -> str:
    """Return the name of the instruction set of our C++ kernels. Raises ValueError for a wrong `DISPEC_CPU_ISA`."""
    return instruction_set().name


def try_cpu_kernels() -> Outcome:
    """Build our C++ kernels, or find them built; in a temporary directory if the cache cannot be written.

    Raises ValueError for a wrong `DISPEC_CPU_KERNELS`.
    """
    if not is_enabled():
        return Outcome(False, "DISPEC_CPU_KERNELS is off", 0.0)

    def run() -> None:
        try:
            build()
        except OSError:
            with tempfile.TemporaryDirectory(prefix="dispec-env-check-") as directory:
                build(Path(directory))

    return _attempt(run)


def uses_cuda_kernels() -> bool:
    """Return whether `DISPEC_CUDA_KERNELS` is `on`. Raises ValueError if it is neither `on` nor `off`."""
    return cuda_library.is_enabled()


def try_cuda_kernels() -> Outcome:
    """Build a CUDA C++ kernel for Hopper GPUs, or find it built. Without it, Triton's run instead.

    Raises ValueError for a wrong `DISPEC_CUDA_KERNELS`.
    """
    if not uses_cuda_kernels():
        return Outcome(False, "DISPEC_CUDA_KERNELS is off", 0.0)

    def run() -> None:
        _require(cuda_library.has_nvrtc(), "cuda.bindings, or its NVRTC, is not found")
        constants = prefill_attention.constants(head_dim=128, group=1, block_size=32, dtype=torch.bfloat16)
        cuda_library.cubin("prefill_attention.cu", constants, cuda_library.HOPPER)

    return _attempt(run)


def try_packed_bf16() -> Outcome:
    """Multiply with a weight in the CPU's packed layout, which makes small batches fast."""

    def run() -> None:
        x, weight = (_random(rows, 128, rows).to(torch.bfloat16) for rows in (4, 64))
        packed = pack(weight)
        _require(
            isinstance(packed, PackedWeight), "neither we nor oneDNN pack bf16 for this CPU; plain matrices are used"
        )
        _require_close(linear(x, packed), x.float() @ weight.float().T)

    return _attempt(run)


def try_replay(device: str) -> Outcome:
    """Compile a small function as steps are compiled on CUDA, and replay its CUDA graph on other inputs."""

    def run() -> None:
        function = compile_function(_small_function, replays=True)
        skipped = counters["inductor"]["cudagraph_skips"]
        # The first call warms the memory pool up, the second records the graph, the third replays it.
        for scale in (1, 2, 3):
            x = scale * torch.linspace(-1, 1, 64, device=device)
            begin_replay()
            _require_same(function(x), _small_function(x), "the replayed graph gives wrong numbers")
        _require(
            counters["inductor"]["cudagraph_skips"] == skipped, "the compiler records no CUDA graph of its function"
        )

    with _empty_compile_cache():
        return _attempt(run)


def _small_function(x: torch.Tensor) -> torch.Tensor:
    return (torch.sin(x) * x).exp() + x.sum()


def _random(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@contextmanager
def _empty_compile_cache() -> Iterator[None]:
    """Give the compiler an empty cache, and remove it afterwards."""
    with tempfile.TemporaryDirectory(prefix="dispec-env-check-", ignore_cleanup_errors=True) as directory:
        changed = {"TORCHINDUCTOR_CACHE_DIR": directory, "TRITON_CACHE_DIR": directory}
        before = {name: os.environ.get(name) for name in changed}
        os.environ.update(changed)
        try:
            yield
        finally:
            torch.compiler.reset()
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)


def _require_same(found: torch.Tensor, expected: torch.Tensor, otherwise: str) -> None:
    _require(torch.allclose(found, expected, rtol=1e-4, atol=1e-5), otherwise)


def _require_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.float() - expected).abs().max() / expected.abs().max()
    _require(error.item() < _BF16_TOLERANCE, f"bf16 products are off by {error.item():.1%}")


def _attempt(run: Callable[[], object]) -> Outcome:
    start = time.perf_counter()
    try:
        with torch.inference_mode():
            run()
    except Exception as error:  # a machine can fail in any way
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Outcome(False, first, time.perf_counter() - start)
    return Outcome(True, "", time.perf_counter() - start)
