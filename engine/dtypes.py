"""The dtypes that a model can be loaded in, by their names in options."""

import torch

from dispec.engine.options import DTYPE_NAMES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
