// The chat: what the user can do, and one answer at a time.

import { explain, firstTurnThatFits, streamAnswer } from "./chat_answer.js";
import { asJson, asMarkdown, clear, conversation, messagesFrom, newAnswer, save } from "./chat_history.js";
import { findWrongField, forgetDefaults, loadDefaults, samplingFields, startSettings, systemPrompt } from "./chat_settings.js";
import { announce, scrollToEnd, startView, TurnView } from "./chat_view.js";
import { HttpError } from "./stream.js";

const TICK = 250; // milliseconds between two showings of the time spent waiting
const MAX_ANNOUNCED = 600; // characters of an answer that a screen reader reads out when it ends

const element = (id) => document.getElementById(id);
const views = [];
let running = null; // the AbortController of the answer that streams
let isLeaving = false; // the browser aborts the answer: it is saved as one that streams
let isEditing = false; // the input replaces the last question
let onUnauthorized = () => {};

export function startChat(unauthorized) {
  onUnauthorized = unauthorized;
  startView();
  startSettings();
  for (const turn of conversation.turns) addView(turn);
  showState();
  scrollToEnd();
  element("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else submit();
  });
  element("chat-input").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) submit();
  });
  element("chat").addEventListener("keydown", escape);
  element("chat-clear").addEventListener("click", startAnew);
  element("chat-expand").addEventListener("click", () => expand(!isExpanded()));
  element("chat-markdown").addEventListener("click", () => download("chat.md", "text/markdown", asMarkdown(systemPrompt())));
  element("chat-json").addEventListener("click", () => download("chat.json", "application/json", asJson(systemPrompt())));
  addEventListener("pagehide", () => {
    isLeaving = true;
    save();
  });
}

function escape(event) {
  if (event.key !== "Escape" || event.isComposing) return;
  if (running) running.abort();
  else if (isEditing) stopEditing();
  else if (isExpanded()) expand(false);
}

function submit() {
  const input = element("chat-input");
  const question = input.value.trim();
  const wrong = findWrongField();
  if (wrong) {
    element("chat-settings").open = true;
    wrong.focus();
  } else if (question) {
    if (isEditing) removeLastTurn();
    stopEditing();
    const turn = { question, answer: newAnswer() };
    conversation.turns.push(turn);
    addView(turn);
    input.focus();
    answerLastTurn();
  }
}

function addView(turn) {
  const view = new TurnView(turn, { edit: startEditing, regenerate: answerLastTurn });
  views.push(view);
  element("turns").append(view.box);
}

function removeLastTurn() {
  conversation.turns.pop();
  conversation.firstSent = Math.min(conversation.firstSent, Math.max(0, conversation.turns.length - 1));
  views.pop().box.remove();
}

function startEditing() {
  isEditing = true;
  element("chat-input").value = conversation.turns.at(-1).question;
  element("chat-input").focus();
  showState();
}

function stopEditing() {
  isEditing = false;
  element("chat-input").value = "";
  showState();
}

// Generates the answer of the last turn. One that it had stays until the first token of the new one, and if none comes.
async function answerLastTurn() {
  if (running) return;
  const [turn, view, abort] = [conversation.turns.at(-1), views.at(-1), new AbortController()];
  const answer = newAnswer();
  const start = performance.now();
  const show = () => view.show(turn.answer, answer === turn.answer && hasText(answer) ? "" : waitingFor(start));
  let frame = null;
  const onChange = () => {
    turn.answer = answer;
    frame ??= requestAnimationFrame(() => {
      frame = null;
      show();
    });
  };
  if (!hasText(turn.answer)) turn.answer = answer;
  turn.answer.error = null;
  running = abort;
  const timer = setInterval(show, TICK);
  show();
  showState();
  scrollToEnd();
  announce("The model answers.");
  try {
    await generate(answer, { signal: abort.signal, onChange });
    answer.state = "done";
    if (!hasText(answer)) turn.answer = answer;
  } catch (error) {
    end(turn, answer, error);
  } finally {
    clearInterval(timer);
    running = running === abort ? null : running;
  }
  if (conversation.turns.includes(turn)) {
    view.show(turn.answer);
    finish(turn.answer);
  }
}

async function generate(answer, { signal, onChange }) {
  const fields = samplingFields();
  const system = systemPrompt();
  const maxModelLen = await loadDefaults(signal);
  const limits = { system, maxTokens: fields.max_tokens, maxModelLen, signal };
  conversation.firstSent = await firstTurnThatFits(conversation.turns, conversation.firstSent, limits);
  showState();
  await streamAnswer(messagesFrom(conversation.firstSent, system), fields, answer, { signal, onChange });
}

function end(turn, answer, error) {
  if (isLeaving) return;
  const ended = hasText(answer) ? answer : turn.answer;
  const isStopped = error.name === "AbortError";
  Object.assign(ended, { state: isStopped ? "stopped" : "failed", error: isStopped ? null : explain(error) });
  if (error instanceof HttpError && error.status === 401) onUnauthorized();
  if (!isStopped) forgetDefaults();
}

function finish(answer) {
  showState();
  const said = answer.content.length <= MAX_ANNOUNCED ? answer.content : "The answer is complete.";
  announce(answer.error ?? (answer.state === "stopped" ? "Stopped." : said));
  element("chat-unsaved").hidden = save();
}

const hasText = (answer) => Boolean(answer.content || answer.reasoning);
const waitingFor = (start) => `waiting for the first token · ${((performance.now() - start) / 1000).toFixed(1)} s`;

function startAnew() {
  running?.abort();
  running = null;
  clear();
  views.length = 0;
  element("turns").replaceChildren();
  element("chat-unsaved").hidden = true;
  stopEditing();
  announce("New chat.");
  element("chat-input").focus();
}

function showState() {
  const { turns, firstSent } = conversation;
  const send = element("chat-send");
  send.textContent = running ? "Stop" : isEditing ? "Replace" : "Send";
  send.classList.toggle("stop", running !== null);
  element("chat-clear").hidden = element("chat-export").hidden = turns.length === 0;
  element("chat-empty").hidden = turns.length > 0;
  views.forEach((view, index) => {
    view.offer(index === views.length - 1 && !running);
    view.box.classList.toggle("edited", isEditing && index === views.length - 1);
    view.box.classList.toggle("forgotten", index < firstSent);
    view.box.classList.toggle("first-sent", index === firstSent && firstSent > 0);
  });
}

const isExpanded = () => element("chat").classList.contains("expanded");

// Lets the chat fill the window. Nothing behind it can have the focus.
function expand(isLarge) {
  element("chat").classList.toggle("expanded", isLarge);
  element("chat-expand").setAttribute("aria-pressed", String(isLarge));
  element("chat-expand").textContent = isLarge ? "shrink" : "expand";
  const others = document.querySelectorAll("body > :not(main, script), main > :not(#chat, :has(#chat))");
  for (const other of others) other.inert = isLarge;
  scrollToEnd();
}

function download(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}
