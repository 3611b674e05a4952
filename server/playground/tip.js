// One tooltip for the whole page. It names what the pointer or the keyboard's focus is on; Esc closes it.

import { byId, h } from "./dom.js";

let shownFor = null;

function place(tip, target) {
  const rects = target.getClientRects();
  const box = rects.length ? rects[0] : target.getBoundingClientRect();
  tip.hidden = false;
  const width = tip.offsetWidth;
  const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), document.documentElement.clientWidth - width - 8);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = `${Math.round(left)}px`;
  tip.style.top = `${Math.round(above > 4 ? above : box.bottom + 8)}px`;
}

export function hideTip() {
  byId("tip").hidden = true;
  shownFor?.removeAttribute("aria-describedby");
  shownFor = null;
}

/** Show `lines` beside `target`; the first is the headline. */
function showTip(target, lines) {
  const tip = byId("tip");
  shownFor?.removeAttribute("aria-describedby");
  shownFor = target;
  tip.replaceChildren(...lines.filter(Boolean).map((line, index) => h(index ? "span" : "strong", null, line)));
  target.setAttribute("aria-describedby", "tip");
  place(tip, target);
}

/** Elements in `container` that `describe` gives lines for show them; `enter` and `leave` hear of it too. */
export function tips(container, describe, enter = () => {}, leave = () => {}) {
  const show = (event) => {
    const target = event.target.closest?.("[data-tip]");
    if (!target || !container.contains(target)) return;
    leave();
    showTip(target, describe(target));
    enter(target);
  };
  const hide = () => {
    hideTip();
    leave();
  };
  container.addEventListener("pointerover", (event) => event.pointerType !== "touch" && show(event));
  container.addEventListener("click", show);
  container.addEventListener("focusin", show);
  container.addEventListener("pointerleave", hide);
  container.addEventListener("focusout", hide);
}

export function watchTips() {
  document.addEventListener("scroll", () => hideTip(), { capture: true, passive: true });
}
