"""How a draft model is made: the options of `dispec distill`. No torch: the command line reads them."""

from dataclasses import dataclass
from typing import Annotated

from dispec.engine.option_fields import Option, check_fields, with_declared_fields


@with_declared_fields
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a draft model is made. Raises InvalidField with the option, its value and the limit."""

    layers: Annotated[int, Option("Number of the target's layers that the draft starts from.", ge=1)]
    num_tokens: Annotated[
        int, Option("Tokens of answers that the target writes as training text.", ge=1, aliases=("tokens",))
    ] = 1_000_000
    epochs: Annotated[int, Option("Times to train on each token.", ge=1)] = 3
    batch_tokens: Annotated[int, Option("Tokens of a training step.", ge=1)] = 4096
    learning_rate: Annotated[float, Option("Highest learning rate.", gt=0, le=1)] = 1e-3
    own_embedding: Annotated[bool, Option("Train embedding and head as well, instead of borrowing the target's.")] = (
        False
    )
    head_tokens: Annotated[
        int,
        Option("Number of tokens, the most frequent ones, that a borrowed head can propose; 0 is all.", ge=0),
    ] = 8192
    max_tokens: Annotated[int, Option("Most tokens of an answer.", ge=1)] = 256

    def __post_init__(self) -> None:
        check_fields(self)
