"""Checkpoints quantised by other packages: each format gives the numbers of its specification."""

import copy
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dispec import LLM, SamplingParams, ops
from dispec.engine.errors import CheckpointError
from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.engine.loading.model_source import check_model
from dispec.engine.loading.quantization import with_kernels
from dispec.layers.config import Shard, UnsupportedModelError
from dispec.layers.types import Weights, unstack_layers
from dispec.layers.weights import WeightsError, load_weights
from dispec.ops import QuantizedTensor
from dispec.serving.settings import ServerSettings
from dispec.serving.start_check import check_start
from tests.allocations import peak_allocation
from tests.checkpoints import save_tiny
from tests.paged_model import PagedModel
from tests.quantized_checkpoints import (
    FORMATS,
    change_config,
    change_tensors,
    compressed_config,
    gptq,
    gptq_config,
    save_quantized,
    transformers_logits,
    write_index,
)

CPU = torch.device("cpu")
PROMPT = list(range(7, 47))
SYMMETRIC = ("gptq", "gptq-64", "gptq-8", "packed-4", "packed-4-act-order", "packed-8", "int", "int-tensor")
Q_PROJ = "model.layers.1.self_attn.q_proj"


def load(directory: Path, dtype: torch.dtype, quantization: str | None = "native") -> Weights:
    found = find_checkpoint(directory)
    tensors = with_kernels(found.tensors(dtype, quantization), dtype, CPU)
    return load_weights(found.config, tensors, dtype, CPU)


def logits_of(directory: Path, weights: Weights) -> Tensor:
    (logits,) = PagedModel(weights, find_checkpoint(directory).config, [PROMPT]).compute({0: len(PROMPT)})
    return logits


@pytest.mark.smoke
@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_numbers_of_its_specification(name, tmp_path):
    family = "llama" if name in ("gptq-8", "awq", "packed-4-asym") else "qwen2"
    model, matrices = save_quantized(tmp_path, name, family)
    check_model(tmp_path)
    kept = dict(find_checkpoint(tmp_path).tensors(torch.float32, "native"))
    plain = dict(find_checkpoint(tmp_path).tensors(torch.float32))
    assert set(kept) == set(plain) == set(model.state_dict())
    kind = "fp8" if name.startswith("f") else "int8" if "8" in name.split("-") or name.startswith("int") else "int4"
    for key, matrix in matrices.items():
        assert torch.equal(plain[key], matrix.float()), key
        tensor = kept[key]
        if name == "fp8-blocks":
            assert torch.equal(tensor, matrix.float())
            continue
        assert isinstance(tensor, QuantizedTensor)
        assert tensor.kind == kind
        assert (tensor.column_order is not None) == ("act-order" in name and tensor.scales.shape[1] > 1)
        assert (tensor.offsets is None) == (kind == "fp8" or name in SYMMETRIC)
        assert torch.equal(tensor.dequantize(), matrix.float()), key
    expected = transformers_logits(model, PROMPT)
    assert (logits_of(tmp_path, load(tmp_path, torch.float32)) - expected).abs().max() <= 1e-4


def is_quantized(weights: Weights) -> bool:
    matrices = (*weights.layers.attention[:1], weights.layers.attention.output, *weights.layers.mlp)
    return all(isinstance(matrix, ops.QuantizedWeight) for matrix in matrices)


@pytest.mark.parametrize("name", ["gptq", "gptq-act-order", "gptq-8-act-order", "awq", "packed-4-asym", "int-asym"])
def test_matrices_stay_quantised_in_bfloat16(name, tmp_path):
    model, _ = save_quantized(tmp_path, name)
    weights = load(tmp_path, torch.bfloat16)
    assert is_quantized(weights)
    plain = load(tmp_path, torch.bfloat16, "off")
    assert not is_quantized(plain)
    expected = transformers_logits(model, PROMPT)
    error = (logits_of(tmp_path, weights) - expected).norm() / expected.norm()
    of_plain = (logits_of(tmp_path, plain) - expected).norm() / expected.norm()
    assert error <= 1.5 * of_plain <= 0.1


