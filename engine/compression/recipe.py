"""How a model is quantised: the options of `dispec quantize`. No torch: the command line reads them."""

from dataclasses import dataclass

from dispec.layers.config import ModelConfig

METHODS = ("gptq", "rtn")
GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Recipe:
    """method: `gptq` minimises the error of each layer's outputs on a text, `rtn` rounds to the nearest.

    group_size: columns that share a scale; None for the largest of 128, 64 and 32 that divides all matrices.
    act_order: quantise the columns with the largest inputs first. Groups stay groups of neighbours.
    num_samples, sample_length: calibrate on so many pieces of so many tokens.
    """

    method: str = "gptq"
    bits: int = 4
    group_size: int | None = None
    act_order: bool = True
    num_samples: int = 64
    sample_length: int = 512

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}, must be one of {', '.join(METHODS)}")
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}, must be 4 or 8")
        if self.group_size not in (None, *GROUP_SIZES):
            raise ValueError(f"group_size is {self.group_size}, must be 32, 64 or 128")
        for field in ("num_samples", "sample_length"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, must be at least 1")

    def group_size_for(self, config: ModelConfig) -> int:
        """Return the group size. Raises ValueError if it does not divide the columns of each matrix of a layer."""
        columns = {
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_heads x head_dim": config.num_heads * config.head_dim,
        }
        fitting = [size for size in GROUP_SIZES if not any(count % size for count in columns.values())]
        if not fitting:
            name, count = next((name, count) for name, count in columns.items() if count % GROUP_SIZES[-1])
            raise ValueError(f"{name} is {count}, must be a multiple of {GROUP_SIZES[-1]} to be quantised in groups")
        if self.group_size is None:
            return fitting[0]
        if self.group_size not in fitting:
            name, count = next((name, count) for name, count in columns.items() if count % self.group_size)
            raise ValueError(f"group_size is {self.group_size}, must divide {name} ({count}): give {fitting[0]}")
        return self.group_size
