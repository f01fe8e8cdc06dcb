"""The dtypes that a model can be loaded in, by the names that options have for them."""

import torch

from dispec.engine.options import DTYPE_NAMES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
