"""The dashboard in a real browser, against a real server."""

import json
import os
import re
import signal

import httpx
import psutil
import pytest

from tests.browser import CONTRASTS, NEEDS_CHROMIUM, Visit
from tests.checkpoints import save_tiny
from tests.running_server import serving, under_load

pytest_plugins = ["tests.browser"]
pytestmark = [NEEDS_CHROMIUM, pytest.mark.slow]
KEY = "secret-of-ours"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory, "llama")
    return directory


@pytest.fixture(scope="module")
def server(checkpoint):
    with serving(checkpoint) as server:
        yield server


def test_numbers_change_under_load_and_no_other_host_is_contacted(visit, server) -> None:
    view = visit(viewport={"width": 1400, "height": 3000})  # charts off the screen are not drawn
    view.open(server.url)
    view.until_text("#state", "^ready$")
    view.until_text("#model", "cpu.*float32")
    view.until_text("#pool-free", "^[1-9]")
    with under_load(server):
        for selector in ("#out-rate", "#in-rate", "#running", "#pool-used", "#pool-cached", "#hit-rate", "#kv-usage"):
            view.until_text(selector, "^[1-9]")
        for name in ("ttft", "itl", "e2e", "queue"):
            view.until_text(f"#{name}-median", r"^\d.* m?s$")
            view.until_text(f"#{name}-high", r"^\d.* m?s$")
        before = view.text("#out-rate")
        view.until("(before) => document.querySelector('#out-rate').textContent !== before", before)
        # The charts have data, and are drawn.
        for chart in ("output", "input", "ttft", "itl", "load", "finished", "e2e", "queue", "kv", "decode", "prefill"):
            has_data = "(id) => document.getElementById(id).data.some((trace) => trace.y.some((y) => y > 0))"
            view.until(has_data, f"chart-{chart}")
            assert view.page.locator(f"#chart-{chart} .main-svg").first.is_visible()
        view.until("() => document.querySelector('.state[data-state=decode]')")
        view.until("() => document.querySelector('.state[data-state=finished]')")
        states = view.page.locator("#requests-table .state").all_inner_texts()
        assert states == sorted(states, key=["decode", "prefill", "waiting", "finished"].index)
        cpu = "() => document.querySelector('#engines-table tbody').rows[1]?.cells[3].textContent"
        view.until(f"{cpu}.match(/^[1-9].* %/)")
    view.until_text("#running", "^0$")
    view.until_text("#out-rate", "^0$")
    assert not view.page.locator("#banner").is_visible()
    headers = view.page.locator("#requests-table th:visible").all_inner_texts()
    assert headers == ["ID", "State", "Age", "Prompt (cached)", "Output", "Queue, prefill, decode", "Finish"]
    assert all(url.startswith((f"{server.url}/", "data:")) for url in view.requests)
    assert view.problems == []


def test_the_time_range_is_chosen_by_keyboard_named_everywhere_and_remembered(visit, server) -> None:
    view = visit()
    view.open(server.url)
    view.until_text("#bucket", "^1 s buckets")
    view.page.focus("#ranges input:checked")
    view.page.keyboard.press("ArrowRight")
    view.until_text("#bucket", "^5 s buckets")
    assert view.page.locator("#ranges input:checked").get_attribute("value") == "10m"
    windows = view.page.locator("[data-window]").all_inner_texts()
    assert {text.replace("\xa0", " ") for text in windows} == {"last 10 min"}
    span = "() => { const [from, to] = document.getElementById('chart-output').layout.xaxis.range;"
    view.until(span + " return new Date(to) - new Date(from) === 600000; }")
    assert view.text("#state") == "ready"  # the page has not waited for a reconnection
    view.page.reload()
    view.until_text("#bucket", "^5 s buckets")
    answer = httpx.get(f"{server.url}/dashboard/events?range=2d")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "range is '2d', must be one of 1m, 10m, 1h"


def test_the_page_shows_the_states_of_engine_and_server(visit, checkpoint) -> None:
    view = visit()
    with serving(checkpoint, "--stall-seconds", "0.5", "--max-engine-restarts", "1") as server:
        view.open(server.url)
        view.until_text("#state", "^ready$")
        engine = _engine(server)
        os.kill(engine, signal.SIGSTOP)
        view.say("Hello?")
        view.until_text("#state", "^stalled$")
        view.until_text("#banner", "no progress: .*not ended a step")
        os.kill(engine, signal.SIGCONT)
        view.until_text("#state", "^ready$")
        assert not view.page.locator("#banner").is_visible()
        os.kill(engine, signal.SIGKILL)
        view.until_text("#state", "^restarting$")
        view.until_text("#banner", "died: .*SIGKILL.* It is being restarted")
        view.until_text("#state", "^ready$")
        os.kill(_engine(server), signal.SIGKILL)
        view.until_text("#state", "^dead$")  # no restart is left
        view.until_text("#banner", "ended by SIGKILL")
        assert server.process.wait(60) == 1
        port = int(server.url.rsplit(":", 1)[1])
    view.until_text("#banner", "The engine is dead: .*SIGKILL.*The server has ended")
    view.say("Hello again")
    view.until_text("#messages", "The server does not answer")
    with serving(checkpoint, port=port):
        view.until_text("#state", "^ready$")
        assert not view.page.locator("#banner").is_visible()
        view.page.context.set_offline(True)
    view.until_text("#banner", "does not answer.*Last event at")


