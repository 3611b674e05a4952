// The page: what is asked, of whom, and what happens to the answers.

import { Failure, key, models } from "./api.js";
import { Answer } from "./answer.js";
import { alertCard } from "./errors.js";
import { announce, byId, h, number } from "./dom.js";
import { comparison } from "./compare.js";
import { dialogs, shortcuts } from "./keys.js";
import { pairs } from "./fields.js";
import { Pane } from "./pane.js";
import { themes } from "./themes.js";
import { hideTip, watchTips } from "./tip.js";
import { ORIGINS } from "./tokens.js";
import { watch } from "./status.js";

const EXAMPLES = {
  text: ["Write a short poem about the sea.", "List the numbers from one to twenty in words.", "Explain why the sky is blue to a child."],
  diffusion: ["Questions:\na) sum of 5 4 9 0 0\nb) 47 + 385\nc) reverse 3 7 2 8 4", "Questions:\na) largest of 12 85 40\nb) sort 5 2 9 1\nc) 612 - 75\nd) 24 * 7"],
};

const state = { cards: [], panes: [], comparing: false, turns: [], running: null };
const prompt = byId("prompt");
const scroll = byId("scroll");
const wide = matchMedia("(min-width: 60rem)"); // room for the settings beside the conversation

// ---- models and settings ------------------------------------------------------------------------------------------

async function load() {
  try {
    state.cards = await models();
  } catch (error) {
    if (error instanceof Failure && error.status === 401) askForKey(error.message);
    else showTrouble(error);
    return;
  }
  document.querySelector(".load-trouble")?.remove();
  if (state.panes.length) for (const pane of state.panes) pane.show(state.cards);
  else state.panes = ["A", "B"].map((name) => new Pane(name, state.cards, saySettings));
  if (!byId("panes").childElementCount) layPanes();
  showExamples();
  byId("send").disabled = false;
}

function showTrouble(error) {
  document.querySelector(".load-trouble")?.remove();
  const card = alertCard(error, { retry: () => load() });
  card.classList.add("load-trouble");
  byId("welcome").append(card);
}

function saySettings() {
  if (state.panes.length) showExamples();
  byId("compare").setAttribute("aria-pressed", String(state.comparing));
}

function layPanes() {
  const [a, b] = state.panes;
  byId("panes").replaceChildren(...(state.comparing ? [comparePanel(), a.element, b.element] : [a.element]));
  byId("panes").classList.toggle("two", state.comparing);
  document.body.classList.toggle("comparing", state.comparing);
  saySettings();
}

function comparePanel() {
  const [a, b] = state.panes;
  const options = pairs(a.card);
  const choice = h("select", { id: "pair" }, h("option", { value: "" }, "your own settings"), ...options.map(([name], index) => h("option", { value: index }, name)));
  choice.addEventListener("change", () => usePair(options[choice.value]));
  const turns = h("input", { type: "checkbox", id: "in-turn" });
  turns.checked = state.inTurn ?? false;
  turns.addEventListener("change", () => (state.inTurn = turns.checked));
  return h("section", { class: "pane pair", "aria-label": "Comparison" },
    h("div", { class: "field" }, h("label", { for: "pair" }, "Compare"), choice),
    h("div", { class: "field kind-toggle" }, h("div", { class: "field-top" }, h("label", { for: "in-turn" }, "One after the other")), h("div", { class: "field-inputs" }, turns),
      h("p", { class: "help" }, "Else both run at once and share the machine.")),
    h("button", { type: "button", on: { click: () => b.copy(a) } }, "Copy A’s settings to B"),
  );
}

function usePair(pair) {
  if (!pair) return;
  const [a, b] = state.panes;
  const used = new Set(pairs(a.card).flatMap(([, ...wishes]) => wishes.flatMap(Object.keys)));
  for (const name of used) a.set(name, undefined);
  b.copy(a);
  for (const [pane, wishes] of [[a, pair[1]], [b, pair[2]]]) for (const [name, value] of Object.entries(wishes)) pane.set(name, value);
}

function compareOn(on = !state.comparing) {
  if (!state.panes.length) return;
  state.comparing = on;
  const [a, b] = state.panes;
  layPanes();
  if (!on) return;
  b.copy(a);
  const [first] = pairs(a.card);
  if (first) {
    usePair(first);
    byId("pair").value = "0";
  }
}

// ---- asking -------------------------------------------------------------------------------------------------------

function history(pane, before) {
  return state.turns.slice(0, before).flatMap((turn) => {
    const answer = turn.answers.find((one) => one.pane === pane) ?? turn.answers[0];
    return [{ role: "user", content: turn.text }, ...(answer?.text ? [{ role: "assistant", content: answer.text }] : [])];
  });
}

async function send(text = prompt.value.trim()) {
  if (!text || state.running || !state.panes.length) return;
  const turn = { text, answers: [], element: null };
  state.turns.push(turn);
  prompt.value = "";
  grow();
  byId("welcome").hidden = true;
  await answerTurn(turn);
}

