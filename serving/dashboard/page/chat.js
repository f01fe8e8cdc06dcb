// The chat box. What the model says only ever becomes text nodes.

import { ask, events, Refused } from "./stream.js";

const element = (id) => document.getElementById(id);
const history = [];
let underWay = null;
let onUnauthorized = () => {};

export function startChat(unauthorized) {
  onUnauthorized = unauthorized;
  const input = element("chat-input");
  element("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (underWay) underWay.abort();
    else if (input.value.trim()) send(input.value.trim());
  });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!underWay) element("chat-form").requestSubmit();
  });
  element("chat-clear").addEventListener("click", () => {
    underWay?.abort();
    history.length = 0;
    element("messages").replaceChildren();
    element("chat-clear").hidden = true;
    input.focus();
  });
}

async function send(text) {
  const question = { role: "user", content: text };
  const asked = add("message user", text);
  const answer = add("message assistant", "");
  const abort = (underWay = new AbortController());
  element("chat-input").value = "";
  element("chat-clear").hidden = false;
  showRunning(true);
  const began = performance.now();
  const result = { text: "", firstToken: null, usage: null, finishReason: null };
  let problem = null;
  try {
    await receive([...history, question], abort.signal, result, (piece) => {
      result.firstToken ??= performance.now();
      write(answer, piece);
    });
  } catch (error) {
    problem = error;
  }
  underWay = underWay === abort ? null : underWay;
  showRunning(underWay !== null);
  const stopped = problem?.name === "AbortError";
  if (problem && !stopped && result.text === "") {
    // Nothing came: the question goes back to where it can be sent again.
    answer.remove();
    asked.remove();
    element("chat-input").value = text;
  }
  if (problem && !stopped) add("message failed", explain(problem));
  if (result.text) {
    history.push(question, { role: "assistant", content: result.text });
    add("note", describe(result, began, stopped));
  }
  if (problem instanceof Refused && problem.status === 401) onUnauthorized();
}

async function receive(messages, signal, result, onPiece) {
  const models = await (await ask("/v1/models", { signal })).json();
  const body = {
    model: models.data[0].id,
    messages,
    temperature: element("chat-temperature").valueAsNumber || 0,
    max_tokens: element("chat-max-tokens").valueAsNumber || 512,
    stream: true,
    stream_options: { include_usage: true },
  };
  const headers = { "Content-Type": "application/json" };
  const response = await ask("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), headers, signal });
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
  throw new Error("The answer broke off: the server closed the connection.");
}

function explain(problem) {
  if (problem instanceof TypeError) return "The server does not answer.";
  return problem.message;
}

function describe(result, began, stopped) {
  const parts = [];
  const seconds = (performance.now() - result.firstToken) / 1000;
  const tokens = result.usage?.completion_tokens;
  if (tokens) parts.push(`${tokens} tokens`);
  if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  parts.push(`first after ${Math.round(result.firstToken - began)} ms`);
  if (stopped) parts.push("stopped");
  if (result.finishReason === "length") parts.push("ended at the limit of tokens");
  return parts.join(" · ");
}

function add(className, text) {
  const item = document.createElement("div");
  item.className = className;
  write(item, text);
  element("messages").append(item);
  item.scrollIntoView({ block: "nearest" });
  return item;
}

function write(item, text) {
  const box = element("messages");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  if (text) item.append(text);
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function showRunning(running) {
  const button = element("chat-send");
  button.textContent = running ? "Stop" : "Send";
  button.classList.toggle("stop", running);
}
