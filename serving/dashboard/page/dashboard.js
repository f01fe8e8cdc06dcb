// The page: hears what the server does once a second, keeps two minutes of it, and shows it.

import { drawHistory, drawPool, drawRequests, drawSteps, forgetCharts, SPAN } from "./charts.js";
import { startChat } from "./chat.js";
import { ask, events, hasKey, Refused, useKey } from "./stream.js";

const STEPS = 80;
const REQUESTS = 14;
const SILENCE = 6000; // milliseconds without news after which the connection counts as lost
const THEMES = ["auto", "light", "dark"];

const element = (id) => document.getElementById(id);
const seen = { news: null, seconds: [], steps: [], requests: [], heard: null };
let retry = 1;
let wake = () => {};

function keep(list, more, most) {
  list.push(...more);
  list.splice(0, list.length - most);
}

function take(news) {
  if (news.first) {
    seen.seconds.length = seen.steps.length = seen.requests.length = 0;
  }
  seen.news = news;
  seen.heard = new Date();
  keep(seen.seconds, news.seconds, SPAN);
  keep(seen.steps, news.steps, STEPS);
  keep(seen.requests, news.requests, REQUESTS);
  show();
}

function show() {
  if (document.hidden || !seen.news) return;
  showNumbers(seen.news);
  if (!window.Plotly) {
    element("no-charts").hidden = false;
    document.querySelectorAll("figure:not(:has(#no-requests))").forEach((figure) => (figure.hidden = true));
    element("no-requests").hidden = false;
    return;
  }
  drawHistory(seen.seconds, seen.news.now);
  drawSteps(seen.steps);
  const { pool } = seen.news;
  if (pool) {
    const perCell = drawPool(pool, element("chart-pool").clientWidth);
    element("pool-scale").textContent = `${pool.total} blocks of ${pool.block_size} tokens` + (perCell > 1 ? `, ${perCell} a cell` : "");
  }
  element("no-requests").hidden = seen.requests.length > 0;
  element("chart-requests").hidden = seen.requests.length === 0;
  if (seen.requests.length) drawRequests([...seen.requests].reverse(), element("chart-requests").clientWidth);
}

const whole = (value) => Math.round(value).toLocaleString("en");
const share = (value) => (value === null ? "–" : `${(100 * value).toFixed(0)} %`);
const duration = (seconds) =>
  seconds === undefined ? "–" : seconds >= 1 ? `${seconds.toFixed(2)} s` : `${(seconds * 1000).toFixed(seconds < 0.1 ? 1 : 0)} ms`;

function showNumbers(news) {
  const text = (id, value) => (element(id).textContent = value);
  const last = seen.seconds.slice(-3);
  const mean = (name) => last.reduce((sum, second) => sum + second[name], 0) / Math.max(1, last.length);
  text("out-rate", whole(mean("output")));
  text("in-rate", whole(mean("computed") + mean("cached")));
  text("ttft-median", duration(news.ttft?.[0]));
  text("ttft-high", duration(news.ttft?.[1]));
  text("gap-median", duration(news.gap?.[0]));
  text("gap-high", duration(news.gap?.[1]));
  text("running", whole(news.running));
  text("waiting", whole(news.waiting));
  text("hit-rate", share(news.hit_rate));
  for (const name of ["used", "cached", "free"]) text(`pool-${name}`, news.pool ? whole(news.pool[name]) : "–");
  element("speculation").hidden = !news.speculation;
  if (news.speculation) {
    text("acceptance", share(news.speculation.rate));
    text("accepted-length", news.speculation.accepted_per_draft.toFixed(2));
  }
  const { info } = news;
  text("model", info ? [info.model, info.device, info.dtype, `${whole(info.max_model_len)} tokens of context`].join(" · ") : "");
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
    loading: "The engine is loading the model; this page follows by itself.",
    draining: "The server is shutting down: it finishes what is running and takes nothing new.",
    restarting: "The engine died and is being started again.",
    dead: "The engine is down and was started again too often: the server ends.",
    stalled: "Work is pending, but nothing moves.",
  };
  const message = messages[state] ?? "";
  showState(state, message && reason ? `${message} (${reason})` : message);
}

async function follow() {
  for (;;) {
    const abort = new AbortController();
    let watchdog = setTimeout(() => abort.abort(), SILENCE);
    const alive = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => abort.abort(), SILENCE);
    };
    try {
      const response = await ask("/dashboard/events", { signal: abort.signal });
      element("key-form").hidden = true;
      for await (const data of events(response, alive)) {
        retry = 1;
        const news = JSON.parse(data);
        showServerState(news);
        take(news);
      }
      lost();
    } catch (error) {
      if (error instanceof Refused && error.status === 401) askForKey();
      else if (error instanceof Refused) showState("unreachable", `The server refuses to tell: ${error.message}`);
      else lost();
    } finally {
      clearTimeout(watchdog);
      abort.abort();
    }
    await new Promise((resolve) => {
      wake = resolve;
      if (element("key-form").hidden) setTimeout(resolve, retry * 1000);
    });
    retry = Math.min(8, retry * 2);
  }
}

function lost() {
  const last = seen.heard ? ` Last heard of at ${seen.heard.toTimeString().slice(0, 8)}.` : "";
  showState("unreachable", `The server does not answer.${last} Trying again by itself.`);
}

function askForKey() {
  showState("locked", "");
  element("key-error").hidden = !hasKey();
  element("key-form").hidden = false;
  element("key").focus();
}

function applyTheme(theme) {
  const dark = theme === "dark" || (theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  element("theme").textContent = theme;
  show();
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
  useKey(element("key").value);
  element("key").value = "";
  element("key-form").hidden = true;
  wake();
});
document.addEventListener("visibilitychange", show);
startTheme();
startChat(askForKey);
follow();
