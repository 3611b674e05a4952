// Is the server there? Asked now and then, and at once when something has failed.

import { readiness } from "./api.js";
import { byId } from "./dom.js";

const CALM = 15000;
const WORRIED = 2500;
const WORDS = { ready: "ready", degraded: "degraded", starting: "starting", draining: "shutting down", gone: "not reachable" };

let timer = 0;
let latest = "waiting";

/** Ask now, and go on asking. `onBack` is called when a server that was not ready is ready again. */
export async function watch(onBack) {
  clearTimeout(timer);
  const { state, text } = await readiness();
  const status = byId("status");
  status.dataset.state = state;
  status.title = text;
  byId("status-text").textContent = WORDS[state];
  const back = state === "ready" && latest !== "ready";
  latest = state;
  clearTimeout(timer);
  timer = setTimeout(() => watch(onBack), document.hidden ? 4 * CALM : state === "ready" ? CALM : WORRIED);
  if (back) await onBack();
}
