"""The token of each row's largest logit."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec.ops.cpu import argmax as cpu_argmax
from dispec.ops.cpu.library import has_kernels

_library = torch.library.Library("dispec", "FRAGMENT")
_library.define("argmax(Tensor logits) -> Tensor")


def argmax(logits: Float[Tensor, "R V"]) -> Int[Tensor, "R"]:
    """Each row's largest logit, the first of several; a NaN counts as the largest."""
    if logits.device.type == "cpu" and has_kernels():
        return torch.ops.dispec.argmax(logits)
    return logits.argmax(dim=-1)


_library.impl("argmax", cpu_argmax.argmax, "CPU")
torch.library.register_fake(
    "dispec::argmax", lambda logits: logits.new_empty(logits.shape[0], dtype=torch.int64), lib=_library
)
