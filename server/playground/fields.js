// From a model's card in /v1/models to the settings that its requests can have. What the card lists is all there is.

/** A field: where it goes in the request, how it is set, and what holds where it is not. `when`: is it of any use now? */
function field(path, label, kind, more = {}) {
  return { key: more.key ?? path, path, label, kind, help: "", when: () => true, ...more };
}

const COMMON = [
  field("system", "System prompt", "text", { help: "Goes before the conversation." }),
  field("temperature", "Temperature", "range", { min: 0, max: 2, step: 0.05, fallback: 1, help: "0 always takes the likeliest token." }),
  field("top_p", "Top p", "range", { min: 0.01, max: 1, step: 0.01, fallback: 1, help: "Only tokens that make up this share of the probability." }),
  field("max_tokens", "Most tokens", "range", { min: 1, max: 2048, hard: 1 << 20, step: 1, whole: true, help: "Of the answer." }),
  field("seed", "Seed", "number", { step: 1, whole: true, placeholder: "random", help: "The same seed gives the same answer again." }),
];

function title(name) {
  const words = name.replaceAll("_", " ");
  return words[0].toUpperCase() + words.slice(1);
}

/** Knobs of the choice `owner` among verifiers or rules. Wide bounds get a slider of the usual part of them. */
function knobs(section, choice, own, owners) {
  return owners.flatMap((owner) =>
    owner.knobs.map((knob) => {
      const most = knob.high - knob.low > 20 * Math.max(Math.abs(knob.default), 0.05) ? Math.max(knob.default * 6, 1) : knob.high;
      const low = knob.low < -1 ? Math.max(knob.low, -1) : knob.low;
      const span = most - low;
      return field(`${section}.${knob.name}`, title(knob.name), "range", {
        key: `${section}.${owner.name}.${knob.name}`,
        min: low,
        max: most,
        hard: knob.high,
        floor: knob.low,
        step: knob.whole ? 1 : span > 4 ? 0.05 : 0.01,
        whole: Boolean(knob.whole),
        fallback: knob.default,
        help: knob.text ?? "",
        when: (get) => (get(choice) ?? own) === owner.name,
      });
    }),
  );
}

function choice(path, label, own, names, texts = {}, more = {}) {
  const help = (get) => texts[get(path) ?? own] ?? "";
  return field(path, label, "select", { own, options: names, help, ...more });
}

function speculation(card) {
  const on = (get) => get("speculation.enabled") !== false;
  const texts = Object.fromEntries(card.verifiers.map((one) => [one.name, one.text]));
  const lossless = Object.fromEntries(card.verifiers.map((one) => [one.name, one.lossless ? "lossless" : "relaxed"]));
  const names = card.verifiers.map((one) => one.name);
  const drawn = (get) => card.verifiers.find((one) => one.name === (get("speculation.verifier") ?? card.verifier))?.drawn;
  const inner = [
    field("speculation.max_draft", "Draft at most", "range", {
      min: 1, max: card.max_draft, step: 1, whole: true, fallback: card.max_draft, help: "Tokens of one round.",
    }),
    choice("speculation.verifier", "Verifier", card.verifier, names, texts, { notes: lossless }),
    ...knobs("speculation", "speculation.verifier", card.verifier, card.verifiers),
    field("speculation.sample", "Draw the drafts", "toggle", {
      fallback: Boolean(card.sample), when: drawn, help: "Else a draft is its likeliest tokens.",
    }),
  ];
  for (const one of inner) {
    const own = one.when;
    one.when = (get) => on(get) && own(get);
  }
  const drafts = field("speculation.enabled", "Draft tokens", "toggle", { fallback: true, help: `With ${card.draft ?? card.drafter}.` });
  return [drafts, ...inner];
}

