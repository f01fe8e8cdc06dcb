// One answer of the model: the request, the turns that fit the context, and the stream.

import { messagesFrom } from "./chat_history.js";
import { duration, integer, plural } from "./format.js";
import { events, HttpError, request } from "./stream.js";

const TEMPLATE_TOKENS = 64; // of a chat template around each message, at most

// Streams the answer to the last turn into `answer`, and calls `onChange` after each piece. Throws what went wrong.
export async function streamAnswer(messages, fields, answer, { signal, onChange }) {
  const body = { messages, ...fields, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  const times = { start: performance.now(), firstToken: null };
  const response = await post("/v1/chat/completions", body, signal);
  let usage = null;
  let finishReason = null;
  const describe = () => (answer.statistics = statistics(times, usage, finishReason));
  try {
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      const choice = chunk.choices?.[0];
      finishReason = choice?.finish_reason ?? finishReason;
      const { content, reasoning_content: reasoning } = choice?.delta ?? {};
      if (!content && !reasoning) continue;
      times.firstToken ??= performance.now();
      times.lastToken = performance.now();
      answer.content += content ?? "";
      answer.reasoning += reasoning ?? "";
      describe();
      onChange();
    }
  } finally {
    describe();
  }
  throw new Error("The answer is incomplete: the server closed the connection.");
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return request(path, { method: "POST", body: JSON.stringify(body), headers, signal });
}

// Returns the first turn to send: the oldest ones are left out until the prompt leaves room for an answer of
// `maxTokens` tokens, or of a quarter of the context if that is less. The last turn always stays.
export async function firstTurnThatFits(turns, first, { system, maxTokens, maxModelLen, signal }) {
  const room = Math.min(maxTokens ?? Infinity, Math.floor(maxModelLen / 4));
  for (; first < turns.length - 1; first += 1) {
    const messages = messagesFrom(first, system);
    if (mostTokens(messages) + room <= maxModelLen) break;
    const { count } = await (await post("/tokenize", { messages }, signal)).json();
    if (count + room <= maxModelLen) break;
  }
  return first;
}

// A token is at least one byte of text.
function mostTokens(messages) {
  return new TextEncoder().encode(messages.map(({ content }) => content).join("")).length + TEMPLATE_TOKENS * messages.length;
}

export function explain(error) {
  if (error instanceof HttpError && error.status === 401) return "The server asks for an API key: enter it above, then retry.";
  if (error instanceof TypeError) return "The server does not answer.";
  return error.message;
}

function statistics({ start, firstToken, lastToken }, usage, finishReason) {
  if (firstToken === null) return finishReason ? "empty answer" : "";
  const tokens = usage?.completion_tokens ?? 0;
  const seconds = (lastToken - firstToken) / 1000;
  const parts = [plural(tokens, "token")];
  const rate = (tokens - 1) / seconds;
  if (tokens > 1 && seconds > 0) parts.push(`${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`);
  parts.push(`TTFT ${duration((firstToken - start) / 1000)}`);
  if (usage && finishReason) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`prompt ${plural(usage.prompt_tokens, "token")}${cached ? `, ${integer(cached)} cached` : ""}`);
  }
  if (finishReason === "length") parts.push("ended at the limit of tokens");
  return parts.join(" · ");
}
