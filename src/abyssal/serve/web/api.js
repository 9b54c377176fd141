// Requests to this server, with the key where there is one, and errors that a person can read.

import { tab } from "./stored.js";

export class ApiError extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export const key = {
  get: () => tab.get("key") ?? "",
  set: (value) => (value ? tab.set("key", value) : tab.remove("key")),
};

const MEANINGS = {
  401: "The server wants an API key.",
  402: "The balance of this key is spent.",
  403: "This key may not do that.",
  413: "The message is too large for this server.",
  429: "Too many requests with this key.",
  503: "The server is starting, draining or overloaded.",
};

/** A response of status 2xx, or an ApiError. */
export async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  // A header's value is bytes: a key with other characters is none, and fetch would fail without a word about it.
  if (key.get() && /^[\x21-\x7e]+$/.test(key.get())) headers.set("Authorization", `Bearer ${key.get()}`);
  if (options.body) headers.set("Content-Type", "application/json");
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  throw await failure(response);
}

async function failure(response) {
  const text = await response.text().catch(() => "");
  let said = "";
  try {
    said = errorMessage(JSON.parse(text));
  } catch {
    // no JSON: the status has to do
  }
  const lead = MEANINGS[response.status];
  const message = [lead, said].filter(Boolean).join(" ") || `The server answered ${response.status}.`;
  return new ApiError(response.status, message, Number(response.headers.get("Retry-After")) || undefined);
}

/** The sentence in an error's body, in OpenAI's shape; empty where there is none. */
export function errorMessage(body) {
  const message = body?.error?.message ?? body?.detail ?? "";
  return typeof message === "string" ? message : "";
}
