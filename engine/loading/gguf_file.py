"""Read a GGUF file as a Hugging Face checkpoint: the same config, tensor names and row order."""

import logging
from collections.abc import Iterator

import gguf
import numpy as np
import torch
from torch import Tensor

from dispec.engine.loading.gguf_blocks import has_codes, read_codes
from dispec.engine.loading.gguf_header import ARCHITECTURES, ROPE_FACTORS, GgufHeader
from dispec.ops import QuantizedTensor

log = logging.getLogger("dispec")

_Type = gguf.GGMLQuantizationType
_MAX_DEQUANTIZED = 2**21  # elements at once: a whole embedding in float32 would set the peak memory of a start
_UNQUANTIZED = {_Type.F32: torch.float32, _Type.F16: torch.float16, _Type.BF16: torch.bfloat16}


class GgufFile(GgufHeader):
    """An open GGUF file: its header and tensors."""

    def tensors(
        self, dtype: torch.dtype = torch.float32, *, keeps_quantized: bool = False
    ) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Yield each weight with its Hugging Face name; an unknown name stays as in the file.

        F32, F16 and BF16 tensors are views of the mapped file. Quantised ones stay quantised with `keeps_quantized`, if
        `gguf_blocks` knows their type; else they are dequantised to `dtype`, and one log line names each such type.
        """
        names = self._hugging_face_names()
        dequantized: set[gguf.GGMLQuantizationType] = set()
        for tensor in self._reader.tensors:
            if tensor.name == ROPE_FACTORS or tensor.name.endswith(".attn_rot_embd.weight"):
                continue  # part of the config, or a table that follows from it
            kind = tensor.tensor_type
            data = np.asarray(tensor.data)  # a slice of np.memmap costs microseconds
            if self._metadata["general.architecture"] == "llama":
                if ".attn_q." in tensor.name:
                    data = _unpermute(data, self.config.num_heads)
                elif ".attn_k." in tensor.name:
                    data = _unpermute(data, self.config.num_kv_heads)
            weight: Tensor | QuantizedTensor
            if keeps_quantized and has_codes(kind) and data.ndim == 2:
                weight = read_codes(data, kind)
            else:
                if keeps_quantized and kind not in _UNQUANTIZED and kind not in dequantized:
                    dequantized.add(kind)
                    log.info("%s weights are dequantised: there is no kernel for them", kind.name)
                weight = _to_torch(data, kind, dtype)
            yield names.get(tensor.name, tensor.name), weight
            self._reader.drop_pages(int(tensor.data_offset), int(tensor.n_bytes))

    def _hugging_face_names(self) -> dict[str, str]:
        stems = ["model.embed_tokens", "model.norm", "lm_head"]
        parts = ["input_layernorm", "post_attention_layernorm"]
        parts += [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
        parts += [f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
        stems += [f"model.layers.{layer}.{part}" for layer in range(self.config.num_layers) for part in parts]
        _, architecture = ARCHITECTURES[self._metadata["general.architecture"]]
        known = gguf.get_tensor_name_map(architecture, self.config.num_layers)
        names: dict[str, str] = {}
        for stem in stems:
            if (name := known.get_name(stem)) is not None:
                names |= {f"{name}.weight": f"{stem}.weight", f"{name}.bias": f"{stem}.bias"}
        return names


def _to_torch(data: np.ndarray, kind: gguf.GGMLQuantizationType, dequantized: torch.dtype = torch.float32) -> Tensor:
    dtype = _UNQUANTIZED.get(kind)
    if dtype is not None:
        return torch.from_numpy(np.asarray(data)).view(dtype)
    shape = gguf.quants.quant_shape_from_byte_shape(data.shape, kind)
    # The package dequantises 16 rows at a time, which is slow for short ones. Rows are whole blocks, so four of them
    # can be passed as one.
    if data.shape[-1] <= 2048 and data.shape[0] % 4 == 0:
        data = data.reshape(-1, data.shape[-1] * 4)
    weight = torch.empty(shape, dtype=dequantized)
    rows = weight.view(len(data), -1)
    step = max(1, _MAX_DEQUANTIZED // rows.shape[1])
    for first in range(0, len(data), step):
        part = torch.from_numpy(gguf.dequantize(data[first : first + step], kind))
        rows[first : first + step] = part.view(-1, rows.shape[1])
    return weight


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder llama.cpp's interleaved rotation pairs (0, 1), (2, 3), … to halves (0, D/2), (1, D/2 + 1), …

    rows: numbers, or bytes of blocks, since a row is whole blocks.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
