// Plotly charts of the server's events. Colours come from the style sheet, which has the light and the dark theme.

export const SPAN = 120; // seconds of history

const drawn = new Set();
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
// Plotly shows times as UTC: shifted, they are local times.
const localTime = (seconds) => new Date((seconds - new Date().getTimezoneOffset() * 60) * 1000).toISOString();

function layout(extra) {
  const axis = { gridcolor: color("line"), linecolor: color("line"), zeroline: false, fixedrange: true };
  const merged = {
    margin: { l: 42, r: 8, t: 6, b: 20 },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { family: getComputedStyle(document.body).fontFamily, size: 11, color: color("muted") },
    hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("text") } },
    showlegend: false,
    dragmode: false,
    ...extra,
  };
  merged.xaxis = { ...axis, showgrid: false, ...extra.xaxis };
  merged.yaxis = { ...axis, nticks: 4, rangemode: "tozero", ...extra.yaxis };
  return merged;
}

function draw(id, traces, extra) {
  drawn.add(id);
  window.Plotly.react(id, traces, layout(extra), { displayModeBar: false, responsive: true });
}

function drawOverTime(id, now, traces, extra = {}) {
  draw(id, traces, {
    hovermode: "x unified",
    xaxis: { type: "date", range: [localTime(now - SPAN), localTime(now)], nticks: 4, tickformat: "%H:%M:%S" },
    ...extra,
  });
}

const line = (x, y, name, colorName, more = {}) => ({
  x, y, name, type: "scatter", mode: "lines", line: { color: color(colorName), width: 1.8 }, ...more,
});
const area = (x, y, name, colorName) => line(x, y, name, colorName, {
  stackgroup: "all", line: { color: color(colorName), width: 0, shape: "hv" }, fillcolor: color(colorName),
});

export function drawHistory(seconds, now) {
  const x = seconds.map((second) => localTime(second.at));
  const series = (name) => seconds.map((second) => second[name]);
  const rate = { hovertemplate: "%{y:.0f}" };
  drawOverTime("chart-out", now, [line(x, series("output"), "output", "decode", rate)], { yaxis: atLeast(seconds, ["output"], 10) });
  drawOverTime(
    "chart-in",
    now,
    [{ ...area(x, series("computed"), "computed", "prefill"), ...rate }, { ...area(x, series("cached"), "cached", "cached"), ...rate }],
    { yaxis: atLeast(seconds, ["computed", "cached"], 10) },
  );
  for (const [id, name] of [["chart-ttft", "ttft"], ["chart-gap", "gap"]]) {
    const milliseconds = (index) => seconds.map((second) => (second[name] ? second[name][index] * 1000 : null));
    const shown = { mode: "lines+markers", marker: { size: 3.5 }, hovertemplate: "%{y:.1f} ms" };
    drawOverTime(id, now, [line(x, milliseconds(1), "p95", "faint", shown), line(x, milliseconds(0), "median", "decode", shown)], {
      yaxis: seconds.some((second) => second[name]) ? {} : { range: [0, 100] },
    });
  }
  drawOverTime("chart-load", now, [area(x, series("running"), "running", "decode"), area(x, series("waiting"), "waiting", "queue")], {
    yaxis: atLeast(seconds, ["running", "waiting"], 4),
  });
}

function atLeast(seconds, names, minimum) {
  const highest = Math.max(0, ...seconds.map((second) => names.reduce((sum, name) => sum + second[name], 0)));
  return highest < minimum ? { range: [0, minimum] } : {};
}

export function drawSteps(steps) {
  const x = steps.map((step) => step.number);
  const customdata = steps.map((step) => step.seconds * 1000);
  const bar = (name) => ({
    x, y: steps.map((step) => step[name]), name, type: "bar", customdata, marker: { color: color(name) },
    hovertemplate: `%{y} ${name}, %{customdata:.1f} ms<extra></extra>`,
  });
  const last = x.at(-1) ?? 0;
  draw("chart-steps", [bar("decode"), bar("prefill")], {
    barmode: "stack",
    bargap: 0.15,
    xaxis: { range: [last - 79.5, last + 0.5], nticks: 5, tickformat: "d" },
    yaxis: steps.length ? {} : { range: [0, 10] },
  });
}

