"""The dashboard's chat in a real browser, on an engine that answers what each test says."""

import json
from pathlib import Path

import pytest

from dispec.engine.option_fields import option_fields
from dispec.engine.sampling_params import SamplingParams
from dispec.serving.client.errors import EngineDied
from tests.browser import CONTRASTS, NEEDS_CHROMIUM, Visit
from tests.hostile_texts import HOSTILE
from tests.paced_engine import PacedEngine, served
from tests.scripted_engine import MAX_MODEL_LEN, thinking_tokenizer
from tests.servers import wait_for

pytest_plugins = ["tests.browser"]
pytestmark = [NEEDS_CHROMIUM, pytest.mark.slow]
CODE = "def double(x):\n    return 2 * x"
ANSWER = f"Use **this**:\n\n```python\n{CODE}\n```\n\n- a\n- b\n"
LAST = ".turn:last-child"


@pytest.fixture(scope="module")
def server():
    engine = PacedEngine(thinking_tokenizer())
    with served(engine) as url:
        yield engine, url


@pytest.fixture
def engine(server):
    engine, _ = server
    engine.outputs, engine.num_allowed, engine.failure, engine.is_loading = [], None, None, False
    yield engine
    engine.num_allowed = None


@pytest.fixture
def chat(server, engine, visit):
    def start(*outputs: str, **context: object) -> Visit:
        engine.outputs += outputs
        view = visit(**context)
        view.page.route("**/dashboard/plotly.js", lambda route: route.fulfill(body=""))  # the charts take time
        view.open(server[1])
        view.page.wait_for_function("() => document.querySelector('#chat-temperature').placeholder")
        return view

    return start


def until_state(view: Visit, state: str, turns: int = 1) -> None:
    """Wait until the last turn, of so many, has a state, and its Markdown has been rendered."""
    view.until(
        "([state, count]) => { const turns = document.querySelectorAll('.turn');"
        " const last = turns[turns.length - 1];"
        " return turns.length === count && last.dataset.state === state"
        "   && !last.querySelector('[aria-busy=true]')"
        "   && document.querySelector('#chat-send').textContent !== 'Stop'; }",
        [state, turns],
    )


def ask(view: Visit, question: str, turns: int = 1, state: str = "done") -> None:
    view.say(question)
    until_state(view, state, turns)


def content(view: Visit, turn: str = LAST) -> str:
    return view.text(f"{turn} .content").strip()


def test_an_answer_is_markdown_with_its_counts_and_can_be_copied(chat, server) -> None:
    view = chat(ANSWER, permissions=["clipboard-read", "clipboard-write"])
    ask(view, "How do I double?")
    assert view.text(f"{LAST} .content strong") == "this"
    assert view.page.locator(f"{LAST} .content li").all_inner_texts() == ["a", "b"]
    assert view.text(f"{LAST} .code pre").strip() == CODE
    assert view.text(f"{LAST} .code-bar span") == "python"
    colors = "(names) => new Set(names.map((n) => getComputedStyle(document.querySelector(n)).color)).size"
    assert view.page.evaluate(colors, [".hl-k", ".hl-nf", ".hl-mi", ".code pre"]) == 4
    count = len(server[0].tokenizer.encode(ANSWER, add_special_tokens=False)) + 1
    assert view.text(f"{LAST} .note").startswith(f"{count} tokens · ")
    for part in ("tokens/s", "TTFT", f"prompt {len(server[0].requests[-1].prompt_token_ids)} tokens"):
        assert part in view.text(f"{LAST} .note")
    for button, copied in (
        (".code-bar button", f"{CODE}\n"),
        (".note button", ANSWER),
        (".user button", "How do I double?"),
    ):
        view.page.locator(f"{LAST} {button}").first.click()
        view.until("async (text) => (await navigator.clipboard.readText()).trimEnd() === text.trimEnd()", copied)
    assert {url.split("/dashboard")[0].split("/v1")[0].split("/model_info")[0] for url in view.requests} - {
        "data:,"
    } == {server[1]}
    assert view.problems == []


