// What the chat shows. The model's text reaches the document as HTML that the server made of its Markdown, in which
// HTML of the model is text; without the server it is shown as it is.

import { request } from "./stream.js";

const MIN_INTERVAL = 150; // milliseconds between two renderings of a text that streams
const PAUSE = 3; // a rendering is followed by a pause of this many times its duration
const AT_END = 40; // pixels from the end of the log that count as the end

const element = (id) => document.getElementById(id);
let followsEnd = true;

export function startView() {
  const log = element("messages");
  log.addEventListener("scroll", () => {
    followsEnd = log.scrollHeight - log.scrollTop - log.clientHeight < AT_END;
    element("chat-newest").hidden = followsEnd;
  });
  element("chat-newest").addEventListener("click", () => {
    scrollToEnd();
    element("chat-input").focus();
  });
  const observer = new ResizeObserver(() => followsEnd && scrollToEnd());
  for (const box of [log, element("turns")]) observer.observe(box);
}

export function scrollToEnd() {
  followsEnd = true;
  element("messages").scrollTop = element("messages").scrollHeight;
}

// Tells screen readers. The log itself is silent, because it changes with each token.
export function announce(text) {
  element("chat-status").textContent = text;
}

function make(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

function button(label, onClick) {
  const made = make("button", "quiet", label);
  made.type = "button";
  made.addEventListener("click", () => onClick(made));
  return made;
}

function copyButton(text) {
  return button("copy", async (made) => {
    const copied = await copy(text());
    made.textContent = copied ? "copied" : "not copied";
    setTimeout(() => (made.textContent = "copy"), 1500);
  });
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Browsers have no clipboard for pages of other machines without TLS: there the older command works.
    const area = make("textarea", "unseen", text);
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

class Markdown {
  constructor(box) {
    this._box = box;
    this._blocks = [];
    this._text = this._shown = "";
    this._isRunning = false;
  }

  show(text) {
    this._text = text;
    if (!this._shown) this._showPlain(text);
    this._tellBusy();
    if (!this._isRunning) this._run();
  }

  async _run() {
    this._isRunning = true;
    while (this._shown !== this._text) {
      const [text, start] = [this._text, performance.now()];
      try {
        const headers = { "Content-Type": "application/json" };
        const body = JSON.stringify({ text });
        this._showBlocks(await (await request("/dashboard/markdown", { method: "POST", headers, body })).json());
      } catch {
        this._showPlain(text);
      }
      this._shown = text;
      this._tellBusy();
      await new Promise((resolve) => setTimeout(resolve, Math.max(MIN_INTERVAL, PAUSE * (performance.now() - start))));
    }
    this._isRunning = false;
  }

  _tellBusy() {
    this._box.setAttribute("aria-busy", String(this._shown !== this._text));
  }

  _showPlain(text) {
    this._blocks = [];
    this._box.replaceChildren(make("div", "plain", text));
  }

  // Blocks that have not changed stay, and with them a selection of their text.
  _showBlocks(blocks) {
    if (this._blocks.length === 0) this._box.replaceChildren();
    const same = blocks.findIndex((block, index) => block !== this._blocks[index]);
    const first = same === -1 ? blocks.length : same;
    while (this._box.children.length > first) this._box.lastChild.remove();
    this._box.append(...blocks.slice(first).map(blockElement));
    this._blocks = blocks;
  }
}

function blockElement(block) {
  const box = make("div", "block");
  box.innerHTML = block;
  for (const pre of box.querySelectorAll("pre")) {
    const code = pre.textContent;
    const bar = make("div", "code-bar", make("span", "", pre.dataset.language ?? ""), copyButton(() => code));
    const frame = make("div", "code", bar);
    pre.replaceWith(frame);
    frame.append(pre);
  }
  return box;
}

// The elements of one turn. actions: { edit, regenerate } of the last turn.
export class TurnView {
  constructor(turn, actions) {
    this._turn = turn;
    this._reasoning = make("div", "plain");
    this._thoughts = make("details", "reasoning", make("summary", "", "Reasoning"), this._reasoning);
    this._thoughts.hidden = true;
    this._thoughts.querySelector("summary").addEventListener("click", () => (this._isToggled = true));
    const content = make("div", "content");
    this._markdown = new Markdown(content);
    this._error = make("p", "failed");
    this._statistics = make("span", "");
    this._copy = copyButton(() => this._turn.answer.content);
    this._regenerate = button("regenerate", actions.regenerate);
    this._edit = button("edit", actions.edit);
    const question = make("div", "text plain", turn.question);
    const forQuestion = make("div", "actions", copyButton(() => turn.question), this._edit);
    const forAnswer = make("div", "actions", this._copy, this._regenerate);
    this._note = make("div", "note", this._statistics, forAnswer);
    this.box = make(
      "article",
      "turn",
      make("div", "message user", make("h3", "unseen", "You"), question, forQuestion),
      make("div", "message assistant", make("h3", "unseen", "Model"), this._thoughts, content, this._error, this._note),
    );
    this.show(turn.answer);
  }

  // Shows an answer; `waiting` is what stands for one that has no text yet.
  show(answer, waiting = "") {
    const hasText = Boolean(answer.content || answer.reasoning);
    this.box.dataset.state = answer.state;
    this._markdown.show(answer.content);
    if (this._reasoning.textContent.length !== answer.reasoning.length) this._reasoning.textContent = answer.reasoning;
    this._thoughts.hidden = !answer.reasoning;
    const isThinking = answer.state === "running" && !answer.content;
    if (!this._isToggled) this._thoughts.open = isThinking;
    this._error.textContent = answer.error ?? "";
    this._error.hidden = !answer.error;
    const stopped = answer.state === "stopped" ? (hasText ? " · stopped" : "stopped") : "";
    this._statistics.textContent = waiting || answer.statistics + stopped;
    this._copy.hidden = !answer.content;
    this._regenerate.textContent = answer.error ? "retry" : "regenerate";
  }

  // Offers to edit the question and to generate the answer again, in the last turn while no answer streams.
  offer(isOffered) {
    this._edit.hidden = this._regenerate.hidden = !isOffered;
  }
}
