"""GGUF tensors that stay quantised, against the gguf package's and transformers' numbers."""

import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from dispec import ops
from dispec.engine.api.llm import LLM
from dispec.engine.loading import gguf_blocks
from dispec.engine.loading.checkpoint import CheckpointError, find_checkpoint
from dispec.engine.loading.gguf_blocks import read_codes
from dispec.engine.loading.gguf_file import GgufFile
from dispec.engine.sampling_params import SamplingParams
from dispec.layers.config import ModelConfig, Shard
from dispec.layers.types import Weights, unstack_layers
from dispec.layers.weights import load_weights
from tests.checkpoints import random_blocks, save_tiny_gguf, tiny_model
from tests.paged_model import PagedModel

Type = gguf.GGMLQuantizationType
CPU = torch.device("cpu")
FORMATS = {
    Type.Q8_0: ("int8", 32),
    Type.Q4_0: ("int4", 32),
    Type.Q4_1: ("int4", 32),
    Type.Q5_0: ("int8", 32),
    Type.Q5_1: ("int8", 32),
    Type.Q4_K: ("int4", 32),
    Type.Q5_K: ("int8", 32),
    Type.Q6_K: ("int8", 16),
}
# A row is one K-quant block, and a rank's half of it whole groups. transformers takes head_dim for granted.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


@pytest.mark.smoke
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("rows", "blocks_in_row"), [(1, 1), (7, 3)])
def test_numbers_are_those_of_the_gguf_package(kind, rows, blocks_in_row, monkeypatch):
    block_size, _ = gguf.GGML_QUANT_SIZES[kind]
    shape = (rows, blocks_in_row * block_size)
    monkeypatch.setattr(gguf_blocks, "_MAX_DECODED", 2 * shape[1])  # two rows at a time
    data = random_blocks(shape, kind)
    read = read_codes(data, kind)
    assert (read.kind, read.group_size, read.shape) == (*FORMATS[kind], shape)
    assert read.codes.dtype == torch.int8
    if read.kind == "int4":
        assert (read.codes.min().item(), read.codes.max().item()) == (-8, 7)
    expected = torch.from_numpy(gguf.dequantize(data, kind).copy())
    if read.offsets is None:
        assert torch.equal(read.dequantize(), expected)
    else:
        # An offset, the product and their sum are each rounded once to float32.
        terms = (16 * read.scales.abs() + read.offsets.abs()).repeat_interleave(read.group_size, 1)
        assert ((read.dequantize() - expected).abs() <= 2**-23 * terms).all()


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_1, Type.Q6_K], ids=lambda kind: kind.name)
def test_tensors_of_a_llama_are_those_of_transformers(kind, tmp_path):
    path = tmp_path / "tiny.gguf"
    save_tiny_gguf(path, tiny_model("llama", **SIZES, num_hidden_layers=1), kind)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    expected = dict(model.state_dict())
    tensors = dict(find_checkpoint(path).tensors(quantization=None))
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert isinstance(tensor, ops.QuantizedTensor) == (tensor.shape[1:] != ()), name
        if isinstance(tensor, ops.QuantizedTensor):
            torch.testing.assert_close(tensor.dequantize(), expected[name], rtol=0, atol=2e-6, msg=name)


def mixed(name: str) -> Type:
    """As Q4_K_M files mix types within fused matrices, and of one matrix from layer to layer."""
    if "token_embd" in name:
        return Type.Q8_0
    if "attn_v" in name:
        return Type.Q4_K if ".1." in name else Type.Q6_K
    if "ffn_down" in name:
        return Type.Q5_K if ".1." in name else Type.Q4_1
    if "attn_output" in name:
        return Type.F16 if ".1." in name else Type.Q5_1
    return Type.Q4_0 if "ffn_up" in name else Type.Q4_K


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "tiny.gguf"
    save_tiny_gguf(path, tiny_model("llama", **SIZES, tie_word_embeddings=True), mixed)
    return path