def _engine(server) -> int:
    """The engine's process id: the renderer of Markdown is a child of the server too."""
    children = psutil.Process(server.process.pid).children()
    return next(child.pid for child in children if "dispec.engine.process.engine_loop" in child.cmdline())


def test_with_a_key_the_browser_asks_for_it_and_the_page_works(visit, checkpoint) -> None:
    with serving(checkpoint, "--api-key", KEY) as server:
        refused = httpx.get(f"{server.url}/dashboard")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic")
        view = visit(http_credentials={"username": "me", "password": KEY})
        view.open(server.url)
        view.until_text("#state", "^ready$")
        view.say("Hello")
        view.until("() => document.querySelector('.note')")


def test_the_page_itself_asks_for_a_key_and_keeps_it_in_the_tab(visit, server) -> None:
    """A key is needed though the page loaded without one: the server may have got a new key since."""
    view = visit()

    def guard(route) -> None:
        if route.request.headers.get("authorization") == f"Bearer {KEY}":
            route.continue_()
        else:
            error = {"error": {"message": "no", "type": "t", "param": None, "code": None}}
            route.fulfill(status=401, content_type="application/json", body=json.dumps(error))

    view.page.route(re.compile("/dashboard/events|/v1/"), guard)
    view.open(server.url)
    view.page.wait_for_selector("#key-form")
    view.page.fill("#key", "wrong")
    view.page.press("#key", "Enter")
    view.page.wait_for_selector("#key-error")
    view.page.fill("#key", KEY)
    view.page.press("#key", "Enter")
    view.until_text("#state", "^ready$")
    assert not view.page.locator("#key-form").is_visible()
    view.say("Hello")
    view.until("() => document.querySelector('.note')")
    stored = view.page.evaluate("Object.entries(sessionStorage)")
    assert [name for name, value in stored if KEY in value] == ["dispec-api-key"]
    assert KEY not in view.page.evaluate("JSON.stringify(localStorage) + document.cookie")
    assert not any("secret" in url for url in view.requests)


BACKGROUND = "getComputedStyle(document.body).backgroundColor"


def test_light_and_dark_follow_the_system_until_one_is_chosen(visit, server) -> None:
    view = visit(color_scheme="dark")
    view.open(server.url)
    dark = view.page.evaluate(BACKGROUND)
    view.page.emulate_media(color_scheme="light")
    view.until(f"(dark) => {BACKGROUND} !== dark", dark)
    light = view.page.evaluate(BACKGROUND)
    for expected in ("light", "dark"):
        view.page.click("#theme")
        assert view.text("#theme") == expected
        assert view.page.evaluate(BACKGROUND) == {"light": light, "dark": dark}[expected]
    view.page.reload()
    assert view.page.evaluate(BACKGROUND) == dark


def an_event(server, **changes) -> str:
    """The first event of the server without its requests and with other values, as the stream sends it."""
    with httpx.stream("GET", f"{server.url}/dashboard/events") as response:
        event = json.loads(next(response.iter_lines()).removeprefix("data: "))
    return f"data: {json.dumps(event | {'unfinished': [], 'ended': []} | changes)}\n\n"


def a_request(number: int, **fields) -> dict:
    usual = {"key": str(number), "id": f"chatcmpl-{number:032}", "state": "finished", "worker": None, "arrival": 0.0}
    usual |= {"prompt": 1200, "cached": 1024, "output": 300, "queue": 0.5, "prefill": 1.0, "decode": 2.5}
    return usual | {"reason": "stop", "error": None} | fields


def shows(view: Visit, server, event: str) -> None:
    """Open the page with this event alone."""
    stream = {"content_type": "text/event-stream", "body": event}
    view.page.route("**/dashboard/events*", lambda route: route.fulfill(**stream))
    view.open(server.url)
    view.until_text("#uptime", r"\d")


FAILED = a_request(3, state="error", reason="error", error="the request took longer than 60 s, which is the limit")
ROWS = [
    a_request(0, state="decode", reason=""),
    a_request(1, state="prefill", reason="", output=0, cached=0, decode=0.0),
    a_request(2, state="waiting", reason="", output=0, cached=0, prefill=0.0, decode=0.0),
]