def test_hostile_texts_run_load_and_send_nothing(chat, server, engine) -> None:
    view = chat(f"<think>\n{HOSTILE[1]}\n</think>\n\n{HOSTILE[0]}")
    ask(view, HOSTILE[1])
    assert view.text(f"{LAST} .user .text") == HOSTILE[1]
    assert view.page.locator(f"{LAST} .reasoning .plain").text_content() == HOSTILE[1]
    # The others are in turns of their own, because one text may end another's effect.
    view.page.evaluate(
        "(texts) => { const chat = JSON.parse(sessionStorage.getItem('dispec-chat')); const [turn] = chat.turns;"
        " chat.turns = texts.map((content) => ({ ...turn, answer: { ...turn.answer, content } }));"
        " addEventListener('pagehide', () => sessionStorage.setItem('dispec-chat', JSON.stringify(chat))); }",
        HOSTILE,
    )
    view.page.reload()
    until_state(view, "done", len(HOSTILE))
    view.until("() => !document.querySelector('[aria-busy=true]')")
    forbidden = (
        "script, img, svg, iframe, object, style, link, base, form, input, math, [onerror], [onclick], [onfocus]"
    )
    assert view.page.locator("#turns").locator(forbidden).count() == 0
    links = view.page.locator("#turns a")
    assert links.count() == 3
    assert all(link.get_attribute("rel") == "noopener noreferrer" for link in links.all())
    assert {link.get_attribute("data-host") for link in links.all()} == {"evil.example"}
    assert view.page.evaluate("window.hit") is None
    assert all(url.startswith((server[1], "data:")) for url in view.requests)
    assert view.problems == []


def test_the_policy_of_the_page_stops_what_a_renderer_might_let_through(chat, server) -> None:
    """The second line of defence: HTML that reaches the document all the same neither runs nor loads."""
    view = chat("x")
    blocked: list[tuple[str, str | None]] = []
    view.page.on("requestfailed", lambda request: blocked.append((request.url, request.failure)))
    html = "<p><img src='https://evil.example/a.png' onerror='window.hit=1'><a onclick='window.hit=1'>x</a></p>"
    view.page.route("**/dashboard/markdown", lambda route: route.fulfill(json=[html]))
    ask(view, "x")
    view.page.click(f"{LAST} .content a")
    assert view.page.evaluate("window.hit") is None
    assert blocked == [("https://evil.example/a.png", "csp")]
    assert len([problem for problem in view.problems if "Content Security Policy" in problem]) >= 2


def test_an_answer_streams_is_stopped_and_generated_again(chat, engine) -> None:
    view = chat("One two three four five six", "Another", "More")
    engine.num_allowed = 2
    view.say("Count")
    view.until_text(f"{LAST} .note span", r"^2 tokens")
    engine.num_allowed = 4
    view.until_text(f"{LAST} .note span", r"^4 tokens · .*tokens/s · TTFT [\d.]+ m?s$")
    view.until_text(f"{LAST} .content", "One tw")
    assert view.text("#chat-send") == "Stop"
    assert not view.page.locator(f"{LAST} .note button:text-is('regenerate')").is_visible()
    part = content(view)
    view.page.press("#chat-input", "Enter")  # sends nothing, and ends nothing
    view.page.fill("#chat-input", "the next question")
    view.page.press("#chat-input", "Escape")
    until_state(view, "stopped")
    assert content(view) == part
    assert "stopped" in view.text(f"{LAST} .note")
    assert view.page.input_value("#chat-input") == "the next question"
    wait_for(lambda: engine.load == 0)
    engine.num_allowed = 0
    view.page.click(f"{LAST} .note button:text-is('regenerate')")
    view.until_text(f"{LAST} .note", r"waiting for the first token · \d")
    assert content(view) == part  # until there is something new
    engine.num_allowed = None
    until_state(view, "done")
    assert content(view) == "Another"
    assert engine.prompt.count("Count") == 1
    assert part not in engine.prompt
    view.page.press("#chat-input", "Enter")
    until_state(view, "done", 2)
    assert "Count" in engine.prompt
    assert "Another" in engine.prompt


def test_reasoning_is_open_while_it_streams_and_folds_away(chat, engine) -> None:
    view = chat("<think>\nLet me think about it.\n</think>\n\nYes.", "No.")
    engine.num_allowed = 8
    view.say("Is it?")
    view.until("() => document.querySelector('.reasoning').open")
    view.until_text(f"{LAST} .reasoning .plain", "Let")
    engine.num_allowed = None
    until_state(view, "done")
    assert content(view) == "Yes."
    assert not view.page.locator(f"{LAST} .reasoning .plain").is_visible()
    view.page.click(f"{LAST} .reasoning summary")
    assert view.text(f"{LAST} .reasoning .plain") == "Let me think about it."
    ask(view, "And now?", 2)
    assert "Let me think" not in engine.prompt
    assert view.page.locator(f"{LAST} .reasoning").is_hidden()


