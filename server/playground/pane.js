// The settings of one pane: a form made from the model's card, and the request that it comes to.

import { groups, start } from "./fields.js";
import { h } from "./dom.js";

let made = 0;

export class Pane {
  constructor(name, cards, onChange) {
    this.name = name;
    this.cards = cards;
    this.onChange = onChange;
    this.values = new Map();
    this.controls = [];
    this.heading = h("h3", { class: "pane-name" }, `Answer ${name}`);
    this.choice = h("select", { id: `model-${name}`, on: { change: () => this.use(this.choice.value) } });
    this.form = h("div", { class: "groups" });
    this.element = h("section", { class: "pane", "aria-label": `Settings of answer ${name}`, data: { pane: name } },
      this.heading,
      h("div", { class: "field" }, h("label", { for: `model-${name}` }, "Model"), this.choice),
      this.form,
    );
    this.show(cards);
  }

  /** Take over a new list of models; the chosen one stays if it is still there. */
  show(cards) {
    this.cards = cards;
    this.choice.replaceChildren(...cards.map((card) => h("option", { value: card.id }, card.id)));
    const kept = cards.some((card) => card.id === this.card?.id) ? this.card.id : cards[0]?.id;
    if (kept !== undefined) this.use(kept, kept === this.card?.id);
  }

  use(model, keep = false) {
    const before = this.card;
    this.card = this.cards.find((card) => card.id === model);
    this.choice.value = model;
    if (!keep || !before) {
      const kept = ["system", "seed", "top_p"].map((key) => [key, this.values.get(key)]).filter(([, value]) => value !== undefined);
      this.values = new Map([...Object.entries(start(this.card)), ...kept]);
    }
    this.controls = [];
    this.form.replaceChildren(...groups(this.card).map((group) =>
      h("details", { class: "group", open: group.name !== "Prompt" || this.values.has("system") }, h("summary", null, group.name), ...group.fields.map((one) => this.control(one))),
    ));
    this.refresh();
  }

  get(key) {
    return this.values.get(key);
  }

  /** `value` undefined: the server's own. */
  set(key, value) {
    if (value === undefined) this.values.delete(key);
    else this.values.set(key, value);
    this.refresh();
  }

  copy(other) {
    this.use(other.card.id);
    this.values = new Map(other.values);
    this.refresh();
  }

  refresh() {
    for (const control of this.controls) control();
    this.onChange(this);
  }

  control(one) {
    const id = `field-${this.name}-${(made += 1)}`;
    const reset = h("button", { type: "button", class: "reset", "aria-label": `${one.label}: back to the server’s own`, title: "Back to the server’s own", on: { click: () => this.set(one.key, undefined) } }, "↺");
    const help = h("p", { class: "help", id: `${id}-help` });
    const parts = this.inputs(one, id);
    const box = h("div", { class: `field kind-${one.kind}`, data: { path: one.path } },
      h("div", { class: "field-top" }, h("label", { for: id }, one.label), reset),
      h("div", { class: "field-inputs" }, ...parts.elements),
      help,
    );
    const get = (key) => this.values.get(key);
    this.controls.push(() => {
      const value = this.values.get(one.key);
      box.hidden = !one.when(get);
      box.dataset.set = String(value !== undefined);
      reset.hidden = value === undefined;
      help.textContent = typeof one.help === "function" ? one.help(get) : one.help;
      parts.show(value);
    });
    return box;
  }

  inputs(one, id) {
    const on = (event, read) => ({ [event]: (happened) => this.set(one.key, read(happened.target)) });
    const common = { id, "aria-describedby": `${id}-help` };
    if (one.kind === "text") {
      const area = h("textarea", { ...common, rows: 3, on: on("input", (input) => input.value || undefined) });
      return { elements: [area], show: (value) => area.value !== (value ?? "") && (area.value = value ?? "") };
    }
    if (one.kind === "toggle") {
      const box = h("input", { ...common, type: "checkbox", on: on("change", (input) => (input.checked === one.fallback ? undefined : input.checked)) });
      return { elements: [box], show: (value) => (box.checked = value ?? one.fallback) };
    }
    if (one.kind === "select") {
      const label = (name) => (one.notes?.[name] ? `${name} (${one.notes[name]})` : name);
      const options = [h("option", { value: "" }, `server’s: ${label(one.own)}`), ...one.options.map((name) => h("option", { value: name }, label(name)))];
      const list = h("select", { ...common, on: on("change", (input) => input.value || undefined) }, ...options);
      return { elements: [list], show: (value) => (list.value = value ?? "") };
    }
    return this.numbers(one, common, on);
  }

  numbers(one, common, on) {
    const read = (input) => {
      const value = Number(input.value);
      if (input.value === "" || !Number.isFinite(value)) return undefined;
      return one.whole ? Math.round(value) : value;
    };
    const bounds = one.kind === "range" ? { min: one.floor ?? one.min, max: one.hard ?? one.max } : {};
    const exact = h("input", {
      ...common, ...bounds, type: "number", step: one.whole ? 1 : "any", inputmode: one.whole ? "numeric" : "decimal",
      placeholder: one.placeholder ?? one.fallback ?? "server’s", on: on("input", read),
    });
    const show = (value) => {
      if (document.activeElement !== exact || read(exact) !== value) exact.value = value ?? "";
    };
    if (one.kind === "number") return { elements: [exact], show };
    const slider = h("input", { type: "range", min: one.min, max: one.max, step: one.step, "aria-label": one.label, on: on("input", read) });
    return {
      elements: [slider, exact],
      show: (value) => {
        show(value);
        slider.value = String(value ?? one.fallback ?? one.max);
      },
    };
  }

  /** The body of a request. `seed` holds where the form leaves it open. */
  request(messages, seed) {
    const get = (key) => this.values.get(key);
    const body = { model: this.card.id, messages: [...messages], stream: true, stream_options: { include_usage: true }, seed };
    for (const one of groups(this.card).flatMap((group) => group.fields)) {
      const value = get(one.key);
      if (value === undefined || !one.when(get)) continue;
      if (one.path === "system") {
        body.messages.unshift({ role: "system", content: value });
        continue;
      }
      const [first, second] = one.path.split(".");
      if (second === undefined) body[first] = value;
      else body[first] = { ...body[first], [second]: value };
    }
    const told = this.card.diffusion ? { trace: true } : { report: true, trace: true };
    body.speculation = { ...body.speculation, ...told };
    if (this.card.diffusion) body.diffusion = { ...body.diffusion, report: true, trace: true };
    return body;
  }

  /** Mark the control of a request's field that the server has refused; its element, if there is one. */
  flag(param) {
    const found = [...this.form.querySelectorAll(".field")].find((box) => box.dataset.path === param && !box.hidden);
    if (!found) return null;
    const input = found.querySelector("input:not([type=range]), select, textarea");
    found.classList.add("refused");
    input.setAttribute("aria-invalid", "true");
    input.addEventListener("input", () => this.unflag(found, input), { once: true });
    input.addEventListener("change", () => this.unflag(found, input), { once: true });
    found.closest("details").open = true;
    return input;
  }

  unflag(box, input) {
    box.classList.remove("refused");
    input.removeAttribute("aria-invalid");
  }
}
