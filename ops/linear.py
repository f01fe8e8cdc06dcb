"""Matrix products with weights in the layout that the device reads fastest."""
import torch
from torch import Tensor
