"""Help of commands as plain text: options in groups by task, flags whole on the left, their text on the right.

`HelpCommand` and `HelpGroup` are the `cls` of Typer's commands and groups. Terminals of 60 columns and more are filled
up to `MAX_WIDTH`.
"""

import shutil
import textwrap
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

MAX_WIDTH = 120
_FLAG_SHARE = 0.4  # of the width, at most: longer flags have their text below
_INDENT, _GAP = "  ", "  "

TALK, SERVE, MODELS, MEASURE = "Talk with a model", "Serve", "Models", "Measure"  # headings of `dispec --help`

# Most used first. Other groups follow; what has no group is general.
GROUPS = (
    *(TALK, SERVE, MODELS, MEASURE),
    *("Arguments", "Model", "Sampling", "Server", "Access", "Chat", "Memory", "Scheduling", "Speculation"),
    *("Compilation", "CPU and GPUs", "Several engines", "KV transfer", "Service levels", "Limits"),
)
_METAVARS = {  # by the names that Typer gives to types, in its versions
    **{"int": "N", "integer": "N", "float": "X", "str": "TEXT", "text": "TEXT"},
    **{"path": "PATH", "file": "PATH", "directory": "PATH"},
}


class _Row(NamedTuple):
    """left: lines that stay whole. text: wrapped to the right of them, or below if one of them is too long."""

    left: list[str]
    text: str


class HelpCommand(TyperCommand):
    """A command with this layout."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the command into click's formatter."""
        formatter.write(_help(self, ctx))


class HelpGroup(TyperGroup):
    """A group of commands with this layout, which shows its help if no command is given."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the group into click's formatter."""
        formatter.write(_help(self, ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments as click does; none at all ask for help."""
        return super().parse_args(ctx, args or ([] if ctx.resilient_parsing else ["--help"]))


def _help(command: Any, context: typer.Context) -> str:
    width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
    sections = _sections(command, context)
    longest = max(len(line) for rows in sections.values() for row in rows for line in row.left)
    column = min(longest, int(_FLAG_SHARE * width))
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    usage = ["Usage:", context.command_path, command.options_metavar]
    usage += [_name(one) if one.required else f"[{_name(one)}]" for one in arguments]
    usage.append(getattr(command, "subcommand_metavar", ""))
    parts = [_fill(" ".join(usage), width)]
    parts += [_fill(part, width) for part in (command.help or "").split("\n\n") if part]
    for title, rows in sections.items():
        body = "\n".join(line for row in rows for line in _lines(row, column, width))
        parts.append(f"{typer.style(f'{title}:', bold=True)}\n{body}")
    if closing := " ".join(_closing(command, context)):
        parts.append(_fill(closing, width))
    return "\n\n".join(parts)


def _fill(text: str, width: int) -> str:
    return "\n".join(_wrap(text, width))


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)  # which would cut flags


def _lines(row: _Row, column: int, width: int) -> Iterator[str]:
    indent = _INDENT + " " * column + _GAP
    text = _wrap(row.text, width - len(indent))
    left = row.left
    if max(map(len, left)) > column:
        yield from (f"{_INDENT}{line}" for line in left)
        left = []
    for flag, words in zip_longest(left, text, fillvalue=""):
        yield f"{_INDENT}{flag:<{column}}{_GAP}{words}".rstrip()


def _sections(command: Any, context: typer.Context) -> dict[str, list[_Row]]:
    found: dict[str, list[_Row]] = {title: [] for title in GROUPS}
    general = []
    for param in command.get_params(context):
        if param.hidden:
            continue
        if param.param_type_name == "argument":
            found["Arguments"].append(_Row([_name(param)], _text(param)))
        elif param.rich_help_panel is None:
            general.append(_Row(_flags(param, context), _text(param)))
        else:
            found.setdefault(param.rich_help_panel, []).append(_Row(_flags(param, context), _text(param)))
    if isinstance(command, TyperGroup):
        for name in command.list_commands(context):
            one: Any = command.get_command(context, name)
            if not one.hidden:
                found.setdefault(one.rich_help_panel or "Commands", []).append(_Row([name], _summary(one)))
    has_groups = any(rows for title, rows in found.items() if title != "Arguments")
    found["General" if has_groups else "Options"] = general
    return {title: rows for title, rows in found.items() if rows}


def _name(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _flags(option: Any, context: typer.Context) -> list[str]:
    """Return the lines of an option: "-m, --model TEXT", or "--compile" and "--no-compile"."""
    short = [name for name in option.opts if not name.startswith("--")]
    first, *aliases = [name for name in option.opts if name.startswith("--")]
    lines = [", ".join([*short, first]), *aliases]
    if option.is_flag:
        return lines + option.secondary_opts
    # The record is "-o, --option <int>" or "--option INTEGER RANGE".
    record = [word for word in option.get_help_record(context)[0].split() if not word.startswith("-")]
    metavar = option.metavar or (record[0] if record else "TEXT")
    bare = metavar.strip("<>").removeprefix("list[").removesuffix("]")
    return [f"{line} {_METAVARS.get(bare.lower(), bare)}" for line in lines]


def _text(param: Any) -> str:
    help_text = " ".join((param.help or "").split())
    default = param.default
    if isinstance(param.show_default, str):
        default = param.show_default
    elif param.required:
        return help_text if param.param_type_name == "argument" else f"{help_text} Required."
    elif not param.show_default or default in (None, False, "", (), []):
        return help_text
    shown = (
        ", ".join(map(str, default)) if isinstance(default, list | tuple) else str(getattr(default, "value", default))
    )
    return f"{help_text} Default: {'on' if default is True else shown}.".strip()


def _summary(command: Any) -> str:
    """Return the first sentence of a command's help."""
    text = " ".join((command.help or "").split())
    return text.partition(". ")[0].removesuffix(".")


def _closing(command: Any, context: typer.Context) -> Iterator[str]:
    """Yield where else the options can be set, with one of them as an example."""
    names = [param.name for param in command.params]
    example = next((name for name in ("max_num_seqs", "bits") if name in names), None)
    if context.auto_envvar_prefix is None or example is None:
        return
    variable = f"{context.auto_envvar_prefix}_{example.upper()}"
    yield f"Every option has an environment variable: {variable}=8 is --{example.replace('_', '-')} 8."
    if "config" in names:
        yield f"Keys of the file of --config are the options' names: {example} = 8."
        yield "Flags override variables, and variables override the file."