def test_a_reload_keeps_chat_and_settings_and_a_new_chat_forgets_them(chat, server, engine) -> None:
    view = chat(ANSWER, "Second")
    view.page.click("#chat-settings summary")
    view.page.fill("#chat-system", "Be brief.")
    view.page.fill("#chat-seed", "7")
    ask(view, "First question")
    view.page.evaluate("sessionStorage.setItem('dispec-api-key', 'secret-of-ours')")
    view.page.reload()
    until_state(view, "done")
    assert view.text(f"{LAST} .content strong") == "this"
    assert "tokens/s" in view.text(f"{LAST} .note")
    ask(view, "Second question", 2)
    assert "Be brief." in engine.prompt
    assert "First question" in engine.prompt
    assert engine.params.seed == 7
    assert "secret-of-ours" not in view.page.evaluate("sessionStorage.getItem('dispec-chat')")
    assert view.page.evaluate("Object.keys(localStorage)") == []
    view.page.click("#chat-clear")
    assert view.page.locator(".turn").count() == 0
    view.page.reload()
    view.page.wait_for_selector("#chat-empty")
    assert view.page.locator(".turn").count() == 0
    assert view.page.input_value("#chat-seed") == "7"


def test_a_reload_in_mid_stream_keeps_the_part_that_came(chat, engine) -> None:
    view = chat("One two three four", "Again")
    engine.num_allowed = 4
    view.say("Count")
    view.until_text(f"{LAST} .content", "One tw")
    view.page.reload()
    until_state(view, "failed")
    assert content(view).startswith("One")
    assert "closed before the answer ended" in view.text(f"{LAST} .failed")
    engine.num_allowed = None
    view.page.click(f"{LAST} .note button:text-is('retry')")
    until_state(view, "done")
    assert content(view) == "Again"


def test_without_room_in_the_browser_the_chat_goes_on_and_says_so(chat) -> None:
    view = chat("First", "Second")
    view.page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; }"
    )
    ask(view, "a")
    assert "no room" in view.text("#chat-unsaved")
    ask(view, "b", 2)
    assert content(view) == "Second"
    assert view.problems == []


def test_the_last_question_can_be_edited(chat, engine) -> None:
    view = chat("First", "Second", "Third")
    ask(view, "a question")
    ask(view, "a misstake", 2)
    assert view.page.locator("button:text-is('edit'):visible").count() == 1
    view.page.click("button:text-is('edit'):visible")
    assert view.page.input_value("#chat-input") == "a misstake"
    view.page.press("#chat-input", "Escape")
    assert view.page.input_value("#chat-input") == ""
    assert view.page.locator(".turn").count() == 2
    view.page.click("button:text-is('edit'):visible")
    ask(view, "without mistake", 2)
    assert "misstake" not in engine.prompt
    assert "a question" in engine.prompt
    assert content(view) == "Third"


def test_settings_reach_the_engine_and_wrong_ones_are_not_sent(chat, engine) -> None:
    view = chat("One two three", "b")
    ask(view, "a")
    assert (engine.params.temperature, engine.params.top_p, engine.params.seed) == (1.0, 1.0, None)
    assert engine.params.max_tokens > MAX_MODEL_LEN // 2
    view.page.click("#chat-settings summary")
    for name, value in {"temperature": "0.25", "top-p": "0.5", "max-tokens": "3", "seed": "-5"}.items():
        view.page.fill(f"#chat-{name}", value)
    engine.outputs = ["One two three four five"]
    ask(view, "b", 2)
    assert (engine.params.temperature, engine.params.top_p) == (0.25, 0.5)
    assert (engine.params.max_tokens, engine.params.seed) == (3, -5)
    assert "ended at the limit of tokens" in view.text(f"{LAST} .note")
    count = len(engine.requests)
    for name, value, said in (
        ("top-p", "1.5", "Top p: a number between 0.000001 and 1"),
        ("max-tokens", str(MAX_MODEL_LEN + 1), f"Maximum tokens: a whole number between 1 and {MAX_MODEL_LEN}"),
        ("seed", "1.5", "Seed: a whole number between"),
    ):
        before = view.page.input_value(f"#chat-{name}")
        view.page.fill(f"#chat-{name}", value)
        view.say("c")
        assert view.text("#chat-wrong").startswith(said)
        assert view.page.evaluate("document.activeElement.id") == f"chat-{name}"
        view.page.fill(f"#chat-{name}", before)
        assert not view.page.locator("#chat-wrong").is_visible()
    assert (len(engine.requests), view.page.locator(".turn").count()) == (count, 2)
    assert view.page.input_value("#chat-input") == "c"