def test_projections_with_orders_of_their_own_are_dequantised(tmp_path, caplog):
    caplog.set_level(logging.INFO, "dispec")
    model, _ = save_quantized(tmp_path, (gptq(desc_act=True, order_seed=None), gptq_config(desc_act=True)))
    weights = load(tmp_path, torch.bfloat16)
    assert isinstance(weights.layers.attention.qkv, ops.QuantizedWeight) is False
    assert all(
        isinstance(one, ops.QuantizedWeight) for one in (weights.layers.attention.output, weights.layers.mlp.down)
    )
    assert [line for line in caplog.messages if "6 matrices are dequantised" in line] == caplog.messages
    expected = transformers_logits(model, PROMPT)
    assert (logits_of(tmp_path, weights) - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("name", ["gptq-act-order", "packed-4-asym"])
def test_parts_may_be_in_different_files_in_any_order(name, tmp_path):
    _, matrices = save_quantized(tmp_path, name, "llama", max_shard_size="200KB")
    tensors: dict[str, Tensor] = {}
    for file in sorted(tmp_path.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    names = sorted(tensors, key=lambda name: name[::-1])
    for number in range(4):
        shard = {name: tensors[name] for name in names[number::4]}
        save_file(shard, tmp_path / f"model-{number}.safetensors", {"format": "pt"})
    write_index(tmp_path)
    found = dict(find_checkpoint(tmp_path).tensors())
    assert all(torch.equal(found[key], matrix.float()) for key, matrix in matrices.items())


def test_the_head_may_be_quantised(tmp_path, caplog):
    model, matrices = save_quantized(tmp_path, "gptq", quantizes_head=True)
    tensors = dict(find_checkpoint(tmp_path).tensors(quantization="native"))
    assert isinstance(tensors["lm_head.weight"], QuantizedTensor)
    assert torch.equal(tensors["lm_head.weight"].dequantize(), matrices["lm_head.weight"].float())
    assert not caplog.messages
    change_config(tmp_path, tie_word_embeddings=True)
    assert not find_checkpoint(tmp_path).config.tie_embeddings
    assert "lm_head.weight differs" in caplog.text
    expected = transformers_logits(model, PROMPT)
    assert (logits_of(tmp_path, load(tmp_path, torch.float32)) - expected).abs().max() <= 1e-4


def test_tied_embeddings_beside_quantised_layers(tmp_path):
    model, _ = save_quantized(tmp_path, "awq", "qwen3")
    weights = load(tmp_path, torch.float32)
    assert (logits_of(tmp_path, weights) - transformers_logits(model, PROMPT)).abs().max() <= 1e-4


def test_biases_of_zero_are_dropped_where_the_model_has_none(tmp_path):
    save_quantized(tmp_path, "gptq")
    change_tensors(tmp_path, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(96)}))
    load(tmp_path, torch.float32)
    change_tensors(tmp_path, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": torch.ones(96)}))
    with pytest.raises(WeightsError, match=r"'model.layers.0.mlp.up_proj.bias' .* has no place"):
        load(tmp_path, torch.float32)


def test_one_matrix_is_held_beside_the_weights(tmp_path):
    save_quantized(tmp_path, "gptq-act-order")

    def make() -> Weights:
        return load(tmp_path, torch.bfloat16)

    leaves = torch.utils._pytree.tree_leaves(make())
    weights = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
    largest = 128 * (896 + 2 * 128)  # the codes of query, key and value in one layer
    mapped = (tmp_path / "model.safetensors").stat().st_size  # counted as if it were allocated
    assert peak_allocation(make) <= mapped + weights + 3 * largest  # unpacked, sorted and concatenated


def shards(directory: Path, size: int) -> list[Weights]:
    found = find_checkpoint(directory)
    return [
        load_weights(
            found.config,
            found.tensors(torch.bfloat16, "native"),
            torch.bfloat16,
            CPU,
            shard=Shard(rank, size, "g"),
        )
        for rank in range(size)
    ]


def identity(weight: ops.Matrix, columns: int) -> Tensor:
    return ops.linear(torch.eye(columns, dtype=torch.bfloat16), weight).T


@pytest.mark.parametrize("name", ["gptq-128-asym", "packed-4", "int"])
def test_groups_are_split_between_two_ranks(name, tmp_path):
    """The inputs of `o_proj` and `down_proj` are split, 448 and 192 columns a rank: halves of groups of 128."""
    _, matrices = save_quantized(tmp_path, name, intermediate_size=384)
    for rank, weights in enumerate(shards(tmp_path, 2)):
        for module, columns in (("self_attn.o_proj", 448), ("mlp.down_proj", 192)):
            layer = unstack_layers(weights.layers)[2]
            matrix = layer.attention.output if columns == 448 else layer.mlp.down
            assert isinstance(matrix, ops.QuantizedWeight)
            expected = matrices[f"model.layers.2.{module}.weight"][:, rank * columns : (rank + 1) * columns]
            found = identity(matrix, columns)
            assert (found.double() - expected).abs().max() <= 2**-8 * expected.abs().max()


def test_an_order_of_columns_cannot_be_split(tmp_path):
    save_quantized(tmp_path, "gptq-act-order")
    with pytest.raises(WeightsError, match=r"_proj.weight' cannot be split over ranks: columns in act-order"):
        shards(tmp_path, 2)


def test_an_engine_runs_it_and_says_how_it_is_quantised(tmp_path, caplog):
    caplog.set_level(logging.INFO, "dispec")
    model, _ = save_quantized(tmp_path, "gptq-act-order")
    options = {"kv_cache_memory": "8MB", "max_model_len": 64, "device": "cpu", "compile": "off"}
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    for dtype, quantization, note in (
        ("bfloat16", None, "  gptq, 4 bits, groups of 32"),
        ("float32", "off", "  float32, dequantised from gptq, 4 bits, groups of 32"),
    ):
        caplog.clear()
        with LLM(str(tmp_path), dtype=dtype, quantization=quantization, **options) as llm:
            (output,) = llm.generate([PROMPT], params)
        assert any("weights" in line and line.endswith(note) for line in caplog.messages)
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert list(output.outputs[0].token_ids) == expected[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(("target", "draft"), [("gptq", None), (None, "awq"), ("packed-4", "gptq-8-act-order")])
def test_quantised_targets_and_drafts_work_together(target, draft, tmp_path):
    for name, format in (("target", target), ("draft", draft)):
        if format is None:
            save_tiny(tmp_path / name, "qwen2", dtype=torch.bfloat16)
        else:
            save_quantized(tmp_path / name, format)
    options = {"kv_cache_memory": "8MB", "max_model_len": 64, "device": "cpu", "compile": "off"}
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    outputs = []
    for draft_options in ({}, {"speculative_model": str(tmp_path / "draft"), "num_speculative_tokens": 2}):
        with LLM(str(tmp_path / "target"), dtype="bfloat16", **options, **draft_options) as llm:
            outputs.append(llm.generate([PROMPT], params)[0].outputs[0].token_ids)
    assert outputs[0] == outputs[1]


def test_notes_are_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO, "dispec")
    notes = {
        "int": "activations keep the model's dtype",
        "float-tensor": "activations are scaled by token, the config has fixed scales",
        "fp8-vector": "activations are scaled by token, the config has fixed scales",
        "fp8-blocks": "a scale for each block are dequantised",
    }
    for name, note in notes.items():
        caplog.clear()
        save_quantized(tmp_path / name, name)
        list(find_checkpoint(tmp_path / name).tensors(torch.bfloat16, "native"))
        assert len(caplog.messages) == 1
        assert note in caplog.messages[0]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method is 'bitsandbytes', supported are gptq,"),
        ({"quant_method": "hqq"}, "quant_method is 'hqq'"),
        ({"quant_method": "modelopt"}, "quant_method is 'modelopt'"),
        ({"bits": 4}, "quant_method is 'missing'"),
        (gptq_config(bits=3), "bits is 3, supported: 4, 8"),
        (gptq_config(group_size=16), "group_size is 16, supported: 32, 64, 128, -1"),
        (gptq_config(dynamic={"-:lm_head": {}}), "dynamic is"),
        (gptq_config(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
            "version is 'gemv', supported: gemm",
        ),
        ({"quant_method": "awq", "bits": 8, "group_size": 128}, "bits is 8, supported: 4"),
        (compressed_config("nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'"),
        (compressed_config("marlin-24"), "format is 'marlin-24'"),
        (compressed_config("float-quantized", strategy="group", group_size=128), "strategy is 'group'"),
        (compressed_config("pack-quantized", num_bits=2), "num_bits is 2"),
        (compressed_config("int-quantized") | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is"),
        (
            compressed_config("int-quantized") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config is",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups is missing"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'"),
    ],
)
def test_what_is_not_supported_is_refused_before_the_weights_are_there(config, told, tmp_path):
    save_quantized(tmp_path, "gptq")
    (tmp_path / "model.safetensors").unlink()
    for field in ("quantization_config", "compression_config"):
        change_config(tmp_path, quantization_config=None, compression_config=None)
        change_config(tmp_path, **{field: config})
        for find in (check_model, find_checkpoint):
            with pytest.raises(UnsupportedModelError) as caught:
                find(tmp_path)
            assert told in str(caught.value)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        ("gptq", "quantization_config is 'gptq', must be an object"),
    ],
)
def test_an_invalid_config_is_told(config, told, tmp_path):
    save_quantized(tmp_path, "gptq")
    change_config(tmp_path, quantization_config=config)
    with pytest.raises(CheckpointError, match=told):
        check_model(tmp_path)


@pytest.mark.parametrize("quantization", ["int4", "int8", "fp8"])
def test_a_quantised_checkpoint_is_not_quantised_again(quantization, tmp_path):
    save_quantized(tmp_path, "gptq")
    told = f"quantization is '{quantization}', must be native or off: the model is quantised already \\(gptq, 4 bits"
    with pytest.raises(ValueError, match=told):
        check_start(ServerSettings(), {"model": str(tmp_path), "quantization": quantization})
    with pytest.raises(ValueError, match=told):
        LLM(str(tmp_path), quantization=quantization, device="cpu")


def remove(part: str):
    return lambda tensors: tensors.pop(f"{Q_PROJ}.{part}")


def replace(part: str, value):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q_PROJ}.{part}"] = value(tensors[f"{Q_PROJ}.{part}"]).contiguous()

    return change


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("gptq", remove("scales"), "q_proj.scales' is missing"),
        ("gptq", remove("qweight"), "q_proj.qweight' is missing"),
        ("awq", remove("qzeros"), "q_proj.qzeros' is missing"),
        ("packed-4", remove("weight_shape"), "q_proj.weight_shape' is missing"),
        ("packed-4-asym", remove("weight_zero_point"), "q_proj.weight_zero_point' is missing"),
        ("float", remove("weight_scale"), "q_proj.weight_scale' is missing"),
        ("gptq", replace("scales", lambda one: one[:2]), "q_proj.scales' has shape [2, 896], gptq with 4 bits, groups"),
        ("gptq", replace("qweight", lambda one: one[0]), "q_proj.qweight' has shape [896], must have two dimensions"),
        ("gptq", replace("qzeros", Tensor.float), "q_proj.qzeros' is of F32, gptq calls for I32"),
        ("gptq", replace("g_idx", lambda one: one[:9]), "q_proj.g_idx' has shape [9]"),
        ("fp8-blocks", replace("weight_scale_inv", lambda one: one[:1]), "q_proj.weight_scale_inv' has shape [1, 4]"),
        ("float", replace("weight", lambda one: one.to(torch.float8_e5m2)), "q_proj.weight' is of F8_E5M2"),
    ],
)  # fmt: skip
def test_contradictions_in_headers_are_told_before_any_process_starts(name, change, told, tmp_path):
    save_quantized(tmp_path, name)
    change_tensors(tmp_path, change)
    for find in (check_model, find_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            find(tmp_path)
        assert f"tensor '{Q_PROJ}." in str(caught.value)
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("saved", "config"),
    [("gptq", gptq_config(bits=8)), ("gptq", gptq_config(group_size=64)), ("gptq-8", gptq_config(bits=4))],
)
def test_a_config_of_other_bits_or_groups_is_told(saved, config, tmp_path):
    save_quantized(tmp_path, saved)
    change_config(tmp_path, quantization_config=config)
    with pytest.raises(CheckpointError, match=r"tensor 'model.layers.\d.\w+.\w+' has shape|tensor '.*' has shape"):
        check_model(tmp_path)