function diffusion(card) {
  const texts = Object.fromEntries(card.rules.map((rule) => [rule.name, rule.text]));
  const names = card.rules.map((rule) => rule.name);
  const scheduled = (get) => card.rules.find((rule) => rule.name === (get("diffusion.rule") ?? card.rule))?.scheduled;
  const [least, most] = card.block_lengths;
  const room = card.max_canvas ?? Math.max(card.canvas * 4, 512);
  const found = [
    choice("diffusion.rule", "Rule", card.rule, names, texts),
    ...knobs("diffusion", "diffusion.rule", card.rule, card.rules),
    field("diffusion.steps", "Steps", "range", {
      min: 1, max: card.canvas, hard: room, step: 1, whole: true, fallback: card.steps ?? card.canvas, when: scheduled, help: "Of the whole canvas.",
    }),
    choice("diffusion.cache", "Cache", card.cache, card.caches, { [card.caches[0]]: "Exact." }),
    field("diffusion.canvas", "Canvas", "range", {
      min: 8, max: Math.min(room, 1024), hard: room, step: 8, whole: true, fallback: card.canvas, when: () => card.attention === "full",
      help: "Room for the answer; at least “most tokens”.",
    }),
    field("diffusion.block_length", "Block", "range", {
      min: least, max: Math.min(most, 128), hard: most, step: 1, whole: true, fallback: card.block_length, when: () => most > least,
      help: "Tokens that are filled before the next ones are begun.",
    }),
  ];
  if (!card.verifies.length) return found;
  return [
    ...found,
    choice("diffusion.verify", "Verify", card.verify, card.verifies),
    field("diffusion.verify_threshold", "Verify threshold", "range", {
      min: 0, max: 1, step: 0.01, fallback: card.verify_threshold,
      when: (get) => !["trust", "exact"].includes(get("diffusion.verify") ?? card.verify),
    }),
    field("diffusion.drafter_steps", "Drafter steps", "range", {
      min: 1, max: 64, hard: 1024, step: 1, whole: true, fallback: card.drafter_steps ?? 1, help: "Between two verify steps, at most.",
    }),
  ];
}

/** Groups of fields, with a name each. */
export function groups(card) {
  const found = [];
  if (card.speculation) found.push({ name: "Speculation", fields: speculation(card.speculation) });
  if (card.diffusion) found.push({ name: "Diffusion", fields: diffusion(card.diffusion) });
  const common = COMMON.map((one) => (one.path === "max_tokens" ? { ...one, max: Math.min(one.max, card.max_model_len), hard: card.max_model_len } : one));
  return [...found, { name: "Sampling", fields: common.slice(1) }, { name: "Prompt", fields: common.slice(0, 1) }];
}

/** What a new chat with a model begins with. */
export function start(card) {
  return card.diffusion ? { temperature: 0 } : { temperature: 0.7, max_tokens: Math.min(256, card.max_model_len) };
}

/** Pairs of settings that are worth a comparison: [name, settings of A, settings of B], without those that both keep. */
export function pairs(card) {
  const found = [];
  if (card.speculation) {
    const { verifiers } = card.speculation;
    const lossy = ["typical", "top_k_gap", "bounded", "lenient"].find((name) => verifiers.some((one) => one.name === name)) ?? verifiers.find((one) => !one.lossless)?.name;
    const strict = verifiers.find((one) => one.exact)?.name ?? verifiers[0]?.name;
    found.push(["With drafts and without", { "speculation.enabled": undefined }, { "speculation.enabled": false }]);
    if (lossy) found.push([`Strict and relaxed (${lossy})`, { "speculation.verifier": strict }, { "speculation.verifier": lossy }]);
  }
  if (card.diffusion) {
    const { rules, rule, caches, verifies } = card.diffusion;
    const has = (name) => rules.some((one) => one.name === name);
    if (has("quota")) found.push(["Several tokens a step and one", { "diffusion.rule": undefined }, { "diffusion.rule": "quota" }]);
    if (has("threshold")) found.push(["Careful and bold", { "diffusion.rule": "threshold", "diffusion.threshold.threshold": 0.95 }, { "diffusion.rule": "threshold", "diffusion.threshold.threshold": 0.4 }]);
    if (has("frechet") && rule !== "frechet") found.push(["The server’s rule and Fréchet", { "diffusion.rule": undefined }, { "diffusion.rule": "frechet" }]);
    if (caches.length > 1) found.push(["With cache and exact", { "diffusion.cache": caches.at(-1) }, { "diffusion.cache": caches[0] }]);
    if (verifies.length > 1) found.push(["Trusting and verifying", { "diffusion.verify": "trust" }, { "diffusion.verify": verifies.includes("both") ? "both" : verifies[1] }]);
  }
  return found;
}
