// One answer: its text by tokens, what is known of it, and what can be done with it.

import { CanvasText } from "./canvas.js";
import { Passes, Timeline, histogram } from "./charts.js";
import { Failure, chat, curl } from "./api.js";
import { h, number, perFrame, seconds } from "./dom.js";
import { alertCard } from "./errors.js";
import { legend, verdict } from "./facts.js";
import { reading } from "./markdown.js";
import { TokenText } from "./tokens.js";

export class Answer {
  /** `hooks`: retry(), restart(), changed(), and flag(param, quiet), which says whether there is a control for it. */
  constructor(pane, request, hooks, compared) {
    this.pane = pane;
    this.request = request;
    this.hooks = hooks;
    this.card = pane.card;
    this.text = "";
    this.thoughts = "";
    this.calls = [];
    this.stats = {};
    this.state = "waiting";
    this.build(compared);
    this.refresh = perFrame(() => this.summarise());
  }

  build(compared) {
    this.thinking = h("div", { class: "text" });
    this.reasoning = h("details", { class: "reasoning", hidden: true }, (this.thought = h("summary", null, "Reasoning")), this.thinking);
    this.body = h("div", { class: "text said" });
    this.read = h("div", { class: "reading", hidden: true });
    this.tools = h("div", { class: "calls" });
    this.trouble = h("div");
    this.facts = h("dl", { class: "facts" });
    this.legend = h("ul", { class: "legend", "aria-label": "Where its tokens came from" });
    this.note = h("p", { class: "verdict", hidden: true });
    this.charts = h("div", { class: "charts" });
    this.badge = h("span", { class: "badge" });
    this.element = h("article", { class: "answer", "aria-label": `Answer ${this.pane.name}`, "aria-busy": "true", data: { pane: this.pane.name, state: "waiting" } },
      h("header", { class: "answer-head" }, compared ? h("span", { class: "letter" }, this.pane.name) : null, h("span", { class: "model" }, this.card.id), this.badge),
      this.reasoning, this.body, this.read, this.tools, this.trouble,
      h("footer", { class: "answer-foot" }, this.facts, this.legend, this.note, this.charts, this.actions()),
    );
    if (this.card.diffusion) {
      this.view = new CanvasText(this.body, (step) => this.chart.highlight(step));
      this.chart = new Passes((step) => this.view.point(step));
    } else {
      this.view = new TokenText({ content: this.body, reasoning: this.thinking }, (round) => this.chart.highlight(round));
      this.chart = new Timeline((round) => this.view.point(round));
    }
    this.histogram = h("div", { class: "chart-slot" });
    this.charts.append(this.chart.element, this.histogram);
    this.chart.element.hidden = true;
  }

  actions() {
    const button = (label, run) => h("button", { type: "button", class: "plain", on: { click: run } }, label);
    this.copy = button("Copy", () => this.toClipboard(this.text, this.copy));
    this.toggle = h("button", { type: "button", class: "plain", "aria-pressed": "false", on: { click: () => this.toggleReading() } }, "Formatted");
    this.marks = h("button", { type: "button", class: "plain", "aria-pressed": "false", on: { click: () => this.toggleMarks() } }, this.card.diffusion ? "Steps" : "Letters");
    this.again = button("Regenerate", () => this.hooks.retry());
    const code = h("pre", { tabindex: 0 });
    const copyCurl = button("Copy as curl", () => this.toClipboard(curl(this.request), copyCurl));
    const details = h("details", { class: "request" }, h("summary", null, "Request"), code, copyCurl);
    code.textContent = JSON.stringify(this.request, null, 2);
    return h("div", { class: "actions" }, this.copy, this.marks, this.toggle, this.again, details);
  }

