"""Names of formats of weights and KV cache on a benchmark's command line.

bfloat16, int8, int4 (groups of 32), int4-128, fp8, native; each may end in +kv-int8 or +kv-fp8
"""

from typing import Any

_KINDS = ("bfloat16", "float32", "int8", "int4", "int4-32", "int4-64", "int4-128", "fp8", "native")


def format_options(name: str) -> dict[str, Any]:
    """Return the engine options of a format. Raises ValueError for an unknown name."""
    weights, _, cache = name.partition("+kv-")
    if weights not in _KINDS or cache not in ("", "int8", "fp8"):
        raise ValueError(f"format is {name!r}, must be one of {', '.join(_KINDS)}, with +kv-int8 or +kv-fp8 or neither")
    options: dict[str, Any] = {"kv_cache_dtype": cache or "auto"}
    if weights in ("bfloat16", "float32"):
        return options | {"dtype": weights, "quantization": "off"}
    kind, _, group_size = weights.partition("-")
    options["quantization"] = kind
    if group_size:
        options["quantization_group_size"] = int(group_size)
    return options