async function answerTurn(turn) {
  const at = state.turns.indexOf(turn);
  const panes = state.comparing ? state.panes : state.panes.slice(0, 1);
  // Two answers can only be the same if their seed is; one alone leaves it to the server.
  const seed = panes.length > 1 ? Math.floor(Math.random() * 2 ** 31) : undefined;
  turn.answers = panes.map((pane) => {
    const messages = [...history(pane, at), { role: "user", content: turn.text }];
    const hooks = { retry: () => regenerate(turn), flag: (param, quiet) => flag(pane, param, quiet), changed: follow, restart: newChat };
    return new Answer(pane, pane.request(messages, seed), hooks, panes.length > 1);
  });
  showTurn(turn);
  setRunning(new AbortController());
  const { signal } = state.running;
  announce(panes.length > 1 ? "Two answers begin." : "The answer begins.");
  if (panes.length > 1 && state.inTurn) for (const answer of turn.answers) await answer.run(signal);
  else await Promise.all(turn.answers.map((answer) => answer.run(signal)));
  setRunning(null);
  if (turn.answers.length > 1) turn.element.append(comparison(...turn.answers));
  if (turn.answers.some((answer) => answer.error?.status === 401)) askForKey();
  if (turn.answers.some((answer) => answer.error?.retried)) watch(load);
  announce(turn.answers.map(spoken).join(" "));
  follow();
}

function spoken(answer) {
  const name = answer.request && state.comparing ? `Answer ${answer.pane.name}` : "Answer";
  if (answer.error) return `${name} failed: ${answer.error.message}`;
  return `${name}, ${number(answer.tokens)} tokens: ${answer.text.slice(0, 2000)}`;
}

function showTurn(turn) {
  const edit = h("button", { type: "button", class: "plain edit", on: { click: () => takeBack(turn) } }, "Edit");
  const question = h("div", { class: "question" }, h("p", null, turn.text), edit);
  const fresh = h("li", { class: "turn", data: { count: turn.answers.length } }, question, h("div", { class: "answers" }, ...turn.answers.map((answer) => answer.element)));
  if (turn.element) turn.element.replaceWith(fresh);
  else byId("turns").append(fresh);
  turn.element = fresh;
  stuck = true;
  follow();
}

function regenerate(turn) {
  if (state.running) return;
  forget(state.turns.indexOf(turn) + 1);
  answerTurn(turn);
}

/** Put a question back into the field, to be asked otherwise; it and what came after it go. */
function takeBack(turn) {
  if (state.running) return;
  prompt.value = turn.text;
  grow();
  forget(state.turns.indexOf(turn));
  prompt.focus();
}

function forget(from) {
  for (const turn of state.turns.splice(from)) turn.element?.remove();
  byId("welcome").hidden = state.turns.length > 0;
}

function setRunning(controller) {
  state.running = controller;
  byId("stop").hidden = !controller;
  byId("send").hidden = Boolean(controller);
  document.body.classList.toggle("busy", Boolean(controller));
}

function stop() {
  state.running?.abort();
}

/** A field that the server has refused: its control is marked, and unless `quiet` shown and focused. Is there one? */
function flag(pane, param, quiet = false) {
  const control = param ? pane.flag(param) : null;
  if (control && !quiet) {
    openSettings(true);
    control.scrollIntoView({ block: "center" });
    control.focus();
  }
  return control !== null;
}

// ---- the page around it ---------------------------------------------------------------------------------------------

let stuck = true; // to the end of the conversation

function follow() {
  if (stuck) scroll.scrollTop = scroll.scrollHeight;
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight + 2, 200)}px`;
}

function openSettings(on = !document.body.classList.contains("settings-open")) {
  document.body.classList.toggle("settings-open", on);
  byId("open-settings").setAttribute("aria-expanded", String(on));
}

function showExamples() {
  const card = state.panes[0].card;
  const texts = EXAMPLES[card.diffusion ? "diffusion" : "text"];
  const kinds = card.diffusion ? [["masked", "", "not written yet"], ["filled", "a", "filled in early"], ["filled late", "z", "filled in late"]] : Object.entries(ORIGINS).map(([letter, { name }]) => [`t-${letter}`, letter, name]);
  byId("welcome-legend").replaceChildren(...kinds.map(([kind, letter, name]) => h("li", null, h("span", { class: `swatch ${kind}`, "aria-hidden": "true" }, letter), name)));
  byId("examples").replaceChildren(...texts.map((text) => h("li", null, h("button", { type: "button", on: { click: () => send(text) } }, text))));
}

function askForKey(note) {
  if (note) byId("key-note").textContent = note;
  byId("key").value = key.get();
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

function newChat() {
  stop();
  forget(0);
  prompt.focus();
}

const commands = {
  send: () => send(),
  stop: () => {
    hideTip();
    if (!wide.matches) openSettings(false);
    stop();
  },
  newChat,
  compare: () => compareOn(),
  settings: () => openSettings(),
  regenerate: () => state.turns.length && regenerate(state.turns.at(-1)),
  prompt: () => prompt.focus(),
};

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("input", grow);
scroll.addEventListener("scroll", () => (stuck = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 40), { passive: true });
byId("stop").addEventListener("click", stop);
byId("new-chat").addEventListener("click", newChat);
byId("compare").addEventListener("click", () => compareOn());
byId("open-settings").addEventListener("click", () => openSettings());
byId("close-settings").addEventListener("click", () => {
  openSettings(false);
  byId("open-settings").focus();
});
byId("open-key").addEventListener("click", () => askForKey());
dialogs({ keyed: () => load() });
shortcuts(commands);
themes();
watchTips();
openSettings(wide.matches);
wide.addEventListener("change", () => openSettings(wide.matches));
byId("send").disabled = true;
watch(load);
