// Light, dark, or as the system says; kept for the next visit. `theme.js` applies it before the first paint.

import { byId } from "./dom.js";

const NAMES = { system: "as the system says", light: "light", dark: "dark" };

function chosen() {
  return document.documentElement.dataset.theme ?? "system";
}

function use(name) {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  try {
    if (name === "system") localStorage.removeItem("slipstream-theme");
    else localStorage.setItem("slipstream-theme", name);
  } catch {
    // It holds for this visit then.
  }
  say();
}

function say() {
  byId("theme-text").textContent = `Theme: ${NAMES[chosen()]}`;
  byId("theme").title = `Theme: ${NAMES[chosen()]}`;
}

export function themes() {
  const order = ["system", "light", "dark"];
  byId("theme").addEventListener("click", () => use(order[(order.indexOf(chosen()) + 1) % order.length]));
  say();
}