  async toClipboard(text, button) {
    const label = button.textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "The browser refused";
    }
    setTimeout(() => (button.textContent = label), 1500);
  }

  toggleMarks() {
    this.marks.setAttribute("aria-pressed", String(this.body.classList.toggle("marks")));
    this.thinking.classList.toggle("marks");
  }

  toggleReading() {
    const on = this.read.hidden;
    this.toggle.setAttribute("aria-pressed", String(on));
    this.read.hidden = !on;
    this.body.hidden = on;
    if (on) this.read.replaceChildren(...reading(this.text));
  }

  /** Ask and show. Never throws; `state` says how it ended: done, stopped or failed. */
  async run(signal) {
    this.began = performance.now();
    try {
      for await (const chunk of chat(this.request, signal)) this.take(chunk, performance.now());
      this.finish("done");
    } catch (error) {
      if (error.name === "AbortError") this.finish("stopped");
      else this.fail(error instanceof Failure ? error : new Failure(0, `This page failed: ${error.message}`));
    }
    return this;
  }

  take(chunk, now) {
    if (chunk.usage) this.stats.usage = chunk.usage;
    if (chunk.speculation) this.stats.speculation = chunk.speculation;
    if (chunk.diffusion) this.stats.diffusion = chunk.diffusion;
    for (const choice of chunk.choices ?? []) this.piece(choice, now);
    this.refresh();
  }

  piece(choice, now) {
    const delta = choice.delta ?? {};
    const thought = delta.reasoning_content ?? delta.reasoning ?? "";
    const text = delta.content ?? "";
    if (choice.finish_reason) this.stats.finish = choice.finish_reason;
    const told = choice.diffusion?.steps?.length || choice.speculation?.origins?.length;
    if (this.first === undefined && (text || thought || told || delta.tool_calls)) {
      this.first = now;
      this.setState("running");
    }
    if (text || thought || told) this.last = now;
    this.text += text;
    this.thoughts += thought;
    if (thought) this.reasoning.hidden = false;
    if (this.card.diffusion) this.view.push(text, choice.speculation, choice.diffusion);
    else {
      if (choice.speculation) this.view.take(choice.speculation, now);
      this.view.push(thought, "reasoning");
      this.view.push(text, "content");
    }
    for (const call of delta.tool_calls ?? []) this.call(call);
    if (this.atFirst === undefined && this.first !== undefined) this.atFirst = this.tokens;
    this.hooks.changed(this);
  }

  call({ index, function: part }) {
    this.view.hides = true;
    let known = this.calls[index];
    if (!known) {
      known = this.calls[index] = { name: "", text: "", title: h("strong"), code: h("pre", { tabindex: 0 }) };
      this.tools.append(h("div", { class: "call" }, h("span", null, "Calls "), known.title, known.code));
    }
    known.name += part?.name ?? "";
    known.text += part?.arguments ?? "";
    known.title.textContent = known.name;
    known.code.textContent = known.text;
  }

  setState(state) {
    this.state = state;
    this.element.dataset.state = state;
    this.element.setAttribute("aria-busy", String(state === "waiting" || state === "running"));
  }

  finish(state) {
    this.setState(state);
    if (state === "done" || !this.card.diffusion) this.view.finish();
    this.refresh.now();
  }

  fail(error) {
    this.error = error;
    this.setState("failed");
    if (!this.card.diffusion) this.view.finish();
    this.trouble.replaceChildren(alertCard(error, { retry: () => this.hooks.retry(), show: this.hooks.flag(error.param, true) && (() => this.hooks.flag(error.param)), restart: this.hooks.restart }));
    this.refresh.now();
  }

  get tokens() {
    return this.stats.usage?.completion_tokens ?? (this.card.diffusion ? this.view.filled : this.view.tokens.length);
  }

  /** Tokens a second between the first piece and the last; of an answer in one piece, since it was asked for. */
  get speed() {
    if (this.first === undefined) return NaN;
    const more = this.tokens - this.atFirst;
    return more > 0 && this.last > this.first ? (1000 * more) / (this.last - this.first) : (1000 * this.tokens) / (this.last - this.began);
  }

  summarise() {
    const facts = [];
    if (this.tokens) facts.push(["Speed", `${number(this.speed, 1)} tokens/s`]);
    if (this.first !== undefined) facts.push(["First token", seconds(this.first - this.began)]);
    if (this.tokens) facts.push(["Tokens", number(this.tokens)]);
    facts.push(...this.extraFacts());
    const ends = { length: "cut at its length", tool_calls: "calls a tool", stop: "" };
    if (this.state === "stopped") facts.push(["End", "stopped by you"]);
    else if (ends[this.stats.finish]) facts.push(["End", ends[this.stats.finish]]);
    this.facts.replaceChildren(...facts.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))));
    this.legend.replaceChildren(...legend(this));
    this.badge.textContent = verdict(this).badge;
    this.badge.className = `badge ${verdict(this).kind}`;
    this.note.textContent = verdict(this).note;
    this.note.hidden = !verdict(this).note;
    const thoughts = this.stats.usage?.completion_tokens_details?.reasoning_tokens;
    if (thoughts) this.thought.textContent = `Reasoning, ${number(thoughts)} tokens`;
    this.drawCharts();
    this.hooks.changed(this);
  }

  extraFacts() {
    const { speculation, diffusion } = this.stats;
    if (diffusion) {
      const found = [["Forward passes", `${number(diffusion.forwards + diffusion.draft_forwards)} (${number(diffusion.tokens_per_forward, 2)} tokens each)`]];
      if (diffusion.verifies) found.push(["Taken back", `${number(diffusion.remasked)} in ${number(diffusion.verifies)} verify steps`]);
      return found;
    }
    if (this.card.diffusion || !speculation?.rounds) return [];
    const share = speculation.drafted ? (100 * speculation.accepted) / speculation.drafted : 0;
    return [["Accepted", `${number(speculation.accepted)} of ${number(speculation.drafted)} drafted (${number(share)} %)`], ["Tokens per round", number(1 + speculation.accepted / speculation.rounds, 2)]];
  }

  drawCharts() {
    if (this.card.diffusion) {
      this.chart.show(this.view.steps);
      this.chart.element.hidden = !this.view.steps.length;
      return;
    }
    this.chart.show(this.view.rounds);
    this.chart.element.hidden = !this.view.rounds.length;
    const counts = [];
    for (const round of this.view.rounds) if (round.drafted || round.stood) counts[round.stood] = (counts[round.stood] ?? 0) + 1;
    if (counts.length && this.state !== "running") this.histogram.replaceChildren(histogram(Array.from(counts, (count) => count ?? 0)));
  }
}