def test_defaults_are_those_that_the_server_tells(chat) -> None:
    view = chat()
    shown = (
        "['temperature', 'top-p', 'max-tokens', 'seed'].map((n) => document.querySelector(`#chat-${n}`).placeholder)"
    )
    assert view.page.evaluate(shown) == ["1", "1", "all that fit", "random"]
    info = view.page.evaluate("fetch('/model_info').then((response) => response.json())")
    info["preferred_sampling_params"] = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    view.page.route("**/model_info", lambda route: route.fulfill(json=info))
    view.page.reload()
    view.until("() => document.querySelector('#chat-temperature').placeholder === '0.6'")
    assert view.page.evaluate(shown) == ["0.6", "0.9", "all that fit", "random"]


def test_limits_of_the_form_are_those_of_the_server() -> None:
    page = Path(__file__).parents[1].joinpath("serving/dashboard/page/index.html").read_text()
    options = option_fields(SamplingParams)
    temperature, top_p = options["temperature"].option, options["top_p"].option
    assert f'id="chat-temperature" type="number" min="{temperature.ge}" max="{temperature.le}"' in page
    assert (top_p.gt, top_p.le) == (0, 1)
    assert 'id="chat-top-p" type="number" min="0.000001" max="1"' in page
    assert f'id="chat-max-tokens" type="number" min="{options["max_tokens"].option.ge}"' in page
    assert f'max="{2**53 - 1}"' in page  # of the seed: a larger number is not exact in JavaScript
    assert options["seed"].option.le >= 2**53 - 1


def test_a_loading_server_a_dead_engine_and_a_lost_network_lose_nothing(chat, engine) -> None:
    view = chat("One two three four", "One two three four", "At last")
    engine.is_loading = True
    ask(view, "Hello?", state="failed")
    assert "the model is being loaded" in view.text(f"{LAST} .failed")
    assert view.text(f"{LAST} .user .text") == "Hello?"
    engine.is_loading, engine.num_allowed = False, 4
    view.page.click(f"{LAST} .note button:text-is('retry')")
    view.until_text(f"{LAST} .content", "One tw")
    part = content(view)
    engine.failure = EngineDied("the engine process ended with code -9")
    until_state(view, "failed")
    assert content(view) == part
    assert "the engine process ended with code -9" in view.text(f"{LAST} .failed")
    engine.failure = None
    view.context.set_offline(True)
    view.page.click(f"{LAST} .note button:text-is('retry')")
    view.until_text(f"{LAST} .failed", "The server does not answer")
    assert content(view) == part
    view.context.set_offline(False)
    engine.num_allowed = None
    engine.outputs = ["At last"]
    view.page.click(f"{LAST} .note button:text-is('retry')")
    until_state(view, "done")
    assert content(view) == "At last"
    assert not view.page.locator(f"{LAST} .failed").is_visible()


def test_a_connection_that_closes_early_is_an_error(chat, engine) -> None:
    view = chat("unused")
    chunk = {"choices": [{"delta": {"content": "A part"}, "finish_reason": None}]}
    body = f"data: {json.dumps(chunk)}\n\n"
    view.page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    ask(view, "x", state="failed")
    assert content(view) == "A part"
    assert "incomplete" in view.text(f"{LAST} .failed")


