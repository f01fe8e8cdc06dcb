"""Markdown of a model to HTML: what it may contain, and the process that renders it."""

import asyncio
import os
import signal
from html.parser import HTMLParser

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from litestar.testing import TestClient

from dispec.serving.api.app import create_app
from dispec.serving.dashboard.markdown import MAX_HIGHLIGHTED, render_blocks
from dispec.serving.dashboard.markdown_process import MAX_TEXT, MAX_WAITING, MarkdownProcess
from dispec.serving.dashboard.routes_dashboard import dashboard_router
from dispec.serving.http.errors import ApiError
from dispec.serving.observability.metrics import Metrics
from dispec.serving.settings import ServerSettings
from tests.hostile_texts import HOSTILE
from tests.scripted_engine import ScriptedEngine, thinking_tokenizer

TAGS = set("p br hr em strong s a code pre span h1 h2 h3 h4 h5 h6 ul ol li".split())  # noqa: SIM905
TAGS |= {"blockquote", "table", "thead", "tbody", "tr", "th", "td"}
ATTRIBUTES = {
    "a": {"href", "title", "data-host", "target", "rel"},
    "pre": {"data-language"},
    "span": {"class"},
    "ol": {"start"},
    "th": {"style"},
    "td": {"style"},
}


class Checker(HTMLParser):
    """Collects text and links, and fails for what may do harm."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.links: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert tag in TAGS
        assert set(given) <= ATTRIBUTES.get(tag, set())
        assert given.get("style") in (None, "text-align:left", "text-align:center", "text-align:right")
        if tag == "a":
            assert (given["href"] or "").split(":")[0] in ("http", "https", "mailto")
            assert (given["rel"], given["target"]) == ("noopener noreferrer", "_blank")
            self.links.append(given)
        if tag not in ("br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("br", "hr"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    handle_decl = handle_pi = unknown_decl = handle_comment


def checked(text: str) -> list[Checker]:
    return [Checker(block) for block in render_blocks(text)]


def shown(text: str) -> str:
    return "".join(part for block in checked(text) for part in block.texts)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_become_harmless_html(text: str) -> None:
    checked(text)


PIECES = st.sampled_from(
    ["<", ">", "&", '"', "'", "`", "```", "~~~", "\n", "\n\n", "[", "](", ")", "!", "*", "**", "_", "|", "-", "> ",
     "# ", "1. ", "- ", "    ", "\t", "\\", "\0", "javascript:", "data:", "http://", "//", "a", "é", "&lt;", "&#60;",
     "&#x3c", "<script>", "<img src=x onerror=a>", "<a href='", "onclick=", "[a]: ", "<!--", "-->", "<![CDATA[", "<?",
     ":", "@"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=40).map("".join))
@settings(max_examples=400, deadline=None)
def test_no_text_becomes_anything_but_allowed_html(text: str) -> None:
    checked(text)


def test_html_of_the_model_is_shown_as_text() -> None:
    assert shown("a <b>bold</b> <script>x()</script>").strip() == "a <b>bold</b> <script>x()</script>"
    assert shown("<div>\n\n*x*\n\n</div>").split() == ["<div>", "x", "</div>"]


@pytest.mark.parametrize(
    ("text", "href", "host"),
    [
        ("[x](https://example.com/a?b=1)", "https://example.com/a?b=1", "example.com"),
        ("[x](http://google.com@evil.example/)", "http://google.com@evil.example/", "evil.example"),
        ("<https://example.com>", "https://example.com", "example.com"),
        ("[x](mailto:a@example.com)", "mailto:a@example.com", "a@example.com"),
        ('[x][r]\n\n[r]: http://example.com "told otherwise"', "http://example.com", "example.com"),
        ("![alt](http://example.com/a.png)", "http://example.com/a.png", "example.com"),
    ],
)
def test_a_link_shows_where_it_leads(text: str, href: str, host: str) -> None:
    (link,) = [link for block in checked(text) for link in block.links]
    assert (link["href"], link["title"], link["data-host"]) == (href, href, host)


@pytest.mark.parametrize(
    "url", ["/stats", "stats", "?a", "#a", "//evil.example", "javascript:a", "http:a", "http:///a", "ftp://a"]
)
def test_other_links_are_text(url: str) -> None:
    assert shown(f"[x]({url})").strip() == f"[x]({url})"


def test_blocks_are_the_top_level_of_the_text() -> None:
    text = "# a\n\nb\nc\n\n- d\n- e\n\n> f\n\n---\n\n```\ng\n```\n\n|h|\n|-|\n|i|\n"
    blocks = render_blocks(text)
    assert [block.split(">")[0].lstrip("<").split()[0] for block in blocks] == [
        "h1", "p", "ul", "blockquote", "hr", "pre", "table",
    ]  # fmt: skip
    assert "b<br />\nc" in blocks[1]
    # The blocks before the last are those of the text without it: a page keeps them while an answer streams.
    assert render_blocks(text + "\n\nmore")[:-1] == blocks


def test_code_is_highlighted_where_the_language_is_known_and_the_code_is_short() -> None:
    code = "def f():\n    return 1 < 2\n"
    (block,) = render_blocks(f"```python\n{code}```")
    assert '<span class="hl-k">def</span>' in block
    assert shown(f"```python\n{code}```").rstrip() == code.rstrip()
    (unknown,) = render_blocks("```no-such-language\n1 < 2\n```")
    assert unknown.strip() == '<pre data-language="no-such-language"><code>1 &lt; 2\n</code></pre>'
    (long,) = render_blocks(f"```python\n{'x = 1 ' * (MAX_HIGHLIGHTED // 6 + 1)}\n```")
    assert "<span" not in long


async def _rendered(process: MarkdownProcess, text: str) -> list[str]:
    return msgspec.json.decode(await process.render(text), type=list[str])


def test_the_process_renders_texts_and_one_that_hangs_is_replaced() -> None:
    text = "# a\n\n\u2028 é 🦊 \0 b"

    async def main() -> None:
        renderer = MarkdownProcess(timeout=60)
        assert await _rendered(renderer, text) == render_blocks(text)
        first = renderer._process
        assert await _rendered(renderer, "b") == render_blocks("b")
        assert renderer._process is first
        os.kill(first.pid, signal.SIGSTOP)
        renderer._timeout = 0.05
        with pytest.raises(ApiError, match=r"could not be rendered in 0.05 s") as raised:
            await renderer.render("c")
        assert raised.value.status == 503
        assert await first.wait() == -signal.SIGKILL
        renderer._timeout = 60
        assert await _rendered(renderer, "d") == render_blocks("d")
        # A reader that leaves takes the text's result with it: the next text must not get it.
        task = asyncio.create_task(renderer.render("e"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await _rendered(renderer, "f") == render_blocks("f")
        second = renderer._process
        second.stdin.close()
        assert await second.wait() == 0

    asyncio.run(main())


def test_texts_that_wait_are_bounded() -> None:
    async def main() -> None:
        renderer = MarkdownProcess(timeout=60)
        tasks = [asyncio.create_task(renderer.render("a")) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match=f"{MAX_WAITING} texts are waiting") as raised:
            await renderer.render("b")
        assert raised.value.status == 503
        assert len(set(await asyncio.gather(*tasks))) == 1
        assert await _rendered(renderer, "c") == render_blocks("c")
        renderer._process.stdin.close()
        assert await renderer._process.wait() == 0

    asyncio.run(main())


def test_the_route_needs_the_key_and_bounds_the_text() -> None:
    engine = ScriptedEngine(thinking_tokenizer())
    settings = ServerSettings(api_key=("key",))
    path, key = "/dashboard/markdown", {"Authorization": "Bearer key"}
    with TestClient(create_app(engine, settings, Metrics("tiny"), dashboard_router(engine))) as http:
        answer = http.post(path, json={"text": "*a* <b>"}, headers=key)
        assert (answer.status_code, answer.json()) == (200, ["<p><em>a</em> &lt;b&gt;</p>\n"])
        assert answer.headers["cache-control"] == "no-store"
        assert http.post(path, json={"text": "a"}).status_code == 401
        assert http.post(path, json={"text": "a"}, headers=key | {"Sec-Fetch-Site": "cross-site"}).status_code == 403
        assert http.post(path, json={"text": "a" * (MAX_TEXT + 1)}, headers=key).status_code == 400
        assert http.post(path, json={"text": "a" * 2**20}, headers=key).status_code == 413
        assert http.post(path, json={"text": 1}, headers=key).status_code == 400
        assert http.get(path, headers=key).status_code in (404, 405)
