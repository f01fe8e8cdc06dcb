// The page: receives an event each second, keeps two minutes of them, and shows them.

import { drawHistory, drawPool, drawRequests, drawSteps, purgeCharts, SPAN } from "./charts.js";
import { startChat } from "./chat.js";
import { request, events, hasKey, HttpError, setKey } from "./stream.js";

const STEPS = 80;
const REQUESTS = 14;
const TIMEOUT = 6000; // milliseconds without data after which the connection counts as lost
const THEMES = ["auto", "light", "dark"];

const element = (id) => document.getElementById(id);
const shown = { last: null, seconds: [], steps: [], requests: [], receivedAt: null };
let retrySeconds = 1;
let wake = () => {};

function append(list, more, most) {
  list.push(...more);
  list.splice(0, list.length - most);
}

function receive(update) {
  if (update.first) {
    shown.seconds.length = shown.steps.length = shown.requests.length = 0;
  }
  shown.last = update;
  shown.receivedAt = new Date();
  append(shown.seconds, update.seconds, SPAN);
  append(shown.steps, update.steps, STEPS);
  append(shown.requests, update.requests, REQUESTS);
  render();
}

function render() {
  if (document.hidden || !shown.last) return;
  showNumbers(shown.last);
  if (!window.Plotly) {
    element("no-charts").hidden = false;
    document.querySelectorAll("figure:not(:has(#no-requests))").forEach((figure) => (figure.hidden = true));
    element("no-requests").hidden = false;
    return;
  }
  drawHistory(shown.seconds, shown.last.now);
  drawSteps(shown.steps);
  const { pool } = shown.last;
  if (pool) {
    const perCell = drawPool(pool, element("chart-pool").clientWidth);
    element("pool-scale").textContent = `${pool.total} blocks of ${pool.block_size} tokens` + (perCell > 1 ? `, ${perCell} a cell` : "");
  }
  element("no-requests").hidden = shown.requests.length > 0;
  element("chart-requests").hidden = shown.requests.length === 0;
  if (shown.requests.length) drawRequests([...shown.requests].reverse(), element("chart-requests").clientWidth);
}

const integer = (value) => Math.round(value).toLocaleString("en");
const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(0)} %`);
const duration = (seconds) =>
  seconds === undefined ? "–" : seconds >= 1 ? `${seconds.toFixed(2)} s` : `${(seconds * 1000).toFixed(seconds < 0.1 ? 1 : 0)} ms`;

function showNumbers(update) {
  const text = (id, value) => (element(id).textContent = value);
  const last = shown.seconds.slice(-3);
  const mean = (name) => last.reduce((sum, second) => sum + second[name], 0) / Math.max(1, last.length);
  text("out-rate", integer(mean("output")));
  text("in-rate", integer(mean("computed") + mean("cached")));
  text("ttft-median", duration(update.ttft?.[0]));
  text("ttft-high", duration(update.ttft?.[1]));
  text("gap-median", duration(update.gap?.[0]));
  text("gap-high", duration(update.gap?.[1]));
  text("running", integer(update.running));
  text("waiting", integer(update.waiting));
  text("hit-rate", percent(update.hit_rate));
  for (const name of ["used", "cached", "free"]) text(`pool-${name}`, update.pool ? integer(update.pool[name]) : "–");
  element("speculation").hidden = !update.speculation;
  if (update.speculation) {
    text("acceptance", percent(update.speculation.rate));
    text("accepted-length", update.speculation.accepted_per_draft.toFixed(2));
  }
  const { info } = update;
  text("model", info ? [info.model, info.device, info.dtype, `${integer(info.max_model_len)} tokens of context`].join(" · ") : "");
}

function showState(state, message) {
  element("state").dataset.state = state;
  element("state").textContent = state;
  element("banner").textContent = message;
  element("banner").hidden = !message;
  document.body.classList.toggle("stale", state !== "ready");
}

function showServerState({ state, reason }) {
  const messages = {
    loading: "The engine is loading the model; this page updates itself.",
    draining: "The server is shutting down: it finishes running requests and accepts no new ones.",
    restarting: "The engine died and is being restarted.",
    dead: "The engine is dead after its last restart: the server ends.",
    stalled: "Requests are pending, but no step ends.",
  };
  const message = messages[state] ?? "";
  showState(state, message && reason ? `${message} (${reason})` : message);
}

async function follow() {
  for (;;) {
    const abort = new AbortController();
    let watchdog = setTimeout(() => abort.abort(), TIMEOUT);
    const resetWatchdog = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => abort.abort(), TIMEOUT);
    };
    try {
      const response = await request("/dashboard/events", { signal: abort.signal });
      element("key-form").hidden = true;
      for await (const data of events(response, resetWatchdog)) {
        retrySeconds = 1;
        const update = JSON.parse(data);
        showServerState(update);
        receive(update);
      }
      showDisconnected();
    } catch (error) {
      if (error instanceof HttpError && error.status === 401) requestKey();
      else if (error instanceof HttpError) showState("unreachable", `The server rejects the request: ${error.message}`);
      else showDisconnected();
    } finally {
      clearTimeout(watchdog);
      abort.abort();
    }
    await new Promise((resolve) => {
      wake = resolve;
      if (element("key-form").hidden) setTimeout(resolve, retrySeconds * 1000);
    });
    retrySeconds = Math.min(8, retrySeconds * 2);
  }
}

function showDisconnected() {
  const last = shown.receivedAt ? ` Last event at ${shown.receivedAt.toTimeString().slice(0, 8)}.` : "";
  showState("unreachable", `The server does not answer.${last} The page retries.`);
}

function requestKey() {
  showState("locked", "");
  element("key-error").hidden = !hasKey();
  element("key-form").hidden = false;
  element("key").focus();
}

function applyTheme(theme) {
  const dark = theme === "dark" || (theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  element("theme").textContent = theme;
  render();
}

function startTheme() {
  const chosen = () => localStorage.getItem("dispec-theme") ?? "auto";
  element("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(chosen()) + 1) % THEMES.length];
    localStorage.setItem("dispec-theme", next);
    applyTheme(next);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => applyTheme(chosen()));
  applyTheme(chosen());
}

element("curl").textContent =
  `curl ${location.origin}/v1/chat/completions -H 'Content-Type: application/json' \\\n` +
  `  -d '{"messages": [{"role": "user", "content": "Say hello"}]}'`;
element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(element("key").value);
  element("key").value = "";
  element("key-form").hidden = true;
  wake();
});
document.addEventListener("visibilitychange", render);
startTheme();
startChat(requestKey);
follow();