def load(path: Path, quantization: str, dtype: torch.dtype, shard: Shard | None = None) -> tuple[ModelConfig, Weights]:
    found = find_checkpoint(path)
    tensors = found.tensors(torch.float32, quantization)
    return found.config, load_weights(found.config, tensors, dtype, CPU, shard=shard)


def logits(config: ModelConfig, weights: Weights) -> torch.Tensor:
    prompt = list(range(7, 47))
    return PagedModel(weights, config, [prompt]).compute({0: len(prompt)})[0].float()


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q8_0, "mixed"])
def test_logits_are_those_of_dequantised_weights(kind, mixed_file, tmp_path):
    path = mixed_file
    if kind != "mixed":
        path = tmp_path / "tiny.gguf"
        save_tiny_gguf(path, tiny_model("llama", **SIZES), kind)
    exact = logits(*load(path, "off", torch.float32))
    rounded = (logits(*load(path, "off", torch.bfloat16)) - exact).norm()
    config, weights = load(path, "native", torch.bfloat16)
    assert (logits(config, weights) - exact).norm() <= 1.25 * rounded
    assert isinstance(weights.lm_head, ops.QuantizedWeight)
    if kind == "mixed":
        assert weights.embedding is weights.lm_head
        formats = [layer.attention.output.__class__ for layer in unstack_layers(weights.layers)]
        assert formats.count(ops.QuantizedWeight) == 2
        assert [layer.mlp.down.kind for layer in unstack_layers(weights.layers)] == ["int4", "int8", "int4"]
        assert [layer.attention.qkv.group_size for layer in unstack_layers(weights.layers)] == [16, 32, 16]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_have_the_rows_and_columns_of_the_whole(mixed_file, size):
    for rank in range(size):
        shard = Shard(rank, size, "g")
        _, plain = load(mixed_file, "off", torch.float32, shard)
        _, packed = load(mixed_file, "native", torch.bfloat16, shard)
        for one, other in zip(unstack_layers(plain.layers), unstack_layers(packed.layers), strict=True):
            for expected, matrix in (
                (one.attention.qkv, other.attention.qkv),
                (one.attention.output, other.attention.output),
                (one.mlp.gate_up, other.mlp.gate_up),
                (one.mlp.down, other.mlp.down),
            ):
                read = ops.linear(torch.eye(expected.shape[1], dtype=torch.bfloat16), matrix).T.float()
                torch.testing.assert_close(read, expected, rtol=2**-7, atol=2**-9)


def test_types_without_codes_are_dequantised_and_named(tmp_path, caplog):
    path = tmp_path / "tiny.gguf"
    save_tiny_gguf(path, tiny_model("llama", **SIZES), lambda name: Type.Q2_K if "ffn" in name else Type.Q8_0)
    with caplog.at_level("INFO", "dispec"):
        tensors = dict(find_checkpoint(path).tensors(torch.bfloat16, None))
    assert [record.getMessage() for record in caplog.records] == [
        "Q2_K weights are dequantised: there is no kernel for them"
    ]
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert isinstance(tensors["model.layers.0.self_attn.q_proj.weight"], ops.QuantizedTensor)


