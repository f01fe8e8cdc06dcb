// The tables of requests and processes. Rows keep their elements from one event to the next, and with them the focus.

import { age, bytes, duration, integer, percent } from "./format.js";

const MOST_ENDED = 50;
const ended = [];

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// columns: {label, className, hidden(rows), show(cell, row)}. `show` is called for each row at each event.
class Table {
  constructor(id, columns, keyOf) {
    this.table = document.getElementById(id);
    this.body = this.table.tBodies[0];
    this.columns = columns;
    this.keyOf = keyOf;
    this.rows = new Map();
    this.labels = columns.map(({ label, className = "" }) => element("th", { scope: "col", role: "columnheader", class: className }, label));
    this.table.tHead.rows[0].append(...this.labels);
  }

  update(rows) {
    const hidden = this.columns.map((column) => column.hidden?.(rows) ?? false);
    this.labels.forEach((label, index) => (label.hidden = hidden[index]));
    const wanted = new Set(rows.map(this.keyOf));
    for (const [key, row] of this.rows) {
      if (!wanted.has(key)) {
        row.remove();
        this.rows.delete(key);
      }
    }
    rows.forEach((row, place) => {
      const item = this.rows.get(this.keyOf(row)) ?? this.add(this.keyOf(row));
      item.className = row.state === "error" ? "failed" : "";
      this.columns.forEach((column, index) => {
        item.cells[index].hidden = hidden[index];
        column.show(item.cells[index], row);
      });
      if (this.body.rows[place] !== item) this.body.insertBefore(item, this.body.rows[place] ?? null);
    });
  }

  add(key) {
    const cells = this.columns.map(({ label, className = "" }) => element("td", { role: "cell", class: className, "data-label": label }));
    const item = element("tr", { role: "row" }, ...cells);
    this.rows.set(key, item);
    return item;
  }
}

function setText(cell, text) {
  if (cell.textContent !== text) cell.textContent = text;
}

function showId(cell, { id }) {
  if (cell.firstChild) return;
  const code = element("code", { title: id }, id);
  const button = element("button", { type: "button", class: "quiet copy", "aria-label": `Copy the id ${id}` }, "copy");
  button.addEventListener("click", () => copy(id, code, button));
  cell.append(element("span", {}, code, button));
}

async function copy(text, code, button) {
  try {
    await navigator.clipboard.writeText(text); // absent where the page was not loaded over TLS or from this machine
    button.textContent = "copied";
  } catch {
    getSelection().selectAllChildren(code);
    button.textContent = "selected";
  }
  setTimeout(() => (button.textContent = "copy"), 1500);
}

function showState(cell, { state }) {
  if (cell.dataset.state === (state ?? "")) return;
  cell.dataset.state = state ?? "";
  cell.replaceChildren(state ? element("span", { class: "state", "data-state": state }, state) : "–");
}

const total = (row) => row.queue + row.prefill + row.decode;
let longest = 0; // seconds, of the rows that are shown

function showPhases(cell, row) {
  if (!cell.firstChild) {
    const parts = ["queue", "prefill", "decode"].map((name) => element("i", { class: name }));
    cell.append(element("span", { class: "phases" }, element("span", { role: "img" }, ...parts), element("b")));
  }
  const [bar, text] = cell.firstChild.children;
  const said = ["queue", "prefill", "decode"].map((name, index) => {
    bar.children[index].style.width = `${(100 * row[name]) / Math.max(longest, 1e-9)}%`;
    return `${name} ${duration(row[name])}`;
  });
  bar.setAttribute("aria-label", said.join(", "));
  bar.title = said.join(", ");
  setText(text, duration(total(row)));
}

let now = 0;
const number = (label, text, more = {}) => ({ label, className: "number", show: (cell, row) => setText(cell, text(row)), ...more });

const requests = new Table(
  "requests-table",
  [
    { label: "ID", className: "id", show: showId },
    { label: "State", show: showState },
    { label: "Worker", hidden: (rows) => !rows.some((row) => row.worker), show: (cell, row) => setText(cell, row.worker ?? "–") },
    number("Age", (row) => age(now - row.arrival)),
    number("Prompt (cached)", (row) => integer(row.prompt) + (row.cached ? ` (${integer(row.cached)})` : "")),
    number("Output", (row) => integer(row.output)),
    { label: "Queue, prefill, decode", className: "wide", show: showPhases },
    { label: "Finish", className: "long", show: (cell, row) => setText(cell, row.error ? `error: ${row.error}` : row.reason) },
  ],
  (row) => row.key,
);

const processes = new Table(
  "engines-table",
  [
    { label: "Process", show: (cell, row) => setText(cell, row.name) },
    { label: "State", show: showState },
    number("PID", (row) => String(row.pid ?? "–")),
    number("CPU", (row) => (row.cpu === null ? "–" : `${row.cpu.toFixed(0)} %`)),
    number("Memory", (row) => bytes(row.memory)),
    number("GPU memory", (row) => (row.gpu_total ? `${bytes(row.gpu_used)} of ${bytes(row.gpu_total)}` : "–"), {
      hidden: (rows) => !rows.some((row) => row.gpu_total),
    }),
    number("Running", (row) => (row.running === undefined ? "–" : integer(row.running))),
    number("Waiting", (row) => (row.waiting === undefined ? "–" : integer(row.waiting))),
    number("KV usage", (row) => (row.pool ? percent(row.pool.used / row.pool.total) : "–")),
  ],
  (row) => row.name,
);

export function forgetRequests() {
  ended.length = 0;
}

export function keepEnded(rows) {
  ended.unshift(...[...rows].reverse());
  ended.length = Math.min(ended.length, MOST_ENDED);
}

export function showRequests(update) {
  now = update.now;
  const rows = [...update.unfinished, ...ended];
  longest = Math.max(0, ...rows.map(total));
  requests.update(rows);
  document.getElementById("no-requests").hidden = rows.length > 0;
  document.getElementById("requests-scroll").hidden = rows.length === 0;
  const counts = [`${integer(update.num_unfinished)} unfinished`, `${integer(update.num_ended)} ended`];
  if (update.num_errors) counts.push(`${integer(update.num_errors)} with an error`);
  const left = update.num_unfinished - update.unfinished.length + update.num_ended - ended.length;
  if (left > 0) counts.push(`${integer(left)} not shown`);
  document.getElementById("requests-counts").textContent = counts.join(", ");
}

export function showProcesses({ engines, machine }) {
  processes.update(engines);
  const memory = `${bytes(machine.memory_used)} of ${bytes(machine.memory_total)} memory in use`;
  document.getElementById("engines-note").textContent =
    `last second, 100 % CPU is one of ${machine.cores} cores; machine: ${memory}`;
}
