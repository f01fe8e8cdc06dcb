// The chat box. The model's text only becomes text nodes.

import { request, events, HttpError } from "./stream.js";

const element = (id) => document.getElementById(id);
const history = [];
let running = null;
let onUnauthorized = () => {};

export function startChat(unauthorized) {
  onUnauthorized = unauthorized;
  const input = element("chat-input");
  element("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else if (input.value.trim()) send(input.value.trim());
  });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) element("chat-form").requestSubmit();
  });
  element("chat-clear").addEventListener("click", () => {
    running?.abort();
    history.length = 0;
    element("messages").replaceChildren();
    element("chat-clear").hidden = true;
    input.focus();
  });
}

async function send(text) {
  const question = { role: "user", content: text };
  const questionItem = addMessage("message user", text);
  const answer = addMessage("message assistant", "");
  const abort = (running = new AbortController());
  element("chat-input").value = "";
  element("chat-clear").hidden = false;
  showRunning(true);
  const start = performance.now();
  const result = { text: "", firstToken: null, usage: null, finishReason: null };
  let error = null;
  try {
    await receive([...history, question], abort.signal, result, (piece) => {
      result.firstToken ??= performance.now();
      appendText(answer, piece);
    });
  } catch (caught) {
    error = caught;
  }
  running = running === abort ? null : running;
  showRunning(running !== null);
  const stopped = error?.name === "AbortError";
  if (error && !stopped && result.text === "") {
    // Without an answer the question returns to the input box.
    answer.remove();
    questionItem.remove();
    element("chat-input").value = text;
  }
  if (error && !stopped) addMessage("message failed", explain(error));
  if (result.text) {
    history.push(question, { role: "assistant", content: result.text });
    addMessage("note", describe(result, start, stopped));
  }
  if (error instanceof HttpError && error.status === 401) onUnauthorized();
}

async function receive(messages, signal, result, onPiece) {
  const models = await (await request("/v1/models", { signal })).json();
  const body = {
    model: models.data[0].id,
    messages,
    temperature: element("chat-temperature").valueAsNumber || 0,
    max_tokens: element("chat-max-tokens").valueAsNumber || 512,
    stream: true,
    stream_options: { include_usage: true },
  };
  const headers = { "Content-Type": "application/json" };
  const response = await request("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), headers, signal });
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    result.usage = chunk.usage ?? result.usage;
    const choice = chunk.choices?.[0];
    result.finishReason = choice?.finish_reason ?? result.finishReason;
    if (choice?.delta?.content) {
      result.text += choice.delta.content;
      onPiece(choice.delta.content);
    }
  }
  throw new Error("The answer is incomplete: the server closed the connection.");
}

function explain(error) {
  if (error instanceof TypeError) return "The server does not answer.";
  return error.message;
}

function describe(result, start, stopped) {
  const parts = [];
  const seconds = (performance.now() - result.firstToken) / 1000;
  const tokens = result.usage?.completion_tokens;
  if (tokens) parts.push(`${tokens} tokens`);
  if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  parts.push(`first after ${Math.round(result.firstToken - start)} ms`);
  if (stopped) parts.push("stopped");
  if (result.finishReason === "length") parts.push("ended at the limit of tokens");
  return parts.join(" · ");
}

function addMessage(className, text) {
  const item = document.createElement("div");
  item.className = className;
  appendText(item, text);
  element("messages").append(item);
  item.scrollIntoView({ block: "nearest" });
  return item;
}

function appendText(item, text) {
  const box = element("messages");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  if (text) item.append(text);
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function showRunning(isRunning) {
  const button = element("chat-send");
  button.textContent = isRunning ? "Stop" : "Send";
  button.classList.toggle("stop", isRunning);
}