@pytest.mark.parametrize("width", [320, 360, 414, 820, 1400])
def test_nothing_sticks_out_of_a_screen(visit, server, width) -> None:
    view = visit(viewport={"width": width, "height": 800})
    shows(view, server, an_event(server, unfinished=ROWS, ended=[FAILED]))
    view.page.wait_for_selector("#chart-output .main-svg")
    assert view.page.evaluate("document.documentElement.scrollWidth") <= width
    # No tile or cell cuts its text off; ids are cut, and whole in their title.
    cut = """() => [...document.querySelectorAll('.tile *, td, th, figcaption *, #toolbar *')]
        .filter((item) => item.scrollWidth > item.clientWidth + 1 && item.clientWidth && !item.closest('.id, .unseen'))
        .map((item) => item.outerHTML.slice(0, 80))"""
    assert view.page.evaluate(cut) == []
    if width > 1000:
        assert view.page.locator("#chat-send").bounding_box()["y"] < 800  # visible without scrolling
    else:
        view.page.click("nav a[href='#chat']")
        view.until("() => document.querySelector('#chat').getBoundingClientRect().top < 400")


def test_requests_are_told_by_state_in_words_and_colour(visit, server) -> None:
    view = visit()
    shows(
        view, server, an_event(server, unfinished=ROWS, ended=[FAILED], num_unfinished=120, num_ended=7, num_errors=1)
    )
    rows = view.page.locator("#requests-table tbody tr")
    assert rows.locator(".state").all_inner_texts() == ["decode", "prefill", "waiting", "error"]
    assert rows.nth(3).locator("td").last.inner_text() == f"error: {FAILED['error']}"
    colors = rows.locator(".state").evaluate_all("(items) => items.map((item) => getComputedStyle(item).color)")
    assert colors[0] == colors[1] == colors[2] != colors[3]
    assert rows.first.locator("[role=img]").get_attribute("aria-label") == "queue 500 ms, prefill 1.00 s, decode 2.50 s"
    widths = rows.first.locator(".phases i").evaluate_all(
        "(items) => items.map((item) => parseFloat(item.style.width))"
    )
    assert widths == pytest.approx([12.5, 25, 62.5])
    assert view.text("#requests-counts") == "120 unfinished, 7 ended, 1 with an error, 123 not shown"
    view.context.grant_permissions(["clipboard-read", "clipboard-write"])
    rows.first.locator("button.copy").click()
    view.until_text("button.copy", "copied")
    assert view.page.evaluate("navigator.clipboard.readText()") == ROWS[0]["id"]


def test_workers_have_rows_with_their_roles(visit, server) -> None:
    def engine(name: str, state: str, used: int) -> dict:
        counts = {"role": name.split()[0], "pid": 7, "running": 2, "waiting": 1, "cpu": 97.6, "memory": 3 * 2**30}
        pool = {"used": used, "cached": 10, "free": 90 - used, "total": 100}
        return {"name": name, "state": state, "pool": pool, "gpu_used": 2**34, "gpu_total": 2**36} | counts

    process = {"name": "server", "role": None, "state": None, "pid": 6, "cpu": None, "memory": None}
    engines = [process, engine("prefill 0", "ready", 30), engine("decode 1", "restarting", 5)]
    view = visit()
    shows(view, server, an_event(server, unfinished=[a_request(0, worker="decode 1")], engines=engines))
    cells = view.page.locator("#engines-table tbody tr").nth(1).locator("td").all_inner_texts()
    assert cells == ["prefill 0", "ready", "7", "98 %", "3.0 GiB", "16.0 GiB of 64.0 GiB", "2", "1", "30 %"]
    assert "decode 1" in view.page.locator("#requests-table tbody tr").first.locator("td").all_inner_texts()


def test_a_pool_of_100_000_blocks_is_a_picture_of_a_thousand_cells(visit, server) -> None:
    view = visit(viewport={"width": 1400, "height": 3000})
    pool = {"used": 30_000, "cached": 150, "free": 69_850, "total": 100_000}
    event = an_event(server, pool=pool, points=[], steps=[])
    assert len(event) < 3000
    shows(view, server, event)
    cells = view.page.evaluate("async (pool) => (await import('/dashboard/pool.js')).poolCells(pool)", pool)
    assert cells == {"perCell": 100, "count": 1000, "used": 300, "cached": 2}
    assert "100,000 blocks of 32 tokens, each cell 100" in view.text("#pool-scale")
    # The picture has those cells: the colours of its first, 301st and last one.
    pixels = """() => {
        const canvas = document.getElementById('pool'), context = canvas.getContext('2d');
        const found = new Map();
        const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
        for (let at = 0; at < data.length; at += 4) {
            if (data[at + 3] < 255) continue;
            const color = [...data.slice(at, at + 3)].join();
            found.set(color, (found.get(color) ?? 0) + 1);
        }
        return [...found.values()].sort((one, other) => one - other);
    }"""
    cached, used, free = view.page.evaluate(pixels)
    assert used / cached == 150
    assert free / used == pytest.approx(698 / 300)


