// Two answers to one prompt, in one line: which was faster, and where they part.

import { h, number, visible } from "./dom.js";

/** Index of the first code point in which two texts differ; -1 where they are the same. */
export function parting(one, other) {
  const a = [...one];
  const b = [...other];
  const most = Math.min(a.length, b.length);
  for (let index = 0; index < most; index += 1) if (a[index] !== b[index]) return index;
  return a.length === b.length ? -1 : most;
}

function around(text, place) {
  const part = [...text].slice(place, place + 16).join("");
  return part ? visible(part) : "its end";
}

/** The line below two finished answers; their first difference is marked in both. */
export function comparison(a, b) {
  if (a.state !== "done" || b.state !== "done") return h("p", { class: "comparison" }, "One of the two has no whole answer, so there is nothing to compare.");
  const [fast, slow] = a.speed >= b.speed ? [a, b] : [b, a];
  const ratio = fast.speed / slow.speed;
  const parts = [];
  const speeds = `${number(a.speed, 1)} and ${number(b.speed, 1)} tokens/s`;
  if (Number.isFinite(ratio)) {
    parts.push(h("span", { class: "ratio" }, h("b", null, ratio < 1.005 ? "Equally fast" : `${fast.pane.name} is ${number(ratio, 2)}× faster`), ` (${speeds})`));
  }
  const place = parting(a.text, b.text);
  if (place < 0) parts.push(h("span", { class: "same" }, h("b", null, "Same text")));
  else {
    const marks = [a.view.mark(place), b.view.mark(place)];
    const go = () => marks.find(Boolean)?.scrollIntoView({ block: "center" });
    parts.push(h("span", { class: "parts" }, h("b", null, `First difference at character ${number(place + 1)}: `), `A ${around(a.text, place)}, B ${around(b.text, place)} `,
      h("button", { type: "button", class: "plain", on: { click: go } }, "Show")));
  }
  return h("p", { class: "comparison", data: { same: String(place < 0) } }, ...parts);
}
