// The keyboard, and the dialogs that it opens.

import { key } from "./api.js";
import { byId, h } from "./dom.js";

const LIST = [
  ["Enter", "send, from the message field"],
  ["Shift+Enter", "a new line in it"],
  ["Ctrl+Enter or ⌘+Enter", "send, from anywhere"],
  ["Esc", "stop the answer; close what is open"],
  ["Alt+M", "to the message field"],
  ["Alt+R", "answer the last question again"],
  ["Alt+C", "two answers side by side"],
  ["Alt+S", "show or hide the settings"],
  ["Alt+N", "new chat"],
  ["Alt+K", "this list"],
  ["← → Home End", "in an answer or a chart: from token to token, with what is known of it"],
];
const ALT = { KeyM: "prompt", KeyR: "regenerate", KeyC: "compare", KeyS: "settings", KeyN: "newChat", KeyK: "help" };

export function shortcuts(commands) {
  byId("keys").replaceChildren(...LIST.flatMap(([names, text]) => [h("dt", null, h("kbd", null, names)), h("dd", null, text)]));
  const help = () => byId("help-dialog").showModal();
  byId("open-help").addEventListener("click", help);
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    const inPrompt = event.target === byId("prompt");
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey || (inPrompt && !event.shiftKey && !event.altKey))) {
      event.preventDefault();
      commands.send();
    } else if (event.key === "Escape") commands.stop();
    else if (event.altKey && !event.ctrlKey && !event.metaKey && ALT[event.code]) {
      event.preventDefault();
      (commands[ALT[event.code]] ?? help)();
    }
  });
}

export function dialogs({ keyed }) {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }
  const use = (value) => {
    key.set(value);
    keyed();
  };
  // The policy lets no form be sent, and a dialog's form is none the less one: close it by hand.
  for (const form of document.querySelectorAll("dialog form")) {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      form.closest("dialog").close();
      if (form.id === "key-form") use(byId("key").value.trim());
    });
  }
  byId("key-forget").addEventListener("click", () => {
    byId("key").value = "";
    byId("key-dialog").close();
    use("");
  });
}
