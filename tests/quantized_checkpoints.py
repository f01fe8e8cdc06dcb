"""Quantised checkpoints made from the specifications of their formats, with the numbers that they stand for.

Nothing here is shared with the reader: codes are packed word by word, and each element is computed from its own code,
zero point and scale in float64.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.checkpoints import save_tiny

Parts = dict[str, Tensor]
Maker = Callable[[int, int, np.random.Generator], tuple[Parts, np.ndarray]]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_rows(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Unsigned codes [M, C] in words [M, C / n]: the word's lowest bits hold its column `order[0]`, and so on."""
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word)))
    words = np.zeros((codes.shape[0], padded.shape[1] // per_word), dtype=np.uint32)
    for place, column in enumerate(order):
        words |= padded[:, column::per_word].astype(np.uint32) << np.uint32(place * bits)
    return torch.from_numpy(words.view(np.int32).copy())


def pack_columns(codes: np.ndarray, bits: int) -> Tensor:
    """Unsigned codes [R, C] in words [R / n, C]: the word's lowest bits hold the first row."""
    return pack_rows(codes.T, bits).T.contiguous()


def _random(rows: int, columns: int, bits: int, group: np.ndarray, is_symmetric: bool, random: np.random.Generator):
    """Unsigned codes [K, N], zero points and scales [G, N], and the matrix [N, K]."""
    codes = random.integers(0, 2**bits, (columns, rows))
    count = group.max() + 1
    zeros = np.full((count, rows), 2 ** (bits - 1))
    if not is_symmetric:
        zeros = random.integers(0, 2**bits, (count, rows))
        zeros[0, :2] = (0, 2**bits - 1)
    scales = random.uniform(0.5, 1.0, (count, rows)) * (4 / 2**bits / columns**0.5)
    scales = torch.from_numpy(scales).half()
    matrix = (codes - zeros[group]) * scales.double().numpy()[group]
    return codes, zeros, scales, matrix.T


def _groups(columns: int, group_size: int, is_ordered: bool, random: np.random.Generator) -> np.ndarray:
    group = np.zeros(columns, dtype=np.int64) if group_size == -1 else np.arange(columns) // group_size
    return random.permutation(group) if is_ordered else group


def gptq(
    bits: int = 4,
    group_size: int = 32,
    desc_act: bool = False,
    sym: bool = True,
    v2: bool = False,
    order_seed: int | None = 5,
) -> Maker:
    """`order_seed`: of the order of columns, the same in all matrices of as many columns; None for one of each."""

    def make(rows: int, columns: int, random: np.random.Generator) -> tuple[Parts, np.ndarray]:
        ordering = random if order_seed is None else np.random.default_rng(order_seed)
        group = _groups(columns, group_size, desc_act, ordering)
        codes, zeros, scales, matrix = _random(rows, columns, bits, group, sym, random)
        stored = zeros if v2 else (zeros - 1) % 2**bits
        return {
            "qweight": pack_columns(codes, bits),
            "qzeros": pack_rows(stored, bits),
            "scales": scales,
            "g_idx": torch.from_numpy(group).int(),
        }, matrix

    return make


def awq(group_size: int = 32) -> Maker:
    def make(rows: int, columns: int, random: np.random.Generator) -> tuple[Parts, np.ndarray]:
        group = _groups(columns, group_size, False, random)
        codes, zeros, scales, matrix = _random(rows, columns, 4, group, False, random)
        return {
            "qweight": pack_rows(codes, 4, _AWQ_ORDER),
            "qzeros": pack_rows(zeros, 4, _AWQ_ORDER),
            "scales": scales,
        }, matrix

    return make


def pack_quantized(bits: int = 4, group_size: int = 32, sym: bool = True, actorder: bool = False) -> Maker:
    def make(rows: int, columns: int, random: np.random.Generator) -> tuple[Parts, np.ndarray]:
        group = _groups(columns, group_size, actorder, np.random.default_rng(5))
        codes, zeros, scales, matrix = _random(rows, columns, bits, group, sym, random)
        parts = {
            "weight_packed": pack_rows(codes.T, bits),
            "weight_scale": scales.T.contiguous(),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not sym:
            parts["weight_zero_point"] = pack_columns(zeros.T, bits)
        if actorder:
            parts["weight_g_idx"] = torch.from_numpy(group).int()
        return parts, matrix

    return make


def int_quantized(sym: bool = True, is_per_tensor: bool = False) -> Maker:
    def make(rows: int, columns: int, random: np.random.Generator) -> tuple[Parts, np.ndarray]:
        group = _groups(columns, -1, False, random)
        codes, zeros, scales, matrix = _random(rows, columns, 8, group, sym, random)
        if is_per_tensor:
            scales = scales[:, :1]
            matrix = (codes - 128).T * scales.double().numpy()
        parts = {
            "weight": torch.from_numpy(codes.T - 128).to(torch.int8).contiguous(),
            "weight_scale": scales.T.contiguous(),
        }
        if is_per_tensor:
            parts["weight_scale"] = scales.reshape(1)
        if not sym:
            parts["weight_zero_point"] = torch.from_numpy(zeros.T - 128).to(torch.int8).contiguous()
        return parts, matrix

    return make


def fp8(
    scale: str = "row", name: str = "weight_scale", block: tuple[int, int] | None = None, has_input_scale: bool = False
) -> Maker:
    """`scale`: "row" [N, 1], "vector" [N], "tensor" [1] or "scalar" []."""

    def make(rows: int, columns: int, random: np.random.Generator) -> tuple[Parts, np.ndarray]:
        weight = torch.from_numpy(random.normal(size=(rows, columns)) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        if block is None:
            shape = {"row": (rows, 1), "vector": (rows,), "tensor": (1,), "scalar": ()}[scale]
        else:
            shape = (-(-rows // block[0]), -(-columns // block[1]))
        scales = torch.from_numpy(np.asarray(random.uniform(0.5, 1.0, shape) * 0.02 / columns**0.5)).float()
        of_element = scales.double().numpy()
        if block is not None:
            of_element = of_element.repeat(block[0], 0)[:rows].repeat(block[1], 1)[:, :columns]
        elif scale == "vector":
            of_element = of_element[:, None]
        parts = {"weight": weight, name: scales}
        if has_input_scale:
            parts["input_scale"] = torch.tensor(0.5)
        return parts, weight.double().numpy() * of_element

    return make


def gptq_config(bits: int = 4, group_size: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": True} | more


def awq_config(group_size: int = 32, **more: Any) -> dict[str, Any]:
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    return config | more


def compressed_config(layout: str, input_activations: Any = None, **weights: Any) -> dict[str, Any]:
    kind = "float" if layout == "float-quantized" else "int"
    scheme = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel", "group_size": None} | weights
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": input_activations}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


DYNAMIC = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
STATIC = DYNAMIC | {"dynamic": False, "strategy": "tensor"}
DYNAMIC_INT = DYNAMIC | {"type": "int"}

# Of each: the makers of matrices, and the config. Of groups of 64 and 128, some matrices have a shorter one.
FORMATS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "gptq": (gptq(), gptq_config()),
    "gptq-64": (gptq(group_size=64), gptq_config(group_size=64)),
    "gptq-128-asym": (gptq(group_size=128, sym=False), gptq_config(group_size=128, sym=False)),
    "gptq-rows": (gptq(group_size=-1, sym=False), gptq_config(group_size=-1, sym=False)),
    "gptq-act-order": (gptq(desc_act=True, sym=False), gptq_config(desc_act=True, sym=False)),
    "gptq-8": (gptq(bits=8), gptq_config(bits=8)),
    "gptq-8-act-order": (
        gptq(bits=8, group_size=64, desc_act=True, sym=False),
        gptq_config(bits=8, group_size=64, desc_act=True, sym=False),
    ),
    "gptq-v2": (gptq(sym=False, v2=True), gptq_config(sym=False, checkpoint_format="gptq_v2")),
    "gptq-8-v2": (gptq(bits=8, sym=False, v2=True), gptq_config(bits=8, sym=False, checkpoint_format="gptq_v2")),
    "awq": (awq(), awq_config()),
    "awq-128": (awq(128), awq_config(128, version="GEMM", modules_to_not_convert=["lm_head"])),
    "packed-4": (
        pack_quantized(),
        compressed_config("pack-quantized", num_bits=4, strategy="group", group_size=32),
    ),
    "packed-4-asym": (
        pack_quantized(sym=False),
        compressed_config("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False),
    ),
    "packed-4-act-order": (
        pack_quantized(actorder=True),
        compressed_config("pack-quantized", num_bits=4, strategy="group", group_size=32, actorder="group"),
    ),
    "packed-8": (pack_quantized(bits=8, group_size=-1), compressed_config("pack-quantized")),
    "int": (int_quantized(), compressed_config("int-quantized", DYNAMIC_INT)),
    "int-asym": (int_quantized(sym=False), compressed_config("int-quantized", symmetric=False)),
    "int-tensor": (int_quantized(is_per_tensor=True), compressed_config("int-quantized", strategy="tensor")),
    "float": (fp8(), compressed_config("float-quantized", DYNAMIC)),
    "float-tensor": (
        fp8("tensor", has_input_scale=True),
        compressed_config("float-quantized", STATIC, strategy="tensor"),
    ),
    "fp8-scalar": (fp8("scalar"), {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "fp8-vector": (
        fp8("vector", "weight_scale_inv", has_input_scale=True),
        {"quant_method": "fp8", "activation_scheme": "static"},
    ),
    "fp8-blocks": (
        fp8(name="weight_scale_inv", block=(48, 40)),
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [48, 40]},
    ),
}


def save_quantized(
    directory: Path,
    format: str | tuple[Maker, dict[str, Any]],
    family: str = "qwen2",
    max_shard_size: str | None = None,
    quantizes_head: bool = False,
    **overrides: Any,
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Save a random model whose layers' matrices are quantised.

    Returns it with the values of the matrices, in float32, and these by their names, in float64.
    """
    maker, config = FORMATS[format] if isinstance(format, str) else format
    model = save_tiny(directory, family, max_shard_size=max_shard_size, **overrides)
    random = np.random.default_rng(1)
    matrices: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        for name in [name for name in tensors if "_proj.weight" in name or (quantizes_head and "lm_head" in name)]:
            parts, matrix = maker(*tensors.pop(name).shape, random)
            matrices[name] = torch.from_numpy(matrix)
            tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
        save_file(tensors, file, {"format": "pt"})
    write_index(directory)
    change_config(directory, quantization_config=config)
    model.load_state_dict({name: matrix.float() for name, matrix in matrices.items()}, strict=False)
    return model, matrices


def write_index(directory: Path) -> None:
    """Write the index anew, if there is one."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        files = sorted(directory.glob("*.safetensors"))
        index.write_text(json.dumps({"weight_map": {name: file.name for file in files for name in load_file(file)}}))


def change_config(directory: Path, **changes: Any) -> None:
    """Replace fields of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint in one file."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def transformers_logits(model: PreTrainedModel | Path, prompt: list[int]) -> Tensor:
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0]