// Each cell stands for the same number of blocks: first used blocks, then cached ones, then free ones.
export function drawPool(pool, width) {
  const columns = Math.max(16, Math.min(64, Math.floor(width / 15)));
  const perCell = Math.max(1, Math.ceil(pool.total / (columns * 8)));
  const cells = Math.max(1, Math.ceil(pool.total / perCell));
  const rows = Math.ceil(cells / columns);
  const used = Math.min(cells, Math.ceil(pool.used / perCell));
  const usedOrCached = Math.min(cells, Math.max(used, Math.ceil((pool.used + pool.cached) / perCell)));
  const kind = (cell) => (cell >= cells ? null : cell < used ? 0 : cell < usedOrCached ? 1 : 2);
  const z = Array.from({ length: rows }, (_, row) => Array.from({ length: columns }, (_, column) => kind(row * columns + column)));
  const shades = ["decode", "cached", "free"].map(color);
  const colorscale = shades.flatMap((shade, index) => [[index / 3, shade], [(index + 1) / 3, shade]]);
  const hidden = { visible: false, showgrid: false };
  document.getElementById("chart-pool").style.height = `${(rows * width) / columns}px`;
  draw("chart-pool", [{ z, type: "heatmap", zmin: -0.5, zmax: 2.5, colorscale, showscale: false, xgap: 2, ygap: 2, hoverinfo: "skip" }], {
    margin: { l: 0, r: 0, t: 0, b: 0 },
    xaxis: hidden,
    yaxis: { ...hidden, autorange: "reversed" },
  });
  return perCell;
}

export function drawRequests(requests, width) {
  const narrow = width < 560;
  const shown = requests.slice(0, narrow ? 8 : 14);
  const y = shown.map((_, index) => index);
  const bar = (phase) => ({
    y, x: shown.map((request) => request[phase]), name: phase, type: "bar", orientation: "h",
    marker: { color: color(phase) },
    customdata: shown.map((request) => [request.id, request.error ?? ""]),
    hovertemplate: `${phase} %{x:.3f} s<br>%{customdata[0]}<br>%{customdata[1]}<extra></extra>`,
  });
  const element = document.getElementById("chart-requests");
  element.style.height = `${shown.length * 22 + 28}px`;
  draw("chart-requests", ["queue", "prefill", "decode"].map(bar), {
    barmode: "stack",
    bargap: 0.35,
    margin: { l: 8, r: 12, t: 0, b: 20 },
    xaxis: { showgrid: true, rangemode: "tozero", ticksuffix: " s", nticks: 6 },
    yaxis: {
      tickvals: y, ticktext: shown.map((request) => label(request, narrow)), autorange: "reversed", nticks: 0,
      automargin: true, showgrid: false,
      tickfont: { family: "ui-monospace, SFMono-Regular, Menlo, DejaVu Sans Mono, monospace", size: narrow ? 10 : 11 },
    },
  });
}

function label(request, narrow) {
  const wide = (text, length) => String(text).padStart(length, "\u00a0");
  const time = new Date(request.at * 1000).toTimeString().slice(0, 8);
  const total = request.queue + request.prefill + request.decode;
  const seconds = `${wide(total.toFixed(2), 6)} s`;
  const reason = request.reason.padEnd(6, "\u00a0");
  if (narrow) return `${time} ${reason} ${seconds} `;
  return `${time}  ${wide(request.prompt, 6)} in ${wide(request.output, 5)} out  ${reason} ${seconds} `;
}

export function purgeCharts() {
  for (const id of drawn) window.Plotly.purge(id);
  drawn.clear();
}
