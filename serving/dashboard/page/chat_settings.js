// The fields beside the chat. An empty field is left out of requests, so that the server's default holds.

import { request } from "./stream.js";

const ITEM = "dispec-chat-settings";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const DEFAULTS = { temperature: "1", top_p: "1", max_tokens: "all that fit", seed: "random" };

const element = (id) => document.getElementById(id);
const field = (name) => element(`chat-${name.replace("_", "-")}`);
let maxModelLen = null;

export function startSettings() {
  for (const [name, value] of Object.entries(restored())) if (field(name)) field(name).value = value;
  element("chat-settings").addEventListener("input", () => {
    const values = Object.fromEntries(["system", ...NUMBERS].map((name) => [name, field(name).value]));
    try {
      sessionStorage.setItem(ITEM, JSON.stringify(values));
    } catch {
      // Without room, the settings end with the page.
    }
    findWrongField();
  });
  loadDefaults().catch(() => {}); // as while the model is loading: the first question asks again
}

function restored() {
  try {
    return JSON.parse(sessionStorage.getItem(ITEM)) ?? {};
  } catch {
    return {};
  }
}

// Returns the length of the model's context, and shows the defaults of the server in empty fields.
export async function loadDefaults(signal) {
  if (maxModelLen === null) {
    const info = await (await request("/model_info", { signal })).json();
    maxModelLen = info.max_model_len;
    field("max_tokens").max = maxModelLen;
    for (const name of NUMBERS) field(name).placeholder = info.preferred_sampling_params[name] ?? DEFAULTS[name];
  }
  return maxModelLen;
}

// Forgets the model, because another server may answer the next request.
export function forgetDefaults() {
  maxModelLen = null;
}

export const systemPrompt = () => field("system").value.trim();

export function samplingFields() {
  const given = NUMBERS.filter((name) => field(name).value !== "");
  return Object.fromEntries(given.map((name) => [name, field(name).valueAsNumber]));
}

// Returns the first field with a value beyond its limits, after showing what is wrong; null without.
export function findWrongField() {
  const wrong = NUMBERS.map(field).find(isWrong) ?? null;
  for (const input of NUMBERS.map(field)) input.setAttribute("aria-invalid", String(input === wrong));
  element("chat-wrong").textContent = wrong === null ? "" : `${wrong.labels[0].textContent.trim()}: ${limits(wrong)}`;
  element("chat-wrong").hidden = wrong === null;
  return wrong;
}

// Browsers miss fractions where the step is counted from a large number.
const isWrong = (input) =>
  !input.checkValidity() || (input.step === "1" && input.value !== "" && !Number.isInteger(input.valueAsNumber));

function limits({ min, max, step }) {
  const kind = step === "1" ? "a whole number" : "a number";
  return max === "" ? `${kind}, at least ${min}` : `${kind} between ${min} and ${max}`;
}
