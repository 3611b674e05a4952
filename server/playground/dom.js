// Elements without markup: everything that a server or a model says becomes a text node or an attribute.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "vars") for (const [key, amount] of Object.entries(value)) element.style.setProperty(key, amount);
    else if (name === "data") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

/** An HTML element. Properties are attributes, besides `on` (listeners), `vars` (CSS variables) and `data`. */
export function h(tag, properties, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same for SVG. */
export function s(tag, properties, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

export function byId(id) {
  return document.getElementById(id);
}

/** Say something to screen readers, once. */
export function announce(text) {
  byId("live").textContent = text;
}

export function number(value, digits = 0) {
  return Number.isFinite(value) ? value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }) : "–";
}

export function seconds(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${number(milliseconds / 1000, 2)} s`;
}

/** A token's text where white space has to be seen. */
export function visible(text) {
  return text === "" ? "(no text)" : `“${text.replaceAll("\n", "⏎").replaceAll("\t", "⇥")}”`;
}

/** Run `task` once before the next frame, however often it is asked for; `now` runs what is due at once. */
export function perFrame(task) {
  let frame = 0;
  const run = () => {
    frame = 0;
    task();
  };
  const ask = () => {
    if (!frame) frame = requestAnimationFrame(run);
  };
  ask.now = () => {
    cancelAnimationFrame(frame);
    run();
  };
  return ask;
}

/** One tab stop for many small things: the arrow keys, Home and End move among the elements that `items` lists. */
export function roving(container, items) {
  let current = null;
  const move = (element) => {
    if (current) current.tabIndex = -1;
    current = element;
    element.tabIndex = 0;
    element.focus({ preventScroll: false });
  };
  container.addEventListener("keydown", (event) => {
    const list = items();
    const at = list.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const to = step ? at + step : { Home: 0, End: list.length - 1 }[event.key];
    if (at < 0 || to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    if (list[to]) move(list[to]);
  });
  return {
    /** Make sure that Tab finds something in here. */
    offer() {
      if (current?.isConnected) return;
      current = items()[0] ?? null;
      if (current) current.tabIndex = 0;
    },
    move,
  };
}
