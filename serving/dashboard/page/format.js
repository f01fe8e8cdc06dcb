// Numbers with their units, as the page writes them.

export const integer = (value) => Math.round(value).toLocaleString("en");
export const rate = (value) => (value >= 10 || value === 0 ? integer(value) : value.toFixed(value >= 1 ? 1 : 2));
export const percent = (share) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(0)} %`);
export const plural = (count, noun) => `${integer(count)} ${noun}${count === 1 ? "" : "s"}`;

// A latency, in at least two significant digits.
export function duration(seconds) {
  if (seconds === undefined || seconds === null) return "–";
  if (seconds >= 100) return `${seconds.toFixed(0)} s`;
  if (seconds >= 1) return `${seconds.toFixed(2)} s`;
  return `${(seconds * 1000).toFixed(seconds < 0.1 ? 1 : 0)} ms`;
}

// A time that has passed, in at most two units.
export function age(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

export function bytes(count) {
  if (count === null || count === undefined) return "–";
  return count >= 2 ** 30 ? `${(count / 2 ** 30).toFixed(1)} GiB` : `${(count / 2 ** 20).toFixed(0)} MiB`;
}
