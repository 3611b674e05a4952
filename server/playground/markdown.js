// A small part of Markdown, for reading: headings, lists, quotes, code, emphasis. Only elements that do nothing, and
// text; links are shown as their text and address, for nobody knows where a model's links lead.

import { h } from "./dom.js";

const MARK = /(`+)(.+?)\1(?!`)|\*\*(.+?)\*\*|(?<![\w*])\*([^*\s][^*]*?)\*(?![\w*])|\[([^\]\n]+)\]\(([^)\s]+)\)/s;

function inline(text, depth = 0) {
  const found = [];
  let rest = text;
  while (rest) {
    const match = depth < 3 ? MARK.exec(rest) : null;
    if (!match) {
      found.push(rest);
      break;
    }
    if (match.index) found.push(rest.slice(0, match.index));
    const [whole, , code, strong, emphasis, label, address] = match;
    if (code !== undefined) found.push(h("code", null, code));
    else if (strong !== undefined) found.push(h("strong", null, ...inline(strong, depth + 1)));
    else if (emphasis !== undefined) found.push(h("em", null, ...inline(emphasis, depth + 1)));
    else found.push(h("span", { class: "link" }, `${label} (${address})`));
    rest = rest.slice(match.index + whole.length);
  }
  return found;
}

const STARTS = [
  [/^(#{1,6}) +(.*)$/, (match) => h(`h${Math.min(6, match[1].length + 2)}`, null, ...inline(match[2]))],
  [/^ {0,3}([-*_])( *\1){2,} *$/, () => h("hr")],
];

/** The elements of a text. */
export function reading(text, depth = 0) {
  const lines = text.split("\n");
  const found = [];
  let at = 0;
  const run = (test, strip) => {
    const own = [];
    while (at < lines.length && test.test(lines[at])) own.push(strip(lines[at++]));
    return own;
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = /^\s*(`{3,}|~{3,})/.exec(line);
    const simple = STARTS.map(([test, make]) => [test.exec(line), make]).find(([match]) => match);
    if (!line.trim()) at += 1;
    else if (fence) {
      at += 1;
      const own = [];
      while (at < lines.length && !lines[at].trim().startsWith(fence[1])) own.push(lines[at++]);
      at += 1;
      found.push(h("pre", { tabindex: 0 }, h("code", null, own.join("\n"))));
    } else if (simple) {
      at += 1;
      found.push(simple[1](simple[0]));
    } else if (/^\s*[-*+] +/.test(line)) found.push(h("ul", null, ...run(/^\s*[-*+] +/, (own) => h("li", null, ...inline(own.replace(/^\s*[-*+] +/, ""))))));
    else if (/^\s*\d+[.)] +/.test(line)) {
      const first = Number(/\d+/.exec(line)[0]);
      found.push(h("ol", { start: first }, ...run(/^\s*\d+[.)] +/, (own) => h("li", null, ...inline(own.replace(/^\s*\d+[.)] +/, ""))))));
    } else if (depth < 5 && /^> ?/.test(line)) found.push(h("blockquote", null, ...reading(run(/^> ?/, (own) => own.replace(/^> ?/, "")).join("\n"), depth + 1)));
    else found.push(h("p", null, ...inline(run(/^(?!\s*$|#{1,6} |\s*[-*+] |\s*\d+[.)] |> ?|\s*`{3}|\s*~{3}).*$/, (own) => own).join("\n") || lines[at++])));
  }
  return found;
}