def test_an_unknown_key_asks_for_one_and_the_question_stays(chat) -> None:
    view = chat("Hello")
    error = {"error": {"message": "an API key is needed", "type": "t", "param": None, "code": None}}
    view.page.route("**/v1/chat/completions", lambda route: route.fulfill(status=401, json=error))
    view.say("Hello?")
    view.page.wait_for_selector("#key-form:visible")
    view.until_text(f"{LAST} .failed", "API key")
    view.page.unroute("**/v1/chat/completions")
    view.page.click(f"{LAST} .note button:text-is('retry')")
    until_state(view, "done")
    assert content(view) == "Hello"


def test_what_no_longer_fits_the_context_is_left_out_and_marked(chat, engine) -> None:
    view = chat("First answer", "Second answer", "Third answer", "Fourth answer")
    words = "words and more words "
    long = words * (2500 // len(engine.tokenizer.encode(words)))  # three leave no room for an answer
    ask(view, f"first {long}")
    ask(view, f"second {long}", 2)
    assert "first " in engine.prompt
    assert view.page.locator(".turn.forgotten").count() == 0
    ask(view, f"third {long}", 3)
    assert "first " not in engine.prompt
    assert "third " in engine.prompt
    assert len(engine.requests[-1].prompt_token_ids) <= MAX_MODEL_LEN * 3 // 4
    kept = 3 - view.page.locator(".turn.forgotten").count()
    assert engine.prompt.count("<|im_start|>user") == kept
    line = "getComputedStyle(document.querySelector('.first-sent'), '::before').content"
    assert "no longer fits" in view.page.evaluate(line)
    # A question that does not fit alone: the server's sentence, and a way on.
    count = len(engine.requests)
    ask(view, long * 12, 4, state="failed")
    assert str(MAX_MODEL_LEN) in view.text(f"{LAST} .failed")
    assert len(engine.requests) == count
    view.page.click("button:text-is('edit'):visible")
    ask(view, "short", 4)
    assert content(view) == "Fourth answer"


def test_the_log_follows_the_end_only_when_it_is_there(chat, engine) -> None:
    view = chat("line\n\n" * 60, viewport={"width": 1200, "height": 700})
    log = "const log = document.querySelector('#messages')"
    at_end = f"() => {{ {log}; return log.scrollHeight - log.scrollTop < log.clientHeight + 2; }}"
    overflows = f"() => {{ {log}; return log.scrollHeight > 1.3 * log.clientHeight; }}"
    engine.num_allowed = 160
    view.say("Lines")
    view.until_text(f"{LAST} .note span", "^160 tokens")
    view.until("() => !document.querySelector('[aria-busy=true]')")
    view.until(overflows)
    view.until(at_end)
    view.page.wait_for_selector("#chat-newest", state="hidden")
    view.page.evaluate("document.querySelector('#messages').scrollTop = 10")
    view.page.wait_for_selector("#chat-newest:visible")
    engine.num_allowed = None
    until_state(view, "done")
    assert view.page.evaluate("document.querySelector('#messages').scrollTop") == 10
    view.page.click("#chat-newest")
    view.until(at_end)
    view.page.wait_for_selector("#chat-newest", state="hidden")
    # The input stays where it was.
    box = view.page.locator("#chat-send").bounding_box()
    log = view.page.locator("#messages").bounding_box()
    assert log["y"] + log["height"] <= box["y"]


def test_everything_works_from_the_keyboard(chat, engine) -> None:
    view = chat(ANSWER, "Again")
    page = view.page
    page.focus("#chat-input")
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    until_state(view, "done")
    assert view.text(f"{LAST} .user .text") == "two\nlines"
    assert page.evaluate("document.activeElement.id") == "chat-input"
    page.focus("#chat-expand")
    page.keyboard.press("Enter")
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        if page.evaluate("document.activeElement === document.body || !document.activeElement.closest('#chat')"):
            break
    for name in ("messages", "copy", "edit", "regenerate", "Reasoning", "settings", "chat-input", "chat-send"):
        assert name in reached or name == "Reasoning", reached
    assert reached.count("copy") == 3
    assert "theme" not in reached  # what is behind
    page.focus("#chat-input")
    page.keyboard.press("Escape")
    assert page.locator("#chat.expanded").count() == 0
    page.focus("#chat button:text-is('regenerate')")
    page.keyboard.press("Enter")
    view.until_text(f"{LAST} .content", "Again")
    until_state(view, "done")


def test_screen_readers_hear_an_answer_once(chat, engine) -> None:
    view = chat("A short answer.")
    view.page.evaluate(
        "() => { window.said = []; const status = document.querySelector('#chat-status');"
        " new MutationObserver(() => said.push(status.textContent)).observe(status, { childList: true }); }"
    )
    ask(view, "x")
    view.until("() => said.at(-1) === 'A short answer.'")
    assert view.page.evaluate("said") == ["The model answers.", "A short answer."]
    assert view.page.get_attribute("#messages", "aria-live") == "off"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_enough_contrast(chat, engine, scheme) -> None:
    """WCAG AA: 4.5 to 1."""
    code = "```python\n# c\n@a\nclass A:\n  '''d'''\n  b = 1\n```\n"
    more = f"\n> quoted\n\n[a](http://example.com)\n\n|h|\n|-|\n|`c`|\n\n{code}"
    view = chat("<think>\nhm\n</think>\n\n" + ANSWER + more, "x", color_scheme=scheme)
    ask(view, "a")
    view.page.click(f"{LAST} .reasoning summary")
    view.page.click("#chat-settings summary")
    engine.is_loading = True
    ask(view, "b", 2, state="failed")
    contrasts = view.page.evaluate(CONTRASTS)
    said = " ".join(name for name, _ in contrasts)
    for expected in ("SPAN class", "SPAN # c", "SPAN '''d", "SPAN @a", "P the model", "A a", "TH h", "P quoted"):
        assert expected in said
    assert {name: round(ratio, 2) for name, ratio in contrasts if ratio < 4.5} == {}


@pytest.mark.parametrize("width", [320, 390, 1400])
def test_wide_content_scrolls_inside_and_the_chat_can_fill_the_window(chat, width) -> None:
    wide = f"```\n{'x' * 300}\n```\n\n|{'a|' * 30}\n|{'-|' * 30}\n|{'b|' * 30}\n\n{'y' * 300}\n\n`{'z' * 300}`\n"
    view = chat(wide, viewport={"width": width, "height": 700})
    ask(view, "w" * 300)
    for _ in range(2):
        assert view.page.evaluate("document.documentElement.scrollWidth") <= width
        assert view.page.evaluate(
            "document.querySelector('#messages').scrollWidth <= document.querySelector('#messages').clientWidth"
        )
        view.page.click("#chat-expand")
    view.page.click("#chat-expand")
    box = view.page.locator("#chat").bounding_box()
    assert (box["x"], box["y"], box["width"], box["height"]) == (0, 0, width, 700)


def test_a_table_of_the_model_is_one_on_a_phone(chat) -> None:
    """The page's own tables turn into cards there."""
    view = chat("|a|b|\n|-|-|\n|1|2|\n", viewport={"width": 390, "height": 800})
    ask(view, "x")
    boxes = [view.page.locator(f"{LAST} {cell}").bounding_box() for cell in ("th >> nth=1", "td >> nth=1")]
    assert boxes[0]["x"] == boxes[1]["x"] > 0
    assert boxes[0]["width"] == boxes[1]["width"]
    assert (
        view.page.locator(f"{LAST} td").first.evaluate("(cell) => getComputedStyle(cell, '::before').content") == "none"
    )


def test_without_the_renderer_the_text_is_shown_as_it_is(chat) -> None:
    view = chat(ANSWER)
    view.page.route("**/dashboard/markdown", lambda route: route.fulfill(status=503, body="{}"))
    view.say("x")
    view.until_text("#chat-send", "Send")
    view.until_text(f"{LAST} .content .plain", "- b")
    assert view.page.locator(f"{LAST} .content .plain").text_content() == ANSWER


def test_a_chat_can_be_saved(chat) -> None:
    view = chat(ANSWER)
    ask(view, "How?")
    view.page.click("#chat-settings summary")
    view.page.fill("#chat-system", "Be brief.")
    with view.page.expect_download() as download:
        view.page.click("#chat-json")
    messages = [("system", "Be brief."), ("user", "How?"), ("assistant", ANSWER)]
    expected = [{"role": role, "content": text} for role, text in messages]
    assert json.loads(Path(download.value.path()).read_text()) == {"messages": expected}
    with view.page.expect_download() as download:
        view.page.click("#chat-markdown")
    text = Path(download.value.path()).read_text()
    assert text == f"## System\n\nBe brief.\n\n## You\n\nHow?\n\n## Model\n\n{ANSWER}\n"
