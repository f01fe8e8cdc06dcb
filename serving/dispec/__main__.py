"""The `dispec` command, also `python -m dispec`: the commands that run models, and the tools of `dispec.bench`."""

from dispec.bench.cli import PASSES_OPTIONS_ON, bench
from dispec.bench.distillation.command import distill
from dispec.serving.cli.commands import FROM_ENVIRONMENT, app, run
from dispec.serving.cli.quantize import quantize

app.command(context_settings=FROM_ENVIRONMENT)(quantize)
app.command(context_settings=FROM_ENVIRONMENT)(distill)
app.command(context_settings=PASSES_OPTIONS_ON, add_help_option=False)(bench)


def main(args: list[str] | None = None) -> None:
    """Run the command line; `args` are those of the process if None."""
    run(args)


if __name__ == "__main__":
    main()
