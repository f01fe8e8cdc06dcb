"""The tensors that make up each quantised matrix of a checkpoint, found and checked by the headers of its files.

No torch: the server checks a model before it starts a process.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from dispec.engine.errors import CheckpointError
from dispec.engine.loading.quantization_config import QuantizationConfig, Scheme

_FLOATS = ("F16", "BF16", "F32")
_INDICES = ("I32", "I64")
_PARTS = (
    *("qweight", "qzeros", "scales", "g_idx"),  # GPTQ and AWQ
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),  # compressed-tensors
    "weight_scale_inv",  # FP8
)
# Of activations, whose scales are computed for each token.
_UNUSED = ("input_scale", "input_zero_point", "output_scale")
_MAX_HEADER_BYTES = 100_000_000  # as in the safetensors package


class TensorHeader(NamedTuple):
    """dtype: as safetensors spells it."""

    dtype: str
    shape: tuple[int, ...]


class StoredMatrix(NamedTuple):
    """A quantised matrix [rows, columns]. parts: the suffixes of its tensors, as in "qweight"."""

    scheme: Scheme
    rows: int
    columns: int
    parts: tuple[str, ...]

    @property
    def num_groups(self) -> int:
        """Scales in a row."""
        return 1 if self.scheme.group_size is None else -(-self.columns // self.scheme.group_size)


class _Part(NamedTuple):
    """A tensor that a layout calls for. shapes: those that are allowed."""

    suffix: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_optional: bool = False


def read_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """Return dtype and shape of each tensor in safetensors files. Raises CheckpointError for a damaged header."""
    headers: dict[str, TensorHeader] = {}
    for file in files:
        try:
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                if size > _MAX_HEADER_BYTES:
                    raise ValueError(f"its header has {size} bytes")
                entries = json.loads(opened.read(size))
            for name, entry in entries.items():
                if name != "__metadata__":
                    headers[name] = TensorHeader(entry["dtype"], tuple(entry["shape"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is not a whole safetensors file ({error}): download it again") from error
    return headers


def find_quantized(headers: Mapping[str, TensorHeader], config: QuantizationConfig) -> dict[str, StoredMatrix]:
    """Return the quantised matrices by the names that plain ones would have, `<module>.weight`.

    Raises CheckpointError if a part is missing or does not fit the config, or if no matrix is quantised.
    """
    modules: dict[str, set[str]] = {}
    for name, header in headers.items():
        module, _, suffix = name.rpartition(".")
        if suffix in _PARTS or (suffix == "weight" and header.dtype.startswith(("I8", "F8"))):
            modules.setdefault(module, set()).add(suffix)
    if not modules:
        raise CheckpointError(f"quantization_config is {config.describe()}, but no tensor of the files is quantised")
    return {f"{module}.weight": _check(module, headers, config.scheme_of(module)) for module in modules}


def tensor_names(weight: str, matrix: StoredMatrix) -> dict[str, str]:
    """Return the name of each part's tensor."""
    return {part: f"{weight.removesuffix('weight')}{part}" for part in matrix.parts}


def unused_names(weight: str) -> Iterator[str]:
    """Yield the names of tensors that a quantised matrix may have and that are not read."""
    for suffix in _UNUSED:
        yield f"{weight.removesuffix('weight')}{suffix}"


def _check(module: str, headers: Mapping[str, TensorHeader], scheme: Scheme) -> StoredMatrix:
    parts = []
    rows, columns = _shape(module, headers, scheme)
    matrix = StoredMatrix(scheme, rows, columns, ())
    for part in _LAYOUTS[scheme.layout](matrix):
        name = f"{module}.{part.suffix}"
        header = headers.get(name)
        if header is None:
            if part.is_optional:
                continue
            raise _missing(name, scheme)
        if header.dtype not in part.dtypes:
            raise CheckpointError(
                f"tensor {name!r} is of {header.dtype}, {scheme.layout} calls for {' or '.join(part.dtypes)}"
            )
        if header.shape not in part.shapes:
            allowed = " or ".join(str(list(shape)) for shape in part.shapes)
            raise CheckpointError(
                f"tensor {name!r} has shape {list(header.shape)}, {scheme.layout} with {scheme.describe()} calls for"
                f" {allowed}"
            )
        parts.append(part.suffix)
    if scheme.layout == "fp8" and len(parts) != 2:
        raise _missing(f"{module}.weight_scale", scheme)
    return matrix._replace(parts=tuple(parts))