def test_files_without_quantised_matrices_are_told(tmp_path):
    save_quantized(tmp_path, "gptq")
    change_tensors(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "_proj" in name])
    with pytest.raises(CheckpointError, match="quantization_config is gptq, 4 bits, groups of 32, but no tensor"):
        check_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("gptq-act-order", replace("g_idx", lambda one: one + 1), "g_idx' has groups 1 to 4, the matrix has 0 to 3"),
        ("gptq-act-order", replace("g_idx", lambda one: one.where(one != 2, 1)), "g_idx' has 64 columns in group 1"),
        ("packed-4", replace("weight_shape", lambda one: one + 1), "weight_shape' is [897, 129], the packed codes are"),
        ("gptq", replace("scales", lambda one: one * torch.nan), "scales' has scales that are infinite or no numbers"),
        ("packed-4", replace("weight_scale", lambda one: one / 0), "weight_scale' has scales that are infinite"),
    ],
)
def test_contradictory_values_are_told(name, change, told, tmp_path):
    save_quantized(tmp_path, name)
    change_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=re.escape(f"tensor '{Q_PROJ}.{told}")):
        list(find_checkpoint(tmp_path).tensors())


def test_a_matrix_of_another_shape_than_the_config_is_told(tmp_path):
    save_quantized(tmp_path, "gptq")
    change_config(tmp_path, intermediate_size=64)
    with pytest.raises(WeightsError, match=r"_proj.weight' has shape \[.*\], the config calls for"):
        load(tmp_path, torch.bfloat16)


