// The diagnosis, and where to read more about a cell.

import { createElement } from "./dom.js";
import { findingText } from "./guide.js";

/** List all findings, what was checked, and what wasn't. */
export function createFindings(view) {
  const { findings, checked, notChecked } = view.data.health;
  return createElement("ol", { class: "findings" },
    findings.map((finding, k) => createElement("li", {}, createElement("span", { class: "bad" }, k + 1), createElement("span", {}, findingText(finding), " ",
      finding.missing ? createElement("span", { class: "quiet" }, finding.missing) : null,
      view.numberOf(finding) ? createElement("button", { type: "button", class: "btn link", onclick: () => view.openFinding(finding) }, "Show it") : null))),
    checked.map((text) => createElement("li", {}, createElement("span", { class: "fine" }, "✓"), createElement("span", { class: "quiet" }, text))),
    notChecked.map((text) => createElement("li", {}, createElement("span", {}, "–"), createElement("span", { class: "quiet" }, `Not checked: ${text}`))));
}

/** Create a paragraph in which identifiers of papers are links. */
export function createParagraph(text) {
  const parts = text.split(/(arXiv:\d{4}\.\d{4,5}|doi:10\.\d+\/[\w./-]*\w)/);
  return createElement("p", {}, parts.map((part) => {
    const [, site, id] = /^(arXiv|doi):(.*)/.exec(part) ?? [];
    return site ? createLink(`https://${site === "doi" ? "doi.org" : "arxiv.org/abs"}/${id}`, part) : part;
  }));
}

const createLink = (href, text) => createElement("a", { href, rel: "noreferrer" }, text);

/** Say where to read more: this library has no address that a page could link to, torch has one. */
export function createDocumentation({ documentation, shortName }) {
  const torch = /^nn\./.test(shortName) ? [" Online: ", createLink(`https://docs.pytorch.org/docs/stable/generated/torch.${shortName}.html`, `torch.${shortName}`), "."] : [];
  return createElement("p", { class: "quiet" }, "Documentation in Python: ", documentation.flatMap((name, k) => [k ? " and " : "", createElement("code", {}, `help(${name})`)]), ".", torch);
}
