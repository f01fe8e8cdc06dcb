"""Chromium for tests of pages.

A plugin of the tests that use it. PYTEST_DONT_REWRITE: they import it before it is one.
"""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
PATIENCE = 120  # seconds after which a condition counts as never coming

CONTRASTS = """() => {
    const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return { r, g, b, a }; };
    const part = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const luminance = ({ r, g, b }) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
    const behind = (item) => {
        for (; item; item = item.parentElement) {
            const color = parse(getComputedStyle(item).backgroundColor);
            if (color.a === 1) return color;
        }
    };
    const found = [];
    for (const item of document.querySelectorAll('body *')) {
        const hasText = [...item.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (!(hasText || item.placeholder) || !item.checkVisibility({ opacityProperty: true })) continue;
        const style = getComputedStyle(item, item.placeholder ? '::placeholder' : null);
        const color = parse(item instanceof SVGElement ? style.fill : style.color);
        const [one, other] = [luminance(color), luminance(behind(item))].sort((a, b) => b - a);
        const text = (item.textContent || item.placeholder).trim().slice(0, 30);
        found.push([`${item.tagName} ${text}`, (one + 0.05) / (other + 0.05)]);
    }
    return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    # No host name resolves; only the server's address is reachable.
    arguments = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


class Visit:
    """An open page, its requests, and its errors."""

    def __init__(self, browser: Any, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.context.set_default_timeout(PATIENCE * 1000)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))

    def open(self, url: str) -> None:
        self.page.goto(f"{url}/dashboard")

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def until(self, condition: str, argument: object = None) -> None:
        """Wait until a JavaScript function returns a true value."""
        self.page.wait_for_function(condition, arg=argument)

    def until_text(self, selector: str, pattern: str) -> None:
        self.until(
            "([selector, pattern]) => new RegExp(pattern).test(document.querySelector(selector)?.textContent ?? '')",
            [selector, pattern],
        )

    def say(self, text: str) -> None:
        self.page.fill("#chat-input", text)
        self.page.press("#chat-input", "Enter")


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    visits: list[Visit] = []

    def start(**context: Any) -> Visit:
        visits.append(Visit(browser, **context))
        return visits[-1]

    yield start
    for visit in visits:
        visit.context.close()
