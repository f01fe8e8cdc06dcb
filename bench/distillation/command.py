"""`dispec distill`. The modules that train import torch, so they are imported when the command runs."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from dispec.bench.distillation.recipe import Recipe
from dispec.engine.option_fields import option_fields
from dispec.serving.cli.console import reporting, say
from dispec.serving.cli.option_groups import Debug, OptionGroup, engine_group, with_options

_RECIPE = OptionGroup(Recipe, "Recipe", tuple(name for name in option_fields(Recipe) if name != "layers"))
_TARGET = engine_group(max_num_seqs=32)._replace(names=("max_num_seqs", "device"))


@with_options(recipe=_RECIPE, engine=_TARGET)
def distill(
    target: Annotated[str, Argument(help="Model to make a draft for, as --model of other commands.")],
    layers: Annotated[int, Option(help=option_fields(Recipe)["layers"].option.help, rich_help_panel="Recipe")],
    out: Annotated[
        Path, Option(help="Directory of the draft; an interrupted run there is continued.", rich_help_panel="Recipe")
    ],
    prompts: Annotated[
        Path | None,
        Option(help="Text file with a prompt in each line.", show_default="a built-in set", rich_help_panel="Recipe"),
    ] = None,
    debug: Debug = False,
    *,
    recipe: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Make a draft model for --speculative-model: a few layers of the target, trained on what the target writes."""
    with reporting(quiet=False, debug=debug):
        from dispec.bench.distillation.distill import distill
        from dispec.bench.distillation.text import SEED_PROMPTS, read_prompts
        from dispec.engine.options import EngineOptions

        options = EngineOptions(**engine | {"model": target})
        agreement = distill(options, Recipe(layers=layers, **recipe), read_prompts(prompts or SEED_PROMPTS), out)
        say(f"{out}: its likeliest token is the target's {agreement.greedy:.1%} of the time")
