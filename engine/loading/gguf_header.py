"""Read the header of a GGUF file, without torch: config, types of tensors and tokenizer."""

import math
import mmap
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from dispec.engine.errors import CheckpointError
from dispec.layers.config import ModelConfig, RopeScaling, UnsupportedModelError, yarn_attention_factor

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", gguf.MODEL_ARCH.LLAMA),
    "qwen2": ("Qwen2ForCausalLM", gguf.MODEL_ARCH.QWEN2),
    "qwen3": ("Qwen3ForCausalLM", gguf.MODEL_ARCH.QWEN3),
}
ROPE_FACTORS = "rope_freqs.weight"

_Type = gguf.GGMLQuantizationType
UNQUANTIZED = (_Type.F32, _Type.F16, _Type.BF16)

_MAX_ARRAY_READ = 1024  # more than any model has layers; longer arrays belong to the vocabulary


class _Reader(gguf.GGUFReader):
    """The gguf package's reader, which takes two seconds over a vocabulary that most starts do not need.

    If a later version of the package renames `_get_field_parts`, reading is slow again but correct.
    """

    def __init__(self, *args: Any) -> None:
        # Offset, item type and length of each array that was skipped, in the order of the fields.
        self._skipped: list[tuple[int, int, int]] = []
        super().__init__(*args)

    def contents(self) -> dict[str, Any]:
        """Return all entries, skipped arrays included."""
        arrays = iter(self._skipped)
        return {
            name: self._array(*next(arrays)) if field.types == [gguf.GGUFValueType.ARRAY] else field.contents()
            for name, field in self.fields.items()
        }

    def _array(self, start: int, item_type: int, count: int) -> list[Any]:
        position = start + 12
        if item_type != gguf.GGUFValueType.STRING:
            scalar = self.gguf_scalar_to_np[gguf.GGUFValueType(item_type)]
            return np.frombuffer(self.data, scalar, count, position).tolist()
        length_at, data, texts = struct.Struct("<Q").unpack_from, memoryview(self.data), []
        for _ in range(count):
            length = length_at(data, position)[0]
            texts.append(str(data[position + 8 : position + 8 + length], "utf-8"))
            position += 8 + length
        return texts

    def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
        if raw_type == gguf.GGUFValueType.ARRAY:
            item_type, count = struct.unpack_from("<IQ", self.data, orig_offs)
            if count > _MAX_ARRAY_READ and item_type != gguf.GGUFValueType.ARRAY:
                self._skipped.append((int(orig_offs), item_type, count))
                return self._size_of_array(orig_offs, item_type, count), [], [], [gguf.GGUFValueType.ARRAY]
        return super()._get_field_parts(orig_offs, raw_type)

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        """Check that the file has the bytes of all tensors: the package's errors do not name the tensor."""
        for field in fields:
            _, name_bytes, _, dims, (number,), (offset,) = field.parts
            name, shape = str(bytes(name_bytes), "utf-8"), dims.tolist()
            try:
                kind = _Type(int(number))
            except ValueError:
                raise ValueError(f"tensor {name} has the unknown type {number}") from None
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if shape[0] % block_size:
                raise ValueError(
                    f"tensor {name} has rows of {shape[0]} numbers, {kind.name} has blocks of {block_size}"
                )
            end = start_offs + int(offset) + math.prod(shape) // block_size * block_bytes
            if end > len(self.data):
                raise ValueError(f"tensor {name} ends at byte {end}, the file has {len(self.data)}")
        super()._build_tensors(start_offs, fields)

    def drop_pages(self, start: int, size: int) -> None:
        """Take pages of the mapped file out of the process's resident memory; later reads map them again.

        Without it the default model's start has a peak 95 MB higher.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self.data._mmap.madvise(mmap.MADV_DONTNEED, first, start + size - first)

    def _size_of_array(self, start: int, item_type: int, count: int) -> int:
        position = start + 12
        if item_type != gguf.GGUFValueType.STRING:
            scalar = self.gguf_scalar_to_np[gguf.GGUFValueType(item_type)]
            return 12 + count * np.dtype(scalar).itemsize
        length_at, data = struct.Struct("<Q").unpack_from, self.data
        for _ in range(count):
            position += 8 + length_at(data, position)[0]
        return position - start


class GgufHeader:
    """An open GGUF file: its config, the types of its tensors, and tokenizer entries.

    Raises CheckpointError if the file cannot be read, UnsupportedModelError if this engine cannot run the model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _open(path)
        self._metadata = {name: field.contents() for name, field in self._reader.fields.items()}
        self._shapes = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in self._reader.tensors}
        try:
            self._refuse_unsupported()
            self.config = self._read_config()
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{path}: {error}") from None
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is not a complete model: {error}") from error

    def tokenizer_metadata(self) -> dict[str, Any]:
        """Return the `tokenizer.*` entries, vocabulary included."""
        return {name: value for name, value in self._reader.contents().items() if name.startswith("tokenizer.")}

    def quantized_format(self) -> str | None:
        """Return the types of the quantised tensors, those with most numbers first, such as "GGUF Q4_1 and Q8_0"; None
        if none is quantised."""
        sizes: Counter[str] = Counter()
        for tensor in self._reader.tensors:
            if tensor.tensor_type not in UNQUANTIZED:
                sizes[tensor.tensor_type.name] += int(tensor.n_elements)
        names = [name for name, _ in sizes.most_common()]
        if len(names) > 1:
            names = [f"{', '.join(names[:-1])} and {names[-1]}"]
        return f"GGUF {names[0]}" if names else None

    def _refuse_unsupported(self) -> None:
        architecture = self._metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(f"architecture {architecture!r}: supported are {', '.join(ARCHITECTURES)}")
        if experts := self._get("expert_count", 0):
            raise UnsupportedModelError(f"mixture of {experts} experts")
        if window := self._get("attention.sliding_window", 0):
            raise UnsupportedModelError(f"sliding-window attention ({window} tokens)")
        if self._metadata.get("split.count", 0) > 1:
            raise UnsupportedModelError("a model in several GGUF files: merge them with `llama-gguf-split --merge`")
        kinds = {tensor.tensor_type: tensor for tensor in self._reader.tensors}
        for kind, tensor in kinds.items():
            try:
                gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
            except NotImplementedError:
                raise UnsupportedModelError(f"quantisation {kind.name} (tensor {tensor.name})") from None

    def _read_config(self) -> ModelConfig:
        vocab_size, hidden_size = self._shape("token_embd.weight")
        heads = self._count("attention.head_count")
        head_dim = self._get("attention.key_length", None) or hidden_size // max(heads, 1)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (size := self._get(key, head_dim)) != head_dim:
                raise UnsupportedModelError(f"{key} {size} with a head dimension of {head_dim}")
        name = self._metadata["general.architecture"]
        max_positions = self._count("context_length")
        return ModelConfig(
            architecture=ARCHITECTURES[name][0],
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=self._count("feed_forward_length"),
            num_layers=self._count("block_count"),
            num_heads=heads,
            num_kv_heads=self._count("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=_decimal(self._get("attention.layer_norm_rms_epsilon")),
            rope_theta=float(self._get("rope.freq_base", 10000.0)),
            rope_scaling=self._rope_scaling(max_positions, head_dim),
            tie_embeddings="output.weight" not in self._shapes,
            qkv_bias=name == "qwen2" or "blk.0.attn_q.bias" in self._shapes,
            output_bias="blk.0.attn_output.bias" in self._shapes,
            qk_norm=name == "qwen3",
        )

    def _rope_scaling(self, max_positions: int, head_dim: int) -> RopeScaling | None:
        factor = float(self._get("rope.scaling.factor", None) or self._get("rope.scale_linear", None) or 1.0)
        kind = self._get("rope.scaling.type", "none" if factor == 1.0 else "linear")
        if kind == "none":
            factor = 1.0
        if kind not in ("none", "linear", "yarn"):
            raise UnsupportedModelError(f"rope scaling {kind!r}: supported are linear, yarn")
        if ROPE_FACTORS in self._shapes:
            if kind == "yarn":
                raise UnsupportedModelError("rope scaling yarn together with frequency factors")
            (tensor,) = (tensor for tensor in self._reader.tensors if tensor.name == ROPE_FACTORS)
            values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(-1)
            factors = tuple(float(value) * factor for value in values)
            if len(factors) != head_dim // 2:
                raise ValueError(f"{ROPE_FACTORS} has {len(factors)} factors for a head dimension of {head_dim}")
            return RopeScaling("frequency_factors", frequency_factors=factors)
        if kind == "none":
            return None
        if kind == "linear":
            return RopeScaling("linear", factor=factor)
        # llama.cpp multiplies YaRN's own temperature by what the file says, where Hugging Face replaces it.
        attention = yarn_attention_factor(factor) * float(self._get("rope.scaling.yarn_attn_factor", 1.0))
        return RopeScaling(
            "yarn",
            factor=factor,
            original_max_position_embeddings=int(
                self._get("rope.scaling.original_context_length", None) or max_positions
            ),
            beta_fast=float(self._get("rope.scaling.yarn_beta_fast", 32.0)),
            beta_slow=float(self._get("rope.scaling.yarn_beta_slow", 1.0)),
            attention_factor=attention,
        )

    def _get(self, key: str, *default: Any) -> Any:
        key = f"{self._metadata['general.architecture']}.{key}"
        if key not in self._metadata and not default:
            raise ValueError(f"{key} is missing")
        return self._metadata.get(key, *default)

    def _count(self, key: str, *default: int) -> int:
        value = self._get(key, *default)
        if isinstance(value, list):  # one number a layer
            if len(set(value)) != 1:
                raise UnsupportedModelError(f"{key} that differs between layers")
            value = value[0]
        return int(value)

    def _shape(self, name: str) -> tuple[int, ...]:
        if len(self._shapes.get(name, ())) != 2:
            raise ValueError(f"tensor {name} is missing or not a matrix")
        return self._shapes[name]


def _open(path: Path) -> _Reader:
    try:
        # Copy on write: torch needs writable memory, and writes must not reach the file.
        reader = _Reader(path, "c")
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}): check the path and its permissions") from error
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a whole GGUF file ({str(error) or type(error).__name__}): download it again"
        ) from error
    if reader.byte_order != "I":
        raise CheckpointError(f"{path} is a GGUF file of the other byte order: convert it with gguf-py")
    return reader


def _decimal(value: float) -> float:
    """Return the shortest decimal that rounds to a float32: 1e-05 for 9.999999747e-06."""
    return float(str(np.float32(value)))
