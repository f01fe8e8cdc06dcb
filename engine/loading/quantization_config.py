"""How the matrices of a checkpoint were quantised: `quantization_config` of a config.json, checked without torch.

The formats of GPTQ, AWQ, compressed-tensors and FP8 checkpoints, as the packages of these names write them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dispec.layers.config import UnsupportedModelError

SUPPORTED = "gptq, awq, compressed-tensors and fp8"
_GROUP_SIZES = (32, 64, 128)

Layout = Literal["gptq", "gptq_v2", "awq", "pack-quantized", "int-quantized", "fp8"]


@dataclass(frozen=True)
class Scheme:
    """How some matrices are stored.

    group_size: columns that share a scale; None for all columns of a row.
    block: rows and columns that share a scale, in fp8 only.
    is_symmetric: whether zero points may be left out.
    """

    layout: Layout
    bits: int
    group_size: int | None = None
    block: tuple[int, int] | None = None
    is_symmetric: bool = True

    def describe(self) -> str:
        """Return the scheme in words."""
        if self.block is not None:
            return f"e4m3, blocks of {self.block[0]} x {self.block[1]}"
        if self.layout == "fp8":
            return "e4m3"
        return f"{self.bits} bits" if self.group_size is None else f"{self.bits} bits, groups of {self.group_size}"


@dataclass(frozen=True)
class QuantizationConfig:
    """The schemes of a checkpoint's matrices, each for the modules that its targets match.

    Which modules are quantised is told by their tensors, so that lists of modules to ignore add nothing.

    method: `quant_method`. notes: sentences about what is computed otherwise than the config says.
    """

    method: str
    schemes: tuple[tuple[tuple[str, ...], Scheme], ...]
    notes: tuple[str, ...] = ()

    def scheme_of(self, module: str) -> Scheme:
        """Return the scheme of a quantised module: that of its name, then of a pattern (`re:`), then of all layers.

        Raises UnsupportedModelError if no target matches.
        """
        for matches in (_is_name, _is_pattern, _is_class):
            for targets, scheme in self.schemes:
                if any(matches(target, module) for target in targets):
                    return scheme
        raise UnsupportedModelError(f"quantization_config: {module} is quantised, but no target of config_groups is it")

    def describe(self) -> str:
        """Return the method and its schemes in words, as in "gptq, 4 bits, groups of 128"."""
        return ", ".join((self.method, *dict.fromkeys(scheme.describe() for _, scheme in self.schemes)))


def _is_name(target: str, module: str) -> bool:
    return target == module


def _is_pattern(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), module) is not None


def _is_class(target: str, module: str) -> bool:
    return target == "Linear"


def quantization_config(raw: Mapping[str, Any]) -> QuantizationConfig | None:
    """Return the quantisation of a `config.json`; None for a checkpoint of plain matrices.

    Raises UnsupportedModelError for a method or setting without an implementation, ValueError for an invalid field.
    """
    given = raw.get("quantization_config") or raw.get("compression_config")
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise ValueError(f"quantization_config is {given!r}, must be an object")
    method = str(given.get("quant_method") or ("compressed-tensors" if "config_groups" in given else "missing"))
    if given.get("kv_cache_scheme"):
        raise _unsupported("kv_cache_scheme", given["kv_cache_scheme"], "a KV cache of the model's dtype")
    if method == "gptq":
        return _everywhere(method, _gptq(given))
    if method == "awq":
        return _everywhere(method, _awq(given))
    if method == "fp8":
        return _everywhere(method, _fp8(given), *_static_activations(given.get("activation_scheme") == "static"))
    if method == "compressed-tensors":
        return _compressed_tensors(given)
    raise UnsupportedModelError(f"quantization_config: quant_method is {method!r}, supported are {SUPPORTED}")


def refuse_second_quantization(quantization: str | None, config: QuantizationConfig | None) -> None:
    """Raise ValueError if the option `quantization` asks to quantise the matrices of a quantised checkpoint."""
    if config is not None and quantization in ("int4", "int8", "fp8"):
        raise ValueError(
            f"quantization is {quantization!r}, must be native or off: the model is quantised already"
            f" ({config.describe()})"
        )


def _everywhere(method: str, scheme: Scheme, *notes: str) -> QuantizationConfig:
    return QuantizationConfig(method, ((("Linear",), scheme),), notes)


def _gptq(given: Mapping[str, Any]) -> Scheme:
    bits = _one_of(given, "bits", (4, 8))
    if given.get("dynamic"):
        raise _unsupported("dynamic", given["dynamic"], "the same bits and groups in all layers")
    if given.get("is_marlin_format"):
        raise _unsupported("is_marlin_format", True, "checkpoint_format gptq and gptq_v2")
    field = "format" if given.get("checkpoint_format") is None else "checkpoint_format"
    layout = str(given.get(field) or "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise _unsupported(field, layout, "gptq and gptq_v2")
    return Scheme("gptq" if layout == "gptq" else "gptq_v2", bits, _group_size(given))


def _awq(given: Mapping[str, Any]) -> Scheme:
    bits = _one_of(given, "bits" if "bits" in given else "w_bit", (4,))
    field = "format" if given.get("version") is None else "version"
    version = str(given.get(field) or "gemm").lower()
    if version != "gemm":
        raise _unsupported(field, version, "gemm")
    if given.get("zero_point") is False:
        raise _unsupported("zero_point", False, "true")
    return Scheme("awq", bits, _group_size(given, "group_size" if "group_size" in given else "q_group_size"))


def _fp8(given: Mapping[str, Any]) -> Scheme:
    _one_of(given, "fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    _one_of(given, "scale_fmt", ("float",), "float")
    _one_of(given, "activation_scheme", ("dynamic", "static"), "dynamic")
    return Scheme("fp8", 8, block=_block(given, "weight_block_size"))


def _compressed_tensors(given: Mapping[str, Any]) -> QuantizationConfig:
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise UnsupportedModelError("quantization_config: config_groups is missing, without which nothing is quantised")
    if (given.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _unsupported("sparsity_config", given["sparsity_config"]["format"], "dense")
    if given.get("transform_config"):
        raise _unsupported("transform_config", given["transform_config"], "none")
    schemes: list[tuple[tuple[str, ...], Scheme]] = []
    notes: list[str] = []
    for name, group in groups.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise _unsupported(f"config_groups.{name}", group, "groups with weights")
        layout = group.get("format") or given.get("format")
        targets = tuple(map(str, group.get("targets") or ()))
        _check_patterns(targets)
        schemes.append((targets, _compressed_scheme(layout, group["weights"])))
        notes += _activation_notes(schemes[-1][1], group.get("input_activations"))
    return QuantizationConfig("compressed-tensors", tuple(schemes), tuple(dict.fromkeys(notes)))


def _check_patterns(targets: tuple[str, ...]) -> None:
    for target in targets:
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"quantization_config: target {target!r} is no regular expression: {error}") from None


def _compressed_scheme(layout: Any, weights: Mapping[str, Any]) -> Scheme:
    if layout not in ("float-quantized", "pack-quantized", "int-quantized"):
        raise _unsupported("format", layout, "float-quantized, pack-quantized and int-quantized")
    _one_of(weights, "type", ("float",) if layout == "float-quantized" else ("int",), "int")
    bits = _one_of(weights, "num_bits", (8,) if layout == "float-quantized" else (4, 8))
    group_size = weights.get("group_size")
    strategy = str(weights.get("strategy") or ("channel" if group_size in (None, -1) else "group"))
    if layout == "float-quantized":
        if strategy == "block":
            return Scheme("fp8", bits, block=_block(weights, "block_structure"))
        _one_of({"strategy": strategy}, "strategy", ("tensor", "channel"))
        return Scheme("fp8", bits)
    _one_of({"strategy": strategy}, "strategy", ("tensor", "channel", "group"))
    return Scheme(
        "pack-quantized" if layout == "pack-quantized" else "int-quantized",
        bits,
        _group_size(weights) if strategy == "group" else None,
        is_symmetric=weights.get("symmetric", True) is not False,
    )


def _activation_notes(scheme: Scheme, activations: Mapping[str, Any] | None) -> Iterator[str]:
    if activations is None:
        if scheme.layout == "fp8":
            yield "activations are rounded to e4m3 with a scale for each token, the config keeps them"
    elif scheme.layout != "fp8":
        yield "activations keep the model's dtype, the config rounds them to integers"
    else:
        yield from _static_activations(not activations.get("dynamic"))


def _static_activations(is_static: bool) -> Iterator[str]:
    if is_static:
        yield "activations are scaled by token, the config has fixed scales"


def _group_size(given: Mapping[str, Any], field: str = "group_size") -> int | None:
    size = _one_of(given, field, (*_GROUP_SIZES, -1))
    return None if size == -1 else int(size)


def _block(given: Mapping[str, Any], field: str) -> tuple[int, int] | None:
    block = given.get(field)
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise ValueError(f"quantization_config: {field} is {block!r}, must be two positive numbers")
    return block[0], block[1]


def _one_of(given: Mapping[str, Any], field: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
    value = given.get(field, default)
    if value not in allowed:
        raise _unsupported(field, value, ", ".join(map(str, allowed)))
    return value


def _unsupported(field: str, value: Any, supported: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"quantization_config: {field} is {value!r}, supported: {supported}")
