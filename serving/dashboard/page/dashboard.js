// The page: receives an event each second, keeps the points of the chosen range, and shows them.

import { color, drawCharts, watchCharts } from "./charts.js";
import { startChat } from "./chat.js";
import { age, duration, integer, percent, plural, rate } from "./format.js";
import { drawPool } from "./pool.js";
import { request, events, hasKey, HttpError, setKey } from "./stream.js";
import { forgetRequests, keepEnded, showProcesses, showRequests } from "./tables.js";

const STEPS = 80;
const TIMEOUT = 6000; // milliseconds without data after which the connection counts as lost
const THEMES = ["auto", "light", "dark"];
const RANGE_NAMES = { "1m": "1 min", "10m": "10 min", "1h": "1 h" };
const STALE = ["connecting", "unreachable", "locked", "dead"]; // the numbers are of before
const MESSAGES = {
  loading: () => "The engine is loading the model. This page updates itself.",
  draining: ({ running, waiting }) => `The server is shutting down: it finishes ${plural(running + waiting, "request")} and accepts no new ones.`,
  restarting: ({ reason }) => `The engine died${reason && `: ${reason}`}. It is being restarted.`,
  dead: ({ reason }) => `The engine is dead${reason && `: ${reason}`}. The server ends.`,
  stalled: ({ reason }) => `Requests make no progress: ${reason}.`,
};

const element = (id) => document.getElementById(id);
const shown = { last: null, points: [], steps: [], receivedAt: null };
let range = localStorage.getItem("dispec-range") in RANGE_NAMES ? localStorage.getItem("dispec-range") : "1m";
let connection = new AbortController();
let retrySeconds = 1;
let wake = () => {};

function append(list, more, most) {
  list.push(...more);
  list.splice(0, list.length - most);
}

function receive(update) {
  if (update.first) {
    shown.points.length = shown.steps.length = 0;
    forgetRequests();
  }
  shown.last = update;
  shown.receivedAt = new Date();
  append(shown.points, update.points, update.range.span / update.range.width);
  append(shown.steps, update.steps, STEPS);
  keepEnded(update.ended);
  render();
}

function render() {
  if (document.hidden || !shown.last) return;
  const { last } = shown;
  showNumbers(last);
  showRequests(last);
  showProcesses(last);
  drawPool(last.pool, last.info?.block_size, color);
  const hasCharts = Boolean(window.Plotly);
  element("no-charts").hidden = hasCharts;
  document.querySelectorAll("figure:not(.plain)").forEach((figure) => (figure.hidden = !hasCharts));
  if (hasCharts) drawCharts({ now: last.now, range: last.range, points: shown.points, steps: shown.steps });
}

const text = (id, value) => (element(id).textContent = value);

function showNumbers(update) {
  const { summary, info, pool } = update;
  text("out-rate", rate(summary.output));
  text("in-rate", rate(summary.input));
  for (const name of ["ttft", "itl", "e2e", "queue"]) {
    text(`${name}-median`, duration(summary[name]?.[0]));
    text(`${name}-high`, duration(summary[name]?.[1]));
  }
  text("running", integer(update.running));
  text("waiting", integer(update.waiting));
  text("request-rate", rate(summary.finished));
  text("busy", percent(Math.min(1, summary.busy)));
  const errors = summary.errors + summary.refused;
  text("errors", integer(errors));
  text("errors-unit", errors === 1 ? "request" : "requests");
  element("errors").parentElement.classList.toggle("alert", errors > 0);
  text("preemptions", plural(summary.preemptions, "preemption"));
  text("kv-usage", info ? percent(update.kv_usage) : "–");
  text("kv-tokens", info ? integer(info.num_blocks * info.block_size) : "–");
  text("hit-rate", percent(summary.hit_rate));
  for (const name of ["used", "cached", "free"]) text(`pool-${name}`, pool ? integer(pool[name]) : "–");
  text("acceptance", summary.speculation ? percent(summary.speculation.rate) : "–");
  text("acceptance-unit", summary.speculation ? "accepted" : "");
  text("accepted-length", summary.speculation ? `${summary.speculation.accepted_per_draft.toFixed(2)} tokens per draft` : "no drafts");
  text("model", info ? [info.model, info.device, info.weights_format, `${integer(info.max_model_len)} tokens of context`].join(" · ") : "");
  text("bucket", `${update.range.width} s buckets · up `);
  text("uptime", age(update.uptime));
  document.querySelectorAll("[data-bucket]").forEach((item) => (item.textContent = `${update.range.width} s`));
  element("model").title = element("model").textContent; // whole where it is cut
  document.title = info ? `${info.model} · DiSpec` : "DiSpec";
}

function showState(state, message) {
  element("state").dataset.state = state;
  element("state").textContent = state;
  if (element("banner").textContent !== message) element("banner").textContent = message; // a reader says it once
  element("banner").hidden = !message;
  document.body.classList.toggle("stale", STALE.includes(state));
}

function showServerState(update) {
  showState(update.state, MESSAGES[update.state]?.(update) ?? "");
}

async function follow() {
  for (;;) {
    const abort = (connection = new AbortController());
    let watchdog = setTimeout(() => abort.abort(), TIMEOUT);
    const resetWatchdog = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => abort.abort(), TIMEOUT);
    };
    try {
      const response = await request(`/dashboard/events?range=${range}`, { signal: abort.signal });
      element("key-form").hidden = true;
      for await (const data of events(response, resetWatchdog)) {
        retrySeconds = 1;
        const update = JSON.parse(data);
        showServerState(update);
        receive(update);
      }
      showDisconnected();
    } catch (error) {
      if (abort.signal.reason === "range") continue;
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
  if (shown.last?.state === "dead") {
    showState("dead", `${MESSAGES.dead(shown.last).replace("The server ends.", "The server has ended.")} The page waits for a new one.`);
    return;
  }
  const last = shown.receivedAt ? ` Last event at ${shown.receivedAt.toTimeString().slice(0, 8)}.` : "";
  showState("unreachable", `The server does not answer.${last} The page retries.`);
}

function requestKey() {
  showState("locked", "");
  element("key-error").hidden = !hasKey();
  element("key-form").hidden = false;
  element("key").focus();
}

function showRange() {
  document.querySelector(`#ranges input[value="${range}"]`).checked = true;
  document.querySelectorAll("[data-window]").forEach((item) => (item.textContent = `last\u00a0${RANGE_NAMES[range].replace(" ", "\u00a0")}`));
}

function startRanges() {
  element("ranges").addEventListener("change", (event) => {
    range = event.target.value;
    localStorage.setItem("dispec-range", range);
    showRange();
    connection.abort("range");
    wake();
  });
  showRange();
}

function applyTheme(theme) {
  const dark = theme === "dark" || (theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  element("theme").textContent = theme;
  element("theme").setAttribute("aria-label", `Colour theme: ${theme}`);
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
window.addEventListener("resize", render);
startRanges();
startTheme();
watchCharts(render);
startChat(requestKey);
follow();
