// Small pictures of numbers, drawn as SVG and grown as the numbers come. Every bar says its number in words too.

import { h, roving, s } from "./dom.js";
import { tips } from "./tip.js";
import { ORIGINS } from "./tokens.js";

const HEIGHT = 44;
const BAR = 9;
const STEP = 11;

/** A row of bars that scrolls sideways; `describe(index)` gives a bar's lines, `point(index or null)` hears of it. */
class Strip {
  constructor(label, describe, point) {
    this.bars = [];
    this.svg = s("svg", { class: "strip", height: HEIGHT + 2, width: 0, role: "group", "aria-label": label });
    this.element = h("div", { class: "strip-scroll" }, this.svg);
    this.arrows = roving(this.svg, () => this.bars);
    tips(this.svg, (bar) => describe(Number(bar.dataset.tip)), (bar) => point(Number(bar.dataset.tip)), () => point(null));
  }

  add(index, name, parts) {
    const fresh = s("g", { class: "bar", tabindex: -1, role: "img", "aria-label": name, data: { tip: index } },
      s("rect", { class: "bar-hit", x: index * STEP, y: 0, width: STEP, height: HEIGHT + 2 }), ...parts);
    if (this.bars[index]) this.bars[index].replaceWith(fresh);
    else this.svg.append(fresh);
    this.bars[index] = fresh;
    const width = this.bars.length * STEP + 2;
    this.svg.setAttribute("width", String(width));
    this.element.scrollLeft = width;
    this.arrows.offer();
  }

  highlight(index) {
    this.lit?.classList.remove("lit");
    this.lit = index === null ? null : this.bars[index];
    this.lit?.classList.add("lit");
  }
}

function rect(kind, index, y, height) {
  return s("rect", { class: kind, x: index * STEP + 1, y, width: BAR, height: Math.max(0, height), rx: 1.5 });
}

/** Rounds as they come: what was drafted (outline), what of it stood (filled), and the model's own token on top. */
export class Timeline {
  constructor(point) {
    this.rounds = [];
    this.most = 3;
    this.strip = new Strip("Rounds, in the order of their coming", (index) => this.lines(index), (index) => point(index === null ? null : this.rounds[index]));
    this.caption = h("figcaption", null, "Steps: nothing was drafted");
    this.element = h("figure", { class: "chart" }, this.caption, this.strip.element);
    this.sizes = [];
  }

  show(rounds) {
    this.rounds = rounds;
    const changed = (round, index) => this.sizes[index] !== round.tokens.length;
    const most = Math.max(this.most, ...rounds.slice(this.sizes.length).map((round) => round.drafted ?? round.stood));
    if (most > this.most) this.sizes = []; // another scale: all bars are drawn anew
    this.most = most;
    this.unit = HEIGHT / (most + 1);
    for (const [index, round] of rounds.entries()) {
      if (index < this.sizes.length - 1 || !changed(round, index)) continue;
      this.sizes[index] = round.tokens.length;
      if (round.drafted) this.caption.textContent = "Rounds: drafted (outline), accepted (filled), and the model’s own on top";
      this.strip.add(index, this.lines(index).join(". "), this.parts(round, index));
    }
  }

  parts(round, index) {
    const parts = [];
    const draft = round.drafted ?? round.stood;
    const from = HEIGHT + 1;
    if (draft) parts.push(rect("draft", index, from - draft * this.unit, draft * this.unit));
    if (round.stood) parts.push(rect("o-d", index, from - round.stood * this.unit, round.stood * this.unit));
    if (round.own) parts.push(rect(`o-${round.own}`, index, from - (round.stood + 1) * this.unit, this.unit - 1));
    return parts;
  }

  lines(index) {
    const round = this.rounds[index];
    if (!round.drafted && !round.stood) return [`Step ${index + 1}`, "nothing was drafted", "1 token"];
    const own = round.own ? `then one ${ORIGINS[round.own].name}` : "the answer ended inside it";
    return [`Round ${index + 1}`, `${round.stood} of ${round.drafted ?? "?"} drafted tokens stood`, own];
  }

  highlight(round) {
    this.strip.highlight(round === null ? null : round.index);
  }
}

/** Denoise steps as they come: tokens filled in above the line, tokens taken back below it. */
export class Passes {
  constructor(point) {
    this.steps = [];
    this.shown = 0;
    this.most = 1;
    this.strip = new Strip("Denoise steps, in their order", (index) => this.lines(index), (index) => point(index === null ? null : this.steps[index].step));
    this.element = h("figure", { class: "chart" }, h("figcaption", null, "Tokens filled in by step"), this.strip.element);
  }

  show(steps) {
    this.steps = steps;
    const most = Math.max(1, ...steps.map((step) => step.filled + step.gone));
    if (most > this.most) {
      this.most = most;
      this.shown = 0;
    }
    this.strip.svg.style.setProperty("--steps", String(Math.max(steps.length, 2)));
    for (; this.shown < steps.length; this.shown += 1) this.strip.add(this.shown, this.lines(this.shown).join(". "), this.parts(steps[this.shown], this.shown));
  }

  parts(step, index) {
    const unit = HEIGHT / this.most;
    const filled = rect("filled-bar", index, HEIGHT + 1 - (step.filled + step.gone) * unit, step.filled * unit);
    filled.style.setProperty("--step", String(step.step - 1));
    return step.gone ? [filled, rect("gone-bar", index, HEIGHT + 1 - step.gone * unit, step.gone * unit)] : [filled];
  }

  lines(index) {
    const step = this.steps[index];
    return [`Step ${step.step}`, `${step.filled} ${step.filled === 1 ? "token" : "tokens"} filled in`, step.gone ? `${step.gone} taken back` : ""].filter(Boolean);
  }

  highlight(step) {
    const index = step === null ? -1 : this.steps.findIndex((one) => one.step === step);
    this.strip.highlight(index < 0 ? null : index);
  }
}

/** How many rounds had so many drafted tokens accepted; the number stands on each bar. */
export function histogram(counts) {
  const most = Math.max(1, ...counts);
  const wide = 26;
  const high = 40;
  const bars = counts.flatMap((count, stood) => {
    const height = (count / most) * high;
    const x = stood * wide;
    return [
      s("rect", { class: "o-d", x: x + 3, y: 14 + high - height, width: wide - 6, height: Math.max(height, count ? 1.5 : 0), rx: 2 }),
      s("text", { class: "bar-number", x: x + wide / 2, y: 10 + high - height, "text-anchor": "middle" }, String(count)),
      s("text", { class: "bar-name", x: x + wide / 2, y: high + 28, "text-anchor": "middle" }, String(stood)),
    ];
  });
  const words = counts.map((count, stood) => `${stood} accepted: ${count}`).join("; ");
  return h("figure", { class: "chart" },
    h("figcaption", null, "Rounds by tokens accepted"),
    h("div", { class: "strip-scroll", tabindex: 0, role: "group", "aria-label": "Histogram" },
      s("svg", { class: "histogram", width: counts.length * wide, height: high + 32, role: "img", "aria-label": `Rounds by accepted tokens. ${words}` },
        s("line", { class: "axis", x1: 0, x2: counts.length * wide, y1: 14 + high + 0.5, y2: 14 + high + 0.5 }), ...bars)));
}