def test_groups_have_schemes_by_name_pattern_and_class(tmp_path):
    """Attention in 8 bits, one matrix in 4 by its name, the others in groups."""
    save_quantized(tmp_path, "packed-8")
    tensors = load_file(tmp_path / "model.safetensors")
    other, matrices = tmp_path / "other", {}
    for name, group_name in (("packed-4", "down"), ("packed-4-asym", "up")):
        _, found = save_quantized(other, name)
        for key, tensor in load_file(other / "model.safetensors").items():
            if f"{group_name}_proj" in key:
                tensors[key] = tensor
        matrices |= {key: matrix for key, matrix in found.items() if f"{group_name}_proj" in key}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    groups = {}
    names = ("packed-8", "packed-4", "packed-4-asym")
    ups = [f"model.layers.{layer}.mlp.up_proj" for layer in range(3)]
    for name, targets in zip(names, (["Linear"], ["re:.*down_proj$", "re:.*up_proj$"], ups), strict=True):
        groups[name] = FORMATS[name][1]["config_groups"]["group_0"] | {"targets": targets}
    change_config(tmp_path, quantization_config=compressed_config("pack-quantized") | {"config_groups": groups})
    read = dict(find_checkpoint(tmp_path).tensors(quantization="native"))
    assert read["model.layers.0.mlp.gate_proj.weight"].kind == "int8"
    for key, matrix in matrices.items():
        assert torch.equal(read[key].dequantize(), matrix.float())


