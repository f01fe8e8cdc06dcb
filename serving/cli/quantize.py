"""`dispec quantize`. The modules that quantise import torch, so they are imported when the command runs."""

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from dispec.engine.compression.recipe import Recipe
from dispec.engine.loading.default_model import DEFAULT_MODEL
from dispec.serving.cli.completion import complete_model
from dispec.serving.cli.console import reporting, say
from dispec.serving.cli.option_groups import Debug, Quiet

_DEFAULTS = Recipe()


def quantize(
    model: Annotated[
        str,
        Argument(
            help="Model to quantise, as --model of other commands.", autocompletion=complete_model([DEFAULT_MODEL])
        ),
    ],
    out: Annotated[Path, Option(help="Directory of the quantised model, new or empty.")],
    method: Annotated[
        str, Option(help="gptq: least error on a text; rtn: round to the nearest.", metavar="<gptq|rtn>")
    ] = _DEFAULTS.method,
    bits: Annotated[int, Option(help="4 or 8.")] = _DEFAULTS.bits,
    group_size: Annotated[
        int | None,
        Option(help="Columns that share a scale: 32, 64 or 128.", show_default="the largest that divides all matrices"),
    ] = None,
    calibration: Annotated[
        Path | None, Option(help="UTF-8 text for gptq.", show_default="the topics of Python's help")
    ] = None,
    act_order: Annotated[
        bool, Option(help="Quantise the columns with the largest inputs first.")
    ] = _DEFAULTS.act_order,
    num_samples: Annotated[int, Option(help="Pieces of the text to calibrate on.")] = _DEFAULTS.num_samples,
    sample_length: Annotated[int, Option(help="Tokens in each piece.")] = _DEFAULTS.sample_length,
    device: Annotated[str | None, Option(help="cpu, cuda or cuda:N.", show_default="cuda if there is one")] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model with matrices of 4 or 8 bits, in a format that transformers loads too."""
    with reporting(quiet=quiet, debug=debug):
        recipe = Recipe(method, bits, group_size, act_order, num_samples, sample_length)
        from dispec.engine.compression.quantize_model import quantize_model
        from dispec.engine.machine.torch_threads import set_threads
        from dispec.engine.options import EngineOptions

        options = EngineOptions(model=model, device=device)
        set_threads(options.num_threads())
        shows = not quiet and sys.stderr.isatty()
        quantize_model(model, recipe, calibration, out, options.torch_device(), show_progress=shows)
        if not quiet:
            say(f"{out}: {bits} bits by {method}")
