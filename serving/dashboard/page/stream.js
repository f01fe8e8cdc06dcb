// Requests to the server with the API key, and server-sent events. These are read from a fetch, because an EventSource
// cannot send the key.

const KEY_ITEM = "dispec-api-key";

export class HttpError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY_ITEM, key);
}

export function hasKey() {
  return sessionStorage.getItem(KEY_ITEM) !== null;
}

export async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY_ITEM);
  const headers = { ...options.headers, ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (!response.ok) throw new HttpError(response.status, await errorMessage(response));
  return response;
}

async function errorMessage(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${response.status} ${response.statusText}: ${text.slice(0, 300)}`;
  }
}

// Yields the data of each event as text. `onData` is called for each piece of the body, comments included.
export async function* events(response, onData = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    onData();
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice(5).trimStart();
    }
  }
}
