// An answer of a diffusion model: a row of places that are filled in any order, and sometimes emptied again.

import { h, roving, visible } from "./dom.js";
import { tips } from "./tip.js";

export class CanvasText {
  constructor(place, onStep = () => {}) {
    this.place = place;
    this.onStep = onStep;
    this.cells = [];
    this.steps = []; // {step, filled, gone}: counts for the chart; gone: masked again, or replaced
    this.offsets = [];
    this.text = "";
    this.room = 0;
    this.end = null;
    place.classList.add("canvas");
    place.setAttribute("role", "group");
    place.setAttribute("aria-roledescription", "canvas of tokens");
    this.arrows = roving(place, () => [...place.querySelectorAll(".t:not([hidden])")]);
    tips(place, (span) => this.describe(this.cells[span.dataset.tip]), (span) => this.point(this.cells[span.dataset.tip].step), () => this.point(null));
  }

  /** What a chunk tells: text and offsets of the tokens that are final, and what its steps did to the canvas. */
  push(text, trace, canvas) {
    this.text += text ?? "";
    if (trace) this.offsets.push(...trace.offsets);
    if (!canvas) return;
    if (canvas.room > this.room) this.widen(canvas.room);
    for (const step of canvas.steps) this.apply(step);
  }

  widen(room) {
    const fresh = [];
    for (let index = this.room; index < room; index += 1) {
      const span = h("span", { class: "t masked", tabindex: -1, data: { tip: index } });
      this.cells.push({ index, span, token: null, text: "", step: null, past: [] });
      fresh.push(span);
    }
    this.place.append(...fresh);
    this.room = room;
    this.arrows.offer();
  }

  apply({ step, block, filled, remasked, end }) {
    const replaced = filled.filter(([place]) => this.cells[place].step !== null).length;
    this.steps.push({ step, filled: filled.length, gone: remasked.length + replaced });
    for (const place of remasked) this.empty(this.cells[place], step);
    for (const [place, token, text] of filled) this.fill(this.cells[place], step, token, text);
    this.place.style.setProperty("--steps", String(Math.max(step, 2)));
    this.open = block;
    this.cells.forEach((cell) => cell.span.classList.toggle("open", cell.index >= block[0] && cell.index < block[1]));
    if (end !== this.end) {
      this.end = end;
      for (const cell of this.cells) cell.span.hidden = end !== null && cell.index >= end;
      for (const cell of this.cells) if (end !== null && cell.index >= end) this.clear(cell);
    }
  }

  fill(cell, step, token, text) {
    if (cell.step !== null) cell.past.push({ text: cell.text, step: cell.step, until: step });
    Object.assign(cell, { token, text, step });
    cell.span.className = "t filled";
    cell.span.classList.toggle("again", cell.past.length > 0);
    cell.span.dataset.mark = String(step);
    cell.span.style.setProperty("--step", String(step - 1));
    cell.span.textContent = text;
    cell.span.classList.toggle("empty", text === "");
    cell.span.classList.add("fresh");
  }

  empty(cell, step) {
    cell.past.push({ text: cell.text, step: cell.step, until: step });
    this.clear(cell);
    cell.span.className = "t masked again fresh";
  }

  clear(cell) {
    Object.assign(cell, { token: null, text: "", step: null });
    cell.span.className = "t masked";
    delete cell.span.dataset.mark;
    cell.span.textContent = "";
  }

  /** The answer is whole: what lies behind its end goes, and each token gets exactly its part of the text. */
  finish() {
    const chars = [...this.text];
    this.cells.forEach((cell, index) => {
      cell.span.classList.remove("open", "fresh");
      if (index >= this.offsets.length) {
        cell.span.remove();
        return;
      }
      const own = chars.slice(this.offsets[index], this.offsets[index + 1] ?? chars.length).join("");
      if (own !== cell.text) {
        cell.text = own;
        cell.span.textContent = own;
      }
      cell.span.classList.toggle("empty", own === "");
    });
    this.cells.length = Math.min(this.cells.length, this.offsets.length);
    this.arrows.offer();
  }

  get filled() {
    return this.cells.filter((cell) => cell.step !== null).length;
  }

  get gone() {
    return this.steps.reduce((sum, step) => sum + step.gone, 0);
  }

  describe(cell) {
    const past = cell.past.slice(-4).map((one) => `${visible(one.text)} came in step ${one.step} and was taken back in step ${one.until}`);
    if (cell.past.length > past.length) past.unshift(`taken back ${cell.past.length} times, of which the last are:`);
    if (cell.step === null) return ["masked", "nothing stands here yet", ...past, `Place ${cell.index + 1}`];
    return [visible(cell.text), `Filled in step ${cell.step} of ${this.steps.length}`, ...past, `Place ${cell.index + 1}`];
  }

  /** Show which tokens came in one step. */
  point(step) {
    for (const cell of this.cells) cell.span.classList.toggle("together", step !== null && cell.step === step);
    this.onStep(step);
  }

  mark(place) {
    let before = 0;
    for (const cell of this.cells) {
      before += [...cell.text].length;
      if (before > place) {
        cell.span.classList.add("differs");
        return cell.span;
      }
    }
    return null;
  }
}