COMPRESSED = [name for name, (_, config) in FORMATS.items() if "config_groups" in config]


@pytest.mark.parametrize("name", COMPRESSED)
def test_the_package_of_compressed_tensors_reads_the_same(name, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    if name == "packed-4-act-order":
        pytest.skip("the package has dropped this order")
    save_quantized(tmp_path, name)
    config = FORMATS[name][1]
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    stored = load_file(tmp_path / "model.safetensors")
    for key, tensor in find_checkpoint(tmp_path).tensors():
        module = key.removesuffix("weight")
        parts = {part.removeprefix(module): stored[part] for part in stored if part.startswith(module + "weight")}
        if len(parts) > 1:
            # The package rounds to the dtype of the scales.
            expected = compressor.decompress(parts, scheme)["weight"]
            assert torch.equal(tensor.to(expected.dtype), expected)


@pytest.mark.parametrize("name", ["packed-4", "packed-8", "float", "float-tensor"])
def test_transformers_computes_the_same_from_compressed_tensors(name, tmp_path):
    pytest.importorskip("compressed_tensors")
    save_quantized(tmp_path, name)
    config = copy.deepcopy(FORMATS[name][1])
    config["config_groups"]["group_0"]["input_activations"] = None
    change_config(tmp_path, quantization_config=config)
    expected = transformers_logits(tmp_path, PROMPT)
    assert (logits_of(tmp_path, load(tmp_path, torch.float32)) - expected).abs().max() <= 1e-3
