"""The `dispec` command, also `python -m dispec`: the commands that run models, and the tools of `dispec.bench`."""

from dispec.bench.cli import bench
from dispec.bench.distillation.command import distill
from dispec.serving.cli.chat.command import chat
from dispec.serving.cli.commands import COMMAND, app, run
from dispec.serving.cli.help_layout import MEASURE, MODELS, TALK
from dispec.serving.cli.models import models, pull, rm
from dispec.serving.cli.quantize import quantize

app.command(rich_help_panel=TALK, **COMMAND)(chat)
app.command("run", rich_help_panel=TALK, help=f"The same as `dispec chat`. {chat.__doc__}", **COMMAND)(chat)
for command in (models, pull, rm, quantize, distill):
    app.command(rich_help_panel=MODELS, **COMMAND)(command)
app.add_typer(bench, rich_help_panel=MEASURE)


def main(args: list[str] | None = None) -> None:
    """Run the command line; `args` are those of the process if None."""
    run(args)


if __name__ == "__main__":
    main()
