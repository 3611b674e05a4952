// What the page asks of the server. All of it lies beside this file's folder, whatever prefix a proxy adds.

import { events } from "./sse.js";

const ROOT = new URL("../../", import.meta.url);
const KEY = "slipstream-key";
const AWAY = new Set(["engine_unavailable", "overloaded", "draining"]); // codes of a 503 that comes in the middle of a stream
const RETRIED = new Set([408, 409, 429, 502, 503, 504]);

export const key = {
  get() {
    try {
      return sessionStorage.getItem(KEY) ?? "";
    } catch {
      return "";
    }
  },
  set(value) {
    try {
      if (value) sessionStorage.setItem(KEY, value);
      else sessionStorage.removeItem(KEY);
    } catch {
      // Without storage the key can't be kept.
    }
  },
};

/** What went wrong, in the server's words where it has any. `status` 0: nobody answered. */
export class Failure extends Error {
  constructor(status, message, { param = null, code = null, retryAfter = null, id = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter, id });
  }

  get retried() {
    return this.status === 0 || RETRIED.has(this.status);
  }
}

function headers(more) {
  const own = key.get();
  return own ? { ...more, Authorization: `Bearer ${own}` } : { ...more };
}

export function url(path) {
  return new URL(path, ROOT);
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(url(path), { cache: "no-store", credentials: "same-origin", referrerPolicy: "no-referrer", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "The server does not answer. It may have been stopped, or the network is down.");
  }
  if (response.ok) return response;
  throw await failure(response);
}

async function failure(response) {
  const wait = response.headers.get("retry-after");
  const told = {
    retryAfter: wait !== null && /^\d+$/.test(wait) ? Number(wait) : null,
    id: response.headers.get("x-request-id"),
  };
  let message = `The server answered with status ${response.status}.`;
  try {
    const { error } = await response.json();
    message = error.message ?? message;
    Object.assign(told, { param: error.param, code: error.code });
  } catch {
    // No JSON: a proxy's own page, of which nothing is shown.
  }
  return new Failure(response.status, message, told);
}

export async function models() {
  const response = await ask("v1/models", { headers: headers() });
  return (await response.json()).data;
}

/** {state, text}: ready, degraded, starting, draining or gone. */
export async function readiness() {
  let response;
  try {
    response = await fetch(url("ready"), { cache: "no-store" });
  } catch {
    return { state: "gone", text: "no answer" };
  }
  const told = await response.json().catch(() => ({}));
  const reason = told.reason ?? "";
  if (response.ok) return { state: told.status === "degraded" ? "degraded" : "ready", text: reason || "ready" };
  return { state: /drain|shutting/i.test(reason) ? "draining" : "starting", text: reason || "not ready" };
}

/** The chunks of a streamed chat. Throws Failure, or AbortError where `signal` says stop. */
export async function* chat(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json", Accept: "text/event-stream" }),
    body: JSON.stringify(body),
    signal,
  });
  let ended = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        ended = true;
        continue;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Failure(AWAY.has(chunk.error.code) ? 503 : 500, chunk.error.message, { ...chunk.error, id: response.headers.get("x-request-id") });
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Failure) throw error;
    throw new Failure(0, "The connection broke in the middle of the answer.");
  }
  if (!ended) throw new Failure(0, "The answer ended before its end: the server has gone.");
}

/** The same request for a terminal. */
export function curl(body) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const auth = key.get() ? ` \\\n  -H "Authorization: Bearer $SLIPSTREAM_API_KEY"` : "";
  return `curl -N ${url("v1/chat/completions")} \\\n  -H 'Content-Type: application/json'${auth} \\\n  -d '${quoted}'`;
}
