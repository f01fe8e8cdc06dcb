"""Markdown to HTML for the chat. Run as a module, a loop that renders lines of JSON from its standard input.

The text comes from a model and is not trusted: HTML in it is shown as text, a link has one of three schemes and shows
its host, and an image is only a link, because loading one would tell its host.
"""

import html
import os
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from urllib.parse import urlsplit

import msgspec
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

MAX_HIGHLIGHTED = 20_000  # characters of a code block; a longer one has no colours
_MAX_LANGUAGE = 40  # characters
_SCHEMES = ("http", "https", "mailto")
_NICENESS = 10  # the engine's threads go first
_FORMATTER = HtmlFormatter(nowrap=True, classprefix="hl-")


def render_blocks(text: str) -> list[str]:
    """Return the HTML of each top-level block of a text, so that a page replaces only the blocks that have changed."""
    environment: EnvType = {}
    tokens = _MARKDOWN.parse(text, environment)
    render = _MARKDOWN.renderer.render
    return [render(block, _MARKDOWN.options, environment) for block in _top_level(tokens)]


def _top_level(tokens: Sequence[Token]) -> Iterator[Sequence[Token]]:
    start = 0
    for index, token in enumerate(tokens):
        if token.level == 0 and token.nesting <= 0:
            yield tokens[start : index + 1]
            start = index + 1


def _is_safe_link(url: str) -> bool:
    """Return whether a link is absolute and of a known scheme: one without a host would lead to this server."""
    try:
        parts = urlsplit(url)
        return parts.scheme in _SCHEMES and bool(parts.scheme == "mailto" or parts.hostname)
    except ValueError:
        return False


def _open_link(renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    token = tokens[index]
    url = str(token.attrs["href"])
    parts = urlsplit(url)
    token.attrs = {
        "href": url,
        "title": url,
        "data-host": parts.hostname or parts.path,
        "target": "_blank",
        "rel": "noopener noreferrer",
    }
    return renderer.renderToken(tokens, index, options, env)


def _code(code: str, language: str, attributes: str) -> str:
    """Return the HTML of a fenced code block, with classes of colours where the language is known."""
    name = language[:_MAX_LANGUAGE]
    shown = _highlighted(code, name) if len(code) <= MAX_HIGHLIGHTED else None
    return f'<pre data-language="{html.escape(name)}"><code>{shown or html.escape(code)}</code></pre>'


@lru_cache(maxsize=64)  # while an answer streams, its finished code blocks come again with each rendering
def _highlighted(code: str, language: str) -> str | None:
    try:
        return highlight(code, get_lexer_by_name(language, stripnl=False), _FORMATTER)
    except ClassNotFound:
        return None


def _make_markdown() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": True, "highlight": _code})
    markdown.enable(["table", "strikethrough"]).disable("image")
    markdown.validateLink = _is_safe_link  # type: ignore[method-assign]
    markdown.add_render_rule("link_open", _open_link)
    return markdown


_MARKDOWN = _make_markdown()


def main() -> None:
    """Render each line, a JSON string, as a line of JSON, a list of strings, until the input ends."""
    os.nice(_NICENESS)
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(msgspec.json.encode(render_blocks(msgspec.json.decode(line, type=str))) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
