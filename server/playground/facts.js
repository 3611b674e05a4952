// What is said of an answer as a whole: how its tokens came about, and whether it may be another than the model's own.

import { h, number } from "./dom.js";
import { ORIGINS } from "./tokens.js";

/** The legend, which counts too. */
export function legend(answer) {
  if (answer.card.diffusion) return canvasLegend(answer.view);
  const { counts } = answer.view;
  const drafted = counts.d + counts.c + counts.b > 0;
  return Object.entries(ORIGINS)
    .filter(([letter]) => counts[letter] > 0 || (drafted && letter !== "p"))
    .map(([letter, { name, long }]) => h("li", { title: long }, h("span", { class: `swatch t-${letter}`, "aria-hidden": "true" }, letter), `${name} `, h("b", null, number(counts[letter]))));
}

function canvasLegend(view) {
  if (!view.steps.length) return [];
  const items = [h("li", null, "step 1 ", h("span", { class: "scale", "aria-hidden": "true" }), ` ${number(view.steps.length)}`)];
  if (view.end === null || view.filled < Math.min(view.room, view.end)) {
    const left = Math.min(view.room, view.end ?? view.room) - view.filled;
    if (left > 0) items.push(h("li", null, h("span", { class: "swatch masked", "aria-hidden": "true" }), "masked ", h("b", null, number(left))));
  }
  if (view.gone) items.push(h("li", null, h("span", { class: "swatch again", "aria-hidden": "true" }), "taken back or replaced ", h("b", null, number(view.gone))));
  return items;
}

function knobs(values) {
  return Object.entries(values ?? {}).map(([name, value]) => `, ${name.replaceAll("_", " ")} ${number(value, Number.isInteger(value) ? 0 : 2)}`).join("");
}

/** {badge, kind, note}: in a word and in a sentence. */
export function verdict(answer) {
  const { speculation, diffusion } = answer.stats;
  if (diffusion) return { badge: `${diffusion.rule}${knobs(diffusion.knobs)} · cache ${diffusion.cache}`, kind: "neutral", note: "" };
  const asked = answer.request.speculation ?? {};
  if (!speculation) return { badge: asked.enabled === false ? "no drafts" : (asked.verifier ?? ""), kind: "neutral", note: "" };
  if (!speculation.rounds) return { badge: "plain decoding", kind: "neutral", note: "" };
  const name = `${speculation.verifier}${knobs(speculation.knobs)}`;
  if (!speculation.lossy) return { badge: `${name} · lossless`, kind: "good", note: "" };
  const measured = `${number(100 * speculation.bias, 2)} %`;
  const greedy = speculation.decoder === "relaxed_greedy";
  const bound = speculation.bias_bound === null ? "" : `, never more than ${number(100 * speculation.bias_bound)} %`;
  const note = greedy
    ? `Relaxed: ${measured} of its tokens are not the model’s first choice.`
    : `Relaxed: on average the law of a token was moved by ${measured}${bound} (total variation).`;
  return { badge: `${name} · relaxed`, kind: "warn", note };
}
