// An answer whose tokens come one after another: each is an element of its own that knows where it came from.

import { h, roving, visible } from "./dom.js";
import { tips } from "./tip.js";

export const ORIGINS = {
  d: { name: "accepted", long: "drafted, and accepted by the model" },
  c: { name: "corrected", long: "the model’s own, in place of a drafted token that did not stand" },
  b: { name: "bonus", long: "the model’s own, behind a draft that stood whole" },
  p: { name: "plain", long: "nothing was drafted for this step" },
};

export class TokenText {
  /** `places`: element of each part, by its kind. `onRound` hears of the round that is pointed at, or null. */
  constructor(places, onRound = () => {}) {
    this.places = places;
    this.onRound = onRound;
    this.tokens = [];
    this.rounds = [];
    this.counts = { d: 0, c: 0, b: 0, p: 0 };
    this.pending = []; // rounds that were told of and have no token yet
    this.open = null; // the round that the next token belongs to
    this.length = 0; // code points that have come
    this.told = 0; // the first token that the latest piece told of
    this.hides = false; // is there text that is not shown, such as the marks around a thought?
    this.at = 0; // the token that the next one belongs to
    this.part = "content";
    for (const place of Object.values(places)) {
      place.setAttribute("role", "group");
      place.setAttribute("aria-roledescription", "text by tokens");
      const arrows = roving(place, () => [...place.querySelectorAll(".t")]);
      place.addEventListener("focusout", () => arrows.offer());
      this.offer = [...(this.offer ?? []), arrows.offer];
      tips(place, (span) => this.describe(this.tokens[span.dataset.tip]), (span) => this.point(this.tokens[span.dataset.tip].round), () => this.point(null));
    }
  }

  /** The next text of a part. Tokens are told of first, by `take`, and their text may lag behind. */
  push(text, part) {
    if (!text) return;
    if (part !== this.part) {
      this.part = part;
      this.hides = true;
      this.length = Math.max(this.length, this.tokens[this.told]?.offset ?? 0); // what stood between the parts is not shown
    }
    let run = "";
    for (const char of text) {
      while (this.at + 1 < this.tokens.length && this.tokens[this.at + 1].offset <= this.length) {
        this.write(run);
        run = "";
        this.at += 1;
      }
      run += char;
      this.length += 1;
    }
    this.write(run);
  }

  take(trace, now) {
    this.told = this.tokens.length;
    if (this.hides) this.length = Math.max(this.length, trace.offsets[0] ?? 0);
    this.pending.push(...(trace.rounds ?? []));
    [...trace.origins].forEach((origin, index) => {
      this.counts[origin] += 1;
      const token = { index: this.tokens.length, origin, offset: trace.offsets[index], text: "", span: null, round: this.roundOf(origin, now) };
      token.round.tokens.push(token);
      this.tokens.push(token);
    });
  }

  roundOf(origin, now) {
    if (origin === "p") {
      this.open = null;
      return this.begin({ drafted: 0, stood: 0, own: "p" }, now);
    }
    const round = this.open ?? this.begin({ drafted: this.pending.shift()?.[0] ?? null, stood: 0, own: null }, now);
    if (origin === "d") round.stood += 1;
    else round.own = origin;
    this.open = origin === "d" ? round : null;
    return round;
  }

  begin(round, now) {
    this.rounds.push({ ...round, index: this.rounds.length, tokens: [], now });
    return this.rounds.at(-1);
  }

  write(text) {
    if (!text) return;
    const place = this.places[this.part];
    const token = this.tokens[this.at];
    if (!token) {
      place.append(text);
      return;
    }
    if (!token.span || token.span.parentNode !== place) {
      token.span = h("span", { class: `t t-${token.origin}`, tabindex: -1, data: { tip: token.index, mark: token.origin } });
      place.append(token.span);
    }
    token.text += text;
    token.span.append(text);
  }

  finish() {
    for (const offer of this.offer) offer();
  }

  describe(token) {
    const { round } = token;
    const drafts = round.drafted === null ? "" : `Round ${round.index + 1}: ${round.stood} of ${round.drafted} drafted tokens stood`;
    const text = ORIGINS[token.origin];
    return [visible(token.text), `${text.name}: ${text.long}`, token.origin === "p" ? "" : drafts, `Token ${token.index + 1}`];
  }

  /** Show which tokens came in one round. */
  point(round) {
    for (const token of this.pointed?.tokens ?? []) token.span?.classList.remove("together");
    this.pointed = round;
    for (const token of round?.tokens ?? []) token.span?.classList.add("together");
    this.onRound(round);
  }

  /** Mark the token that holds a code point of the content; the element, if there is one. */
  mark(place) {
    let before = 0;
    for (const token of this.tokens) {
      if (!token.span || token.span.parentNode !== this.places.content) continue;
      before += [...token.text].length;
      if (before > place) {
        token.span.classList.add("differs");
        return token.span;
      }
    }
    return null;
  }
}
