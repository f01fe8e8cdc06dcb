"""The dashboard in a real browser, against a real server."""

import json
import os
import re
import shutil
import signal

import httpx
import pytest

from tests.checkpoints import save_tiny
from tests.running_server import PATIENCE, serving, under_load

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
    pytest.mark.slow,
]
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


@pytest.fixture(scope="module")
def browser():
    # No host name resolves; only the server's address is reachable.
    arguments = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


class Visit:
    """An open page, its requests, and its errors."""

    def __init__(self, browser, **context) -> None:
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
def visit(browser):
    visits = []

    def start(**context) -> Visit:
        visits.append(Visit(browser, **context))
        return visits[-1]

    yield start
    for visit in visits:
        visit.context.close()


def test_numbers_change_under_load_and_no_other_host_is_contacted(visit, server) -> None:
    view = visit()
    view.open(server.url)
    view.until_text("#state", "^ready$")
    view.until_text("#model", "cpu.*float32")
    view.until_text("#pool-free", "^[1-9]")
    with under_load(server):
        for selector in ("#out-rate", "#in-rate", "#running", "#pool-used", "#pool-cached", "#hit-rate"):
            view.until_text(selector, "^[1-9]")
        for selector in ("#ttft-median", "#ttft-high", "#gap-median", "#gap-high"):
            view.until_text(selector, r"^\d.* m?s$")
        before = view.text("#out-rate")
        view.until("(before) => document.querySelector('#out-rate').textContent !== before", before)
        # The charts have data, and are drawn.
        for chart, trace in (("out", 0), ("in", 1), ("load", 0), ("ttft", 1), ("gap", 1), ("steps", 0), ("steps", 1)):
            view.until(
                "([id, n]) => document.getElementById(id).data[n].y.some((y) => y > 0)", [f"chart-{chart}", trace]
            )
        for chart in ("out", "in", "ttft", "gap", "load", "steps", "pool", "requests"):
            assert view.page.locator(f"#chart-{chart} .main-svg").first.is_visible()
        kinds = "() => new Set(document.getElementById('chart-pool').data[0].z.flat())"
        view.until(f"() => ({kinds})().has(0) && ({kinds})().has(1)")
        phases = view.page.evaluate("document.getElementById('chart-requests').data.map((trace) => trace.name)")
        assert phases == ["queue", "prefill", "decode"]
    view.until_text("#running", "^0$")
    view.until_text("#out-rate", "^0$")
    assert not view.page.locator("#speculation").is_visible()
    assert not view.page.locator("#banner").is_visible()
    assert {url.split("/dashboard")[0] for url in view.requests if not url.startswith("data:")} == {server.url}
    assert view.problems == []


def test_the_chat_box_shows_the_models_answer_as_text(visit, server) -> None:
    view = visit()
    view.open(server.url)
    view.page.locator("summary").click()
    view.page.fill("#chat-temperature", "0")
    view.page.fill("#chat-max-tokens", "24")
    question = "<img src=x onerror=alert(1)> & <b>bold</b>"
    messages = [{"role": "user", "content": question}]
    for turn in (1, 2):
        view.say(messages[-1]["content"])
        view.until("(turn) => document.querySelectorAll('.note').length === turn", turn)
        body = {"messages": messages, "temperature": 0, "max_tokens": 24}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE).json()
        said = answer["choices"][0]["message"]["content"]
        assert view.page.locator(".message.assistant").nth(turn - 1).text_content() == said
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "and then?"}]
    assert view.page.locator(".message.user").first.text_content() == question
    assert view.page.locator("#messages img, #messages b").count() == 0
    assert "24 tokens" in view.text(".note >> nth=0")
    view.page.click("#chat-clear")
    assert view.page.locator(".message").count() == 0
    assert view.problems == []


def test_an_answer_can_be_stopped_and_a_rejected_question_returns_to_the_input(visit, server) -> None:
    view = visit()
    view.open(server.url)
    view.page.locator("summary").click()
    view.page.fill("#chat-max-tokens", "400")
    view.say("Talk for long")
    view.until("() => document.querySelector('.message.assistant')?.textContent")
    view.page.click("#chat-send")
    view.until_text("#chat-send", "^Send$")
    view.until_text("#running", "^0$")
    too_much = "far too much to say " * 400
    view.say(too_much)
    view.until_text(".message.failed", "max_model_len")
    assert view.page.input_value("#chat-input") == too_much.strip()
    assert view.page.locator(".message.user").count() == 1


def test_the_page_shows_the_states_of_engine_and_server(visit, checkpoint) -> None:
    view = visit()
    with serving(checkpoint, "--stall-seconds", "0.5", "--max-engine-restarts", "1") as server:
        view.open(server.url)
        view.until_text("#state", "^ready$")
        engine = _children(server.process.pid)[0]
        os.kill(engine, signal.SIGSTOP)
        view.say("Hello?")
        view.until_text("#state", "^stalled$")
        view.until_text("#banner", "no step ends.*not ended a step")
        os.kill(engine, signal.SIGCONT)
        view.until_text("#state", "^ready$")
        assert not view.page.locator("#banner").is_visible()
        os.kill(engine, signal.SIGKILL)
        view.until_text("#state", "^restarting$")
        view.until_text("#banner", "being restarted")
        view.until_text("#state", "^ready$")
        os.kill(_children(server.process.pid)[0], signal.SIGKILL)
        view.until_text("#state", "^unreachable$")  # the server has ended: no restart is left
        assert server.process.wait(60) == 1
        port = int(server.url.rsplit(":", 1)[1])
    view.until_text("#banner", "does not answer.*Last event at")
    view.say("Hello again")
    view.until_text("#messages", "The server does not answer")
    with serving(checkpoint, port=port):
        view.until_text("#state", "^ready$")


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


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
    assert view.page.evaluate("Object.values(sessionStorage)") == [KEY]
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


@pytest.mark.parametrize("width", [320, 390, 820, 1400])
def test_nothing_sticks_out_of_a_screen(visit, server, width) -> None:
    view = visit(viewport={"width": width, "height": 800})
    view.open(server.url)
    assert server.completion("a request to show", 5).status_code == 200
    view.page.wait_for_selector("#chart-requests .main-svg")
    assert view.page.evaluate("document.documentElement.scrollWidth") <= width
    # The chat box is visible without scrolling.
    assert view.page.locator("#chat-send").bounding_box()["y"] < 800


def test_acceptance_of_drafts_is_shown_where_there_are_drafts(visit, server) -> None:
    with httpx.stream("GET", f"{server.url}/dashboard/events") as response:
        event = json.loads(next(response.iter_lines()).removeprefix("data: "))
    event["speculation"] = {"rate": 0.625, "accepted_per_draft": 2.5}
    view = visit()
    body = f"data: {json.dumps(event)}\n\n"
    view.page.route("**/dashboard/events", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    view.open(server.url)
    view.until_text("#acceptance", "^63 %$")
    view.until_text("#accepted-length", "^2.50$")


def test_without_plotly_there_are_numbers_and_a_way_to_get_charts(visit, server) -> None:
    view = visit()
    view.page.route("**/dashboard/plotly.js", lambda route: route.fulfill(status=404))
    view.open(server.url)
    view.until_text("#pool-free", r"^\d")
    assert 'pip install "dispec[serve]"' in view.text("#no-charts")
    assert view.page.locator("figure.card:visible").count() == 1  # how to send a request