# For each element with text of its own: the contrast of its colour with what lies behind it, as WCAG 2 computes it.


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(visit, server, scheme) -> None:
    view = visit(color_scheme=scheme, viewport={"width": 1400, "height": 3000})
    shows(view, server, an_event(server, unfinished=ROWS, ended=[FAILED], state="dead", reason="an example"))
    view.page.wait_for_selector("#chart-output .xtick text")
    view.page.evaluate("() => { document.getElementById('key-form').hidden = false; }")
    contrasts = view.page.evaluate(CONTRASTS)
    said = " ".join(name for name, _ in contrasts)
    for expected in ("B 0", "SPAN error", "text ", "P The engine is dead", "BUTTON Send", "A API docs", "TEXTAREA"):
        assert expected in said
    assert {name: round(ratio, 2) for name, ratio in contrasts if ratio < 4.5} == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_marks_in_charts_have_enough_contrast(visit, server, scheme) -> None:
    view = visit(color_scheme=scheme)
    view.open(server.url)
    ratios = view.page.evaluate("""() => {
        const value = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
        const part = (byte) => (byte /= 255) <= 0.04045 ? byte / 12.92 : ((byte + 0.055) / 1.055) ** 2.4;
        const luminance = (hex) => [1, 3, 5].reduce((sum, at, index) =>
            sum + [0.2126, 0.7152, 0.0722][index] * part(parseInt(hex.slice(at, at + 2), 16)), 0.05);
        const ratio = (one, other) => Math.max(one / other, other / one);
        const names = ['decode', 'prefill', 'cached', 'queue', 'faint', 'error', 'good'];
        return Object.fromEntries(names.map((name) => [name, ratio(luminance(value(name)), luminance(value('card')))]));
    }""")
    assert {name: ratio for name, ratio in ratios.items() if ratio < 3} == {}


def test_the_page_works_by_keyboard_and_shows_the_focus(visit, server) -> None:
    view = visit()
    shows(view, server, an_event(server, unfinished=ROWS))
    view.page.wait_for_selector("#requests-scroll")
    described = """() => {
        const item = document.activeElement, style = getComputedStyle(item);
        const next = item.nextElementSibling;
        const ring = style.outlineStyle !== 'none' ? style : getComputedStyle(next ?? item);
        const name = item.id || item.getAttribute('href') || item.className || item.value || item.tagName;
        return [item.type === 'radio' ? item.name : name, ring.outlineStyle !== 'none' || item.className === 'skip'];
    }"""
    order = []
    for _ in range(14):
        view.page.keyboard.press("Tab")
        name, has_ring = view.page.evaluate(described)
        assert has_ring, f"{name} does not show the focus"
        order.append(name)
    links = ["#requests", "#chat", "/docs", "/metrics", "theme", "range", "requests-scroll"]
    assert order[:7] == links
    assert order[7:10] == ["quiet copy"] * 3
    assert order[10:] == ["chat-expand", "messages", "muted", "chat-input"]
    view.page.locator(".skip").first.focus()
    view.page.keyboard.press("Enter")
    view.page.keyboard.press("Tab")
    assert view.page.evaluate("document.activeElement.id") == "requests-scroll"


def test_acceptance_of_drafts_is_shown_where_there_are_drafts(visit, server) -> None:
    view = visit()
    view.open(server.url)
    view.until_text("#accepted-length", "^no drafts$")
    event = json.loads(an_event(server).removeprefix("data: "))
    speculation = {"speculation": {"rate": 0.625, "accepted_per_draft": 2.5}}
    view = visit()
    shows(view, server, an_event(server, summary=event["summary"] | speculation))
    view.until_text("#acceptance", "^63 %$")
    view.until_text("#accepted-length", "^2.50 tokens per draft$")


def test_without_plotly_there_are_numbers_tables_and_a_way_to_get_charts(visit, server) -> None:
    view = visit()
    view.page.route("**/dashboard/plotly.js", lambda route: route.fulfill(status=404))
    view.open(server.url)
    view.until_text("#pool-free", r"^\d")
    assert 'pip install "dispec[serve]"' in view.text("#no-charts")
    assert view.page.locator("figure:visible").count() == 1  # the KV cache's blocks
    assert server.completion("a request to show", 5).status_code == 200
    view.until("() => document.querySelector('#requests-table tbody').rows.length > 0")
    assert view.page.locator("#engines-table tbody tr").count() == 2
