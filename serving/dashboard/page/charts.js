// Plotly charts of the server's events. Colours come from the style sheet, which has the light and the dark theme.
// A chart is drawn while it is on the screen.

const SMOOTHING = 10; // seconds, as of the server's rates
const visible = new Set();

export const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
// Plotly shows times as UTC: shifted, they are local times.
const localTime = (seconds) => new Date((seconds - new Date().getTimezoneOffset() * 60) * 1000).toISOString();

function layout(extra) {
  const axis = { gridcolor: color("line"), linecolor: color("line"), zeroline: false, fixedrange: true };
  const merged = {
    margin: { l: 44, r: 8, t: 6, b: 20 },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { family: getComputedStyle(document.body).fontFamily, size: 11, color: color("muted") },
    hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("text") } },
    showlegend: false,
    dragmode: false,
    ...extra,
  };
  merged.xaxis = { ...axis, showgrid: false, ...extra.xaxis };
  merged.yaxis = { ...axis, nticks: 4, rangemode: "tozero", separatethousands: true, exponentformat: "none", ...extra.yaxis };
  return merged;
}

function draw(id, traces, extra) {
  window.Plotly.react(id, traces, layout(extra), { displayModeBar: false, responsive: true });
}

function drawOverTime(id, { now, range }, traces, yaxis) {
  draw(id, traces, {
    hovermode: "x unified",
    xaxis: {
      type: "date",
      range: [localTime(now - range.span), localTime(now)],
      nticks: 5,
      tickformat: range.span > 60 ? "%H:%M" : "%H:%M:%S",
      hoverformat: "%H:%M:%S",
    },
    yaxis,
  });
}

const line = (x, y, name, colorName, more = {}) => ({
  x, y, name, type: "scatter", mode: "lines", line: { color: color(colorName), width: 1.8 }, ...more,
});
const area = (x, y, name, colorName) => line(x, y, name, colorName, {
  stackgroup: "all", line: { color: color(colorName), width: 0, shape: "hv" }, fillcolor: color(colorName), hovertemplate: "%{y:,.3~r}",
});

// An axis from 0 to at least `minimum`, so that small numbers look small.
function atLeast(minimum, ...series) {
  const sums = series[0].map((_, index) => series.reduce((sum, one) => sum + (one[index] ?? 0), 0));
  return Math.max(0, ...sums) < minimum ? { range: [0, 1.05 * minimum] } : {};
}

// The mean of the points of the last seconds, at each point.
export function smoothed(values, width) {
  const count = Math.max(1, Math.round(SMOOTHING / width));
  return values.map((_, index) => {
    const last = values.slice(Math.max(0, index + 1 - count), index + 1);
    return last.reduce((sum, value) => sum + value, 0) / last.length;
  });
}

// In seconds if a point is above two of them, else in milliseconds.
function latency(id, name) {
  return (view) => {
    const x = times(view);
    const inSeconds = view.points.some((point) => point[name] && point[name][1] >= 2);
    const [factor, unit] = inSeconds ? [1, "s"] : [1000, "ms"];
    document.querySelector(`[data-unit="${id}"]`).textContent = unit;
    const values = (index) => view.points.map((point) => (point[name] ? point[name][index] * factor : null));
    const shown = { mode: "lines+markers", marker: { size: 3.5 }, hovertemplate: `%{y:,.3~r} ${unit}` };
    const yaxis = view.points.some((point) => point[name]) ? {} : { range: [0, 105] };
    drawOverTime(id, view, [line(x, values(1), "p95", "faint", shown), line(x, values(0), "p50", "decode", shown)], yaxis);
  };
}

// A point stands at the end of its bucket.
const times = ({ points, range }) => points.map((point) => localTime(point.at + range.width));
const column = ({ points }, name) => points.map((point) => point[name]);

function steps(id, name) {
  return ({ steps: list }) => {
    const x = list.map((step) => step.number);
    const y = list.map((step) => step[name]);
    const bars = {
      x, y, name, type: "bar", marker: { color: color(name) }, customdata: list.map((step) => step.seconds * 1000),
      hovertemplate: `step %{x}: %{y:,} ${name} tokens, %{customdata:.1f} ms<extra></extra>`,
    };
    const last = Math.max(80, x.at(-1) ?? 0);
    draw(id, [bars], {
      bargap: 0.15,
      xaxis: { range: [last - 79.5, last + 0.5], nticks: 5, tickformat: ",d" },
      yaxis: atLeast(4, y),
    });
  };
}

const CHARTS = {
  "chart-output": (view) => {
    const x = times(view);
    const rates = column(view, "output");
    const shown = { hovertemplate: "%{y:,.0f}" };
    const traces = [line(x, rates, `${view.range.width} s`, "faint", shown)];
    traces.push(line(x, smoothed(rates, view.range.width), "mean of 10 s", "decode", { ...shown, line: { color: color("decode"), width: 2.2 } }));
    drawOverTime("chart-output", view, traces, atLeast(10, rates));
  },
  "chart-input": (view) => {
    const [computed, cached] = [column(view, "computed"), column(view, "cached")];
    const traces = [area(times(view), computed, "computed", "prefill"), area(times(view), cached, "cached", "cached")];
    drawOverTime("chart-input", view, traces, atLeast(10, computed, cached));
  },
  "chart-ttft": latency("chart-ttft", "ttft"),
  "chart-itl": latency("chart-itl", "itl"),
  "chart-e2e": latency("chart-e2e", "e2e"),
  "chart-queue": latency("chart-queue", "queue"),
  "chart-load": (view) => {
    const [running, waiting] = [column(view, "running"), column(view, "waiting")];
    const traces = [area(times(view), running, "running", "decode"), area(times(view), waiting, "waiting", "queue")];
    drawOverTime("chart-load", view, traces, atLeast(4, running, waiting));
  },
  "chart-finished": (view) => {
    const rates = column(view, "finished");
    drawOverTime("chart-finished", view, [area(times(view), rates, "requests/s", "decode")], atLeast(2, rates));
  },
  "chart-kv": (view) => {
    const shares = column(view, "kv_usage").map((share) => 100 * share);
    drawOverTime("chart-kv", view, [area(times(view), shares, "%", "decode")], { range: [0, 105], ticksuffix: " %" });
  },
  "chart-decode": steps("chart-decode", "decode"),
  "chart-prefill": steps("chart-prefill", "prefill"),
};

// onVisible: called when a chart comes onto the screen.
export function watchCharts(onVisible) {
  const observer = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) visible[isIntersecting ? "add" : "delete"](target.id);
      onVisible();
    },
    { rootMargin: "200px" },
  );
  for (const id of Object.keys(CHARTS)) observer.observe(document.getElementById(id));
}

// view: {now, range, points, steps}.
export function drawCharts(view) {
  for (const id of visible) CHARTS[id](view);
}
