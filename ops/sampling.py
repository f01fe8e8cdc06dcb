"""A token of each row, drawn from its softmax, as one op on a CPU."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec.ops.cpu import sampling as cpu_sampling
from dispec.ops.cpu.library import has_kernels

_library = torch.library.Library("dispec", "FRAGMENT")
_library.define("sample(Tensor logits, Tensor temperature, Tensor seed, Tensor position, Tensor? token_ids) -> Tensor")


def has_sample_kernel(device: torch.device) -> bool:
    """Whether `sample` can take tensors of the device."""
    return device.type == "cpu" and has_kernels()


def sample(
    logits: Float[Tensor, "R V"],
    temperature: Float[Tensor, "R"],
    seed: Int[Tensor, "R"],
    position: Int[Tensor, "R"],
    token_ids: Int[Tensor, "V"] | None,
) -> Int[Tensor, "R"]:
    """As `layers.sampling.draw` defines it, each row by itself. Only where `has_sample_kernel`."""
    return torch.ops.dispec.sample(logits, temperature, seed, position, token_ids)


_library.impl("sample", cpu_sampling.sample, "CPU")
torch.library.register_fake(
    "dispec::sample", lambda logits, *_: logits.new_empty(logits.shape[0], dtype=torch.int64), lib=_library
)
