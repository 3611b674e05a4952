// Runs before the first paint, so that a chosen theme does not flash. The choice is light, dark, or the system's.
"use strict";
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("slipstream-theme");
  } catch {
    // Storage may be switched off; the system's theme it is.
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