MIXED = "GGUF Q4_K, Q4_0, Q4_1, Q8_0, Q5_1, Q5_K and Q6_K"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, MIXED),
        ({"quantization": "off"}, "bfloat16, dequantised from " + MIXED),
        ({"quantization": "int4", "quantization_group_size": 64}, "int4 in groups of 64, rounded from " + MIXED),
        ({"quantization": "int8"}, "int8, rounded from " + MIXED),
        ({"dtype": "float32"}, "float32, dequantised from " + MIXED),
    ],
)
def test_the_start_log_tells_the_format(options, told, mixed_file, caplog):
    with caplog.at_level("INFO", "dispec"):
        llm = LLM(mixed_file, device="cpu", enforce_eager=True, kv_cache_memory="4MiB", **options)
    assert re.search(r"weights +[\d.]+ [KM]iB  " + told + "\n", caplog.text)
    dequantised = {message.split()[0] for message in caplog.messages if "are dequantised: there is no" in message}
    assert dequantised == ({"int4", "int8"} if "dtype" in options else set())
    completion = llm.generate("The sea", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert len(completion[0].outputs[0].token_ids) == 4


@pytest.mark.parametrize(("quantization", "stays"), [(None, False), ("native", True), ("off", False), ("int8", False)])
def test_the_built_in_model_stays_quantised_on_request(quantization, stays):
    checkpoint = find_checkpoint("smollm2")
    assert checkpoint.quantized_format == "GGUF Q4_1 and Q8_0"
    name, tensor = next(iter(checkpoint.tensors(torch.bfloat16, quantization)))
    assert isinstance(tensor, ops.QuantizedTensor) == stays, name


_MEASURE_GROWTH = """
import psutil, torch
from dispec.engine.execution.kv_cache_memory import return_freed_memory
from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.layers.weights import load_weights
checkpoint = find_checkpoint("smollm2")
return_freed_memory()
before = psutil.Process().memory_info().rss
weights = load_weights(
    checkpoint.config, checkpoint.tensors(torch.bfloat16, "native"), torch.bfloat16, torch.device("cpu")
)
return_freed_memory()
print(psutil.Process().memory_info().rss - before)
"""


def test_the_built_in_model_is_resident_in_130_mb():
    """A process grows by 106 MB, 8 of them code that runs for the first time."""
    done = subprocess.run([sys.executable, "-c", _MEASURE_GROWTH], capture_output=True, text=True, check=True)
    assert 90e6 < int(done.stdout) <= 130e6


def test_a_file_is_not_resident_beside_its_tensors(tmp_path):
    path = tmp_path / "tiny.gguf"
    save_tiny_gguf(path, tiny_model("llama", **SIZES | {"intermediate_size": 4096}), Type.Q8_0)
    file = GgufFile(path)
    size = sum(tensor.numel() for _, tensor in file.tensors(keeps_quantized=True))
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("only Linux tells how much of a file is resident")
    (mapping,) = re.findall(rf"{re.escape(str(path))}\n.*?\nRss: +(\d+) kB", smaps.read_text(), re.DOTALL)
    assert 1024 * int(mapping) < size / 4


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0, Type.Q4_K], ids=lambda kind: kind.name)
def test_truncated_files_name_the_tensor(kind, tmp_path):
    path = tmp_path / "tiny.gguf"
    save_tiny_gguf(path, tiny_model("llama", **SIZES), kind)
    tensors = gguf.GGUFReader(path).tensors
    contents = path.read_bytes()
    for tensor in (tensors[5], tensors[-1]):
        end = int(tensor.data_offset) + int(tensor.n_bytes)
        path.write_bytes(contents[: end - 1])
        with pytest.raises(CheckpointError) as caught:
            find_checkpoint(path)
        assert str(caught.value) == (
            f"{path} is not a whole GGUF file (tensor {tensor.name} ends at byte {end}, the file has {end - 1}):"
            " download it again"
        )


def test_contradictory_tensors_are_named(tmp_path):
    path = tmp_path / "tiny.gguf"
    save_tiny_gguf(path, tiny_model("llama", **SIZES), extra_tensors={"odd": np.ones((3, 36), np.float32)})
    contents = path.read_bytes()
    at = contents.index(b"odd\x02\x00\x00\x00") + 3 + 4 + 16  # after the name, the dimensions' number and sizes
    assert contents[at : at + 4] == bytes(4)
    for number, told in ((8, "tensor odd has rows of 36 numbers, Q8_0 has blocks of 32"), (99, "unknown type 99")):
        path.write_bytes(contents[:at] + number.to_bytes(4, "little") + contents[at + 4 :])
        with pytest.raises(CheckpointError, match=told):
            find_checkpoint(path)
