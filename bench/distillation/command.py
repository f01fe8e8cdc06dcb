"""`dispec distill`. The modules that train import torch, so they are imported when the command runs."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from dispec.serving.cli.console import reporting, say
from dispec.serving.cli.option_groups import Debug


def distill(
    target: Annotated[str, Argument(help="Model to make a draft for, as --model of other commands.")],
    layers: Annotated[int, Option(help="Number of the target's layers that the draft starts from.")],
    out: Annotated[Path, Option(help="Directory of the draft; an interrupted run there is continued.")],
    prompts: Annotated[
        Path | None, Option(help="Text file with a prompt in each line.", show_default="a built-in set")
    ] = None,
    tokens: Annotated[int, Option(help="Tokens of answers that the target writes as training text.")] = 1_000_000,
    epochs: Annotated[int, Option(help="Times to train on each token.")] = 3,
    batch_tokens: Annotated[int, Option(help="Tokens of a training step.")] = 4096,
    learning_rate: Annotated[float, Option(help="Highest learning rate.")] = 1e-3,
    own_embedding: Annotated[
        bool,
        Option("--own-embedding", help="Train embedding and head as well, instead of borrowing the target's."),
    ] = False,
    head_tokens: Annotated[
        int, Option(help="Number of tokens, the most frequent ones, that a borrowed head can propose; 0 is all.")
    ] = 8192,
    max_tokens: Annotated[int, Option(help="Most tokens of an answer.")] = 256,
    max_num_seqs: Annotated[int, Option(help="Answers that the target writes at once.")] = 32,
    device: Annotated[str | None, Option(help="cpu, cuda or cuda:N.", show_default="cuda if there is one")] = None,
    debug: Debug = False,
) -> None:
    """Make a draft model for --speculative-model: a few layers of the target, trained on what the target writes."""
    with reporting(quiet=False, debug=debug):
        from dispec.bench.distillation.distill import Recipe, distill
        from dispec.bench.distillation.text import SEED_PROMPTS, read_prompts
        from dispec.engine.options import EngineOptions

        recipe = Recipe(
            layers=layers,
            num_tokens=tokens,
            epochs=epochs,
            batch_tokens=batch_tokens,
            learning_rate=learning_rate,
            shares_embedding=not own_embedding,
            head_tokens=head_tokens,
            max_tokens=max_tokens,
        )
        options = EngineOptions(model=target, device=device, max_num_seqs=max_num_seqs)
        agreement = distill(options, recipe, read_prompts(prompts or SEED_PROMPTS), out)
        say(f"{out}: its likeliest token is the target's {agreement.greedy:.1%} of the time")
