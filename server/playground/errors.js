// What went wrong, for a person: what happened, which setting it is about, and what can be done.

import { h } from "./dom.js";

const TITLES = {
  0: "No connection",
  400: "The server refuses this request",
  401: "An API key is needed",
  403: "Not allowed",
  404: "Not found",
  413: "The request is too large",
  429: "Too many requests",
  500: "The server failed",
  503: "The server is not available",
};

/** A card with the message, the field it names, and a way on. `retry`, `show` (the setting, if
 *  there is one) and `restart` are what its buttons do. */
export function alertCard(error, { retry, show, restart }) {
  const buttons = h("div", { class: "alert-row" });
  const card = h("div", { class: "alert", role: "alert" },
    h("strong", null, error.code === "draining" ? "The server is shutting down" : (TITLES[error.status] ?? TITLES[error.status >= 500 ? 500 : 400])),
    h("p", null, error.message),
    error.param ? h("p", { class: "alert-param" }, "Field: ", h("code", null, error.param)) : null,
    error.id ? h("p", { class: "alert-id" }, "Request id: ", h("code", null, error.id)) : null,
    buttons,
  );
  if (show) buttons.append(h("button", { type: "button", on: { click: show } }, "Show the setting"));
  if (restart && error.code === "context_length_exceeded") buttons.append(h("button", { type: "button", on: { click: restart } }, "New chat"));
  if (error.retried) buttons.append(retryButton(retry, error.retryAfter));
  return card;
}

function retryButton(retry, wait) {
  const button = h("button", { type: "button", class: "primary", on: { click: retry } }, "Try again");
  let left = wait ?? 0;
  const tick = () => {
    if (left <= 0 || (!button.isConnected && button.dataset.seen)) {
      button.textContent = "Try again";
      button.disabled = false;
      return;
    }
    if (button.isConnected) button.dataset.seen = "yes";
    button.disabled = true;
    button.textContent = `Try again in ${left} s`;
    left -= 1;
    setTimeout(tick, 1000);
  };
  tick();
  return button;
}
