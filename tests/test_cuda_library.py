"""CUDA kernels as they are built and kept; most of it without a GPU."""

from pathlib import Path

import pytest
import torch

from dispec.ops.cuda import library
from dispec.ops.cuda.library import cubin, is_available, is_enabled, kernel, tensor_map
from tests.cuda_cubins import needs_hopper, needs_nvrtc, usage

ADD = """
extern "C" __global__ void add(float *sums, const float *terms, float factor, long long count) {
    extern __shared__ float shared[];
    const int i = threadIdx.x;
    shared[i] = i < count ? terms[i] * factor + VALUE : 0;
    __syncthreads();
    if (i < count) sums[i] = shared[count - 1 - i];
}
"""
COPY = """
struct __align__(64) TensorMap { char bytes[128]; };
extern "C" __global__ void copy(float *result, const __grid_constant__ TensorMap map, long long row) {
    __shared__ __align__(128) float box[4][8];
    __shared__ __align__(8) unsigned long long barrier;
    const unsigned bar = __cvta_generic_to_shared(&barrier), to = __cvta_generic_to_shared(box);
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(bar));
        asm volatile("fence.proxy.async.shared::cta;");
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], 128;" ::"r"(bar));
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
            ::"r"(to), "l"(&map), "r"(0), "r"((int)row), "r"(bar) : "memory");
    }
    __syncthreads();
    unsigned done = 0;
    for (int i = 0; i < 100000 && !done; ++i)
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done) : "r"(bar) : "memory");
    result[threadIdx.x] = box[threadIdx.x / 8][threadIdx.x % 8];
}
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources, and a cache directory of its own."""
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    (tmp_path / "add.cu").write_text(ADD)
    (tmp_path / "copy.cu").write_text(COPY)
    return tmp_path


@needs_nvrtc
def test_a_cubin_is_kept_and_follows_its_source(sources: Path) -> None:
    first = cubin("add.cu", {"VALUE": 1}, "sm_90a")
    assert usage(first, "add").local_bytes == 0
    (kept,) = (sources / "cache" / "cuda-kernels").iterdir()
    kept.write_bytes(b"kept")
    assert cubin("add.cu", {"VALUE": 1}, "sm_90a") == b"kept"
    assert cubin("add.cu", {"VALUE": 2}, "sm_90a") != first
    (sources / "add.cu").write_text(ADD.replace("0;", "1;"))
    assert cubin("add.cu", {"VALUE": 1}, "sm_90a") not in (first, b"kept")
    (sources / "other.cuh").write_text("#define FOUR 4\n")
    (sources / "add.cu").write_text('#include "other.cuh"\n' + ADD.replace("0;", "FOUR;"))
    assert cubin("add.cu", {"VALUE": 1}, "sm_90a")


@needs_nvrtc
def test_a_wrong_source_is_refused_with_the_compilers_reason(sources: Path) -> None:
    with pytest.raises(RuntimeError, match=r'add\.cu.*error.*"VALUE" is undefined'):
        cubin("add.cu", {}, "sm_90a")


def test_a_cpu_has_no_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_available(torch.device("cpu"))
    assert kernel("add.cu", "add", {}, torch.device("cpu")) is None
    monkeypatch.setenv("DISPEC_CUDA_KERNELS", "of")
    with pytest.raises(ValueError, match="DISPEC_CUDA_KERNELS is 'of'"):
        is_enabled()


@pytest.mark.gpu
@needs_hopper
def test_a_kernel_runs_alone_and_in_a_graph(sources: Path) -> None:
    device = torch.device("cuda")
    add = kernel("add.cu", "add", {"VALUE": 3}, device)
    terms, sums = torch.arange(100.0, device=device), torch.zeros(100, device=device)
    add.launch((1, 1, 1), (128, 1, 1), 200 * 1024, sums, terms, 2.0, 100)
    assert torch.equal(sums, terms.flip(0) * 2 + 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add.launch((1, 1, 1), (128, 1, 1), 512, sums, terms, 1.0, 50)
    terms.add_(5)
    graph.replay()
    assert torch.equal(sums[:50], terms[:50].flip(0) + 3)

    copy = kernel("copy.cu", "copy", {}, device)
    table, result = torch.randn(16, 12, device=device), torch.zeros(32, device=device)
    boxes = tensor_map(table.data_ptr(), torch.float32, (12, 16), (48,), (8, 4), 0)
    copy.launch((1, 1, 1), (32, 1, 1), 0, result, boxes, 7)
    assert torch.equal(result.view(4, 8), table[7:11, :8])


@pytest.mark.gpu
@needs_hopper
def test_a_failed_build_is_one_warning(sources: Path) -> None:
    device = torch.device("cuda")
    with pytest.warns(
        RuntimeWarning, match="the CUDA kernel add could not be built, running slower without it: .*VALUE"
    ):
        assert kernel("add.cu", "add", {}, device) is None