def _missing(name: str, scheme: Scheme) -> CheckpointError:
    return CheckpointError(f"tensor {name!r} is missing, {scheme.layout} calls for it: download the model again")


def _shape(module: str, headers: Mapping[str, TensorHeader], scheme: Scheme) -> tuple[int, int]:
    """Return rows and columns of the matrix, by the tensor of its codes."""
    is_packed_by_row = scheme.layout in ("gptq", "gptq_v2", "awq")
    suffix = "qweight" if is_packed_by_row else "weight_packed" if scheme.layout == "pack-quantized" else "weight"
    name = f"{module}.{suffix}"
    if name not in headers:
        raise _missing(name, scheme)
    shape = headers[name].shape
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"tensor {name!r} has shape {list(shape)}, must have two dimensions")
    per_word = 32 // scheme.bits
    match scheme.layout:
        case "gptq" | "gptq_v2":
            return shape[1], shape[0] * per_word
        case "awq":
            return shape[1] * per_word, shape[0]
        case "pack-quantized":
            return shape[0], shape[1] * per_word
    return shape[0], shape[1]


def _gptq(matrix: StoredMatrix) -> Iterator[_Part]:
    rows, columns, groups, bits = matrix.rows, matrix.columns, matrix.num_groups, matrix.scheme.bits
    yield _Part("qweight", ("I32",), ((columns * bits // 32, rows),))
    yield _Part("qzeros", ("I32",), ((groups, rows * bits // 32),))
    yield _Part("scales", _FLOATS, ((groups, rows),))
    yield _Part("g_idx", _INDICES, ((columns,),), is_optional=True)


def _awq(matrix: StoredMatrix) -> Iterator[_Part]:
    rows, columns, groups, bits = matrix.rows, matrix.columns, matrix.num_groups, matrix.scheme.bits
    yield _Part("qweight", ("I32",), ((columns, rows * bits // 32),))
    yield _Part("qzeros", ("I32",), ((groups, rows * bits // 32),))
    yield _Part("scales", _FLOATS, ((groups, rows),))


def _pack_quantized(matrix: StoredMatrix) -> Iterator[_Part]:
    rows, columns, groups, scheme = matrix.rows, matrix.columns, matrix.num_groups, matrix.scheme
    yield _Part("weight_packed", ("I32",), ((rows, columns * scheme.bits // 32),))
    yield _Part("weight_scale", _FLOATS, _scale_shapes(matrix))
    zero_points = (-(-rows * scheme.bits // 32), groups)
    yield _Part("weight_zero_point", ("I32",), (zero_points,), is_optional=scheme.is_symmetric)
    yield _Part("weight_shape", _INDICES, ((2,),))
    yield _Part("weight_g_idx", _INDICES, ((columns,),), is_optional=True)


def _int_quantized(matrix: StoredMatrix) -> Iterator[_Part]:
    shapes = _scale_shapes(matrix)
    yield _Part("weight", ("I8",), ((matrix.rows, matrix.columns),))
    yield _Part("weight_scale", _FLOATS, shapes)
    yield _Part("weight_zero_point", ("I8",), shapes, is_optional=matrix.scheme.is_symmetric)


def _fp8(matrix: StoredMatrix) -> Iterator[_Part]:
    yield _Part("weight", ("F8_E4M3",), ((matrix.rows, matrix.columns),))
    shapes: tuple[tuple[int, ...], ...] = (*_scale_shapes(matrix), (matrix.rows,))
    if matrix.scheme.block is not None:
        rows, columns = matrix.scheme.block
        shapes = ((-(-matrix.rows // rows), -(-matrix.columns // columns)),)
    for suffix in ("weight_scale", "weight_scale_inv"):  # two names of the same factor
        yield _Part(suffix, _FLOATS, shapes, is_optional=True)


def _scale_shapes(matrix: StoredMatrix) -> tuple[tuple[int, ...], ...]:
    if matrix.scheme.group_size is not None:
        return ((matrix.rows, matrix.num_groups),)
    return (matrix.rows, 1), (1,), ()


_LAYOUTS = {
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "awq": _awq,
    "pack-quantized": _pack_quantized,
    "int-quantized": _int_quantized,
    "fp8": _fp8,
}
