// The page of a model: its recurrent layers in the order of their calls, and the page of each.

import { mount } from "./app.js";
import { createElement } from "./dom.js";
import { checkedText, findingText } from "./guide.js";

const MAX_FIRST = 20; // calls that are listed, from the beginning and from the end
const MAX_LAST = 40;

/** Render the page of a model into an element. Returns {onKeyDown}, for keys that are pressed outside of all parts. */
export function mountModel(root, data) {
  let view = null; // of the open page
  let openPage = null;

  /** The addresses of a page begin with its module, and with the call if the page of another call is there, too. */
  const addressOf = (page) => {
    const { name, number } = data.calls.find((call) => call.page === page);
    const isOnly = data.calls.filter((call) => call.name === name && call.page !== null).length === 1;
    return { module: name, ...(isOnly ? {} : { call: number }) };
  };

  function show() {
    const entries = new URLSearchParams(location.hash.slice(1));
    const found = data.calls.findLast((call) => call.page !== null && call.name === entries.get("module") && (!entries.has("call") || String(call.number) === entries.get("call")));
    open(found ? found.page : null);
  }

  function open(page) {
    if (view && page === openPage) return;
    view?.close();
    view = null;
    openPage = page;
    const element = createElement("div");
    if (document.documentElement.dataset.theme) element.dataset.theme = document.documentElement.dataset.theme;
    root.replaceChildren(element);
    if (page === null) {
      element.className = "unrolled overview";
      element.append(...createOverview());
      document.title = data.title;
    } else {
      view = mount(element, data.pages[page], { title: data.title, entries: addressOf(page), close: () => go(null) });
    }
    window.scrollTo(0, 0);
  }

  function go(page) {
    history.pushState(null, "", page === null ? location.pathname + location.search : `#${new URLSearchParams(addressOf(page))}`);
    open(page);
  }

  function createOverview() {
    const layers = new Set(data.calls.filter((call) => call.isRecurrent).map((call) => call.name));
    const what = `${plural(layers.size, "recurrent layer")}, ${plural(data.calls.filter((call) => call.isRecurrent).length, "call")}`;
    return [createElement("header", {}, createElement("h1", {}, data.title), createElement("span", { class: "what" }, what)),
      createHeadline(),
      createElement("p", { class: "quiet" }, "The recurrent layers in the order in which they were called, with the modules that were called between them. Open a layer to see its numbers."),
      createElement("ol", { class: "calls" }, createGroups()),
      data.missing.length ? createElement("p", { class: "quiet missing" }, "Not shown: ", data.missing.map(({ name, reason }) => `${name} (${reason})`).join("; "), ".") : null].filter(Boolean);
  }

  /** The worst problem of the model, with its layer. Null if there is none. */
  function createHeadline() {
    const problems = data.pages.flatMap((page, k) => page.health.findings.slice(0, 1).map((finding) => ({ page, k, finding })));
    const worst = ["error", "warning"].map((severity) => problems.find(({ finding }) => finding.severity === severity)).find(Boolean);
    if (!worst) return null;
    return createElement("div", { class: "guide alarm", role: "status" }, createElement("p", {}, createElement("b", {}, "Problem: "), findingText(worst.finding, worst.page.call)),
      createElement("span", { class: "acts" }, createElement("button", { type: "button", class: "btn", onclick: () => go(worst.k) }, "Open the layer")));
  }

  function createGroups() {
    const groups = groupCalls(data.calls);
    const hidden = groups.length - MAX_FIRST - MAX_LAST;
    if (hidden <= 0) return groups.map(createGroup);
    return [...groups.slice(0, MAX_FIRST).map(createGroup), createElement("li", { class: "between quiet" }, `${plural(hidden, "more call")} of these modules`), ...groups.slice(-MAX_LAST).map(createGroup)];
  }

  function createGroup({ call, last }) {
    const { name, module, number, count, page } = call;
    if (!call.isRecurrent) return createElement("li", { class: "between" }, createElement("b", {}, name), " ", createElement("span", { class: "module" }, module), createElement("span", { class: "quiet" }, ` ${call.input} → ${call.output}`), last > number ? createElement("span", { class: "quiet" }, `, ${last - number + 1} times`) : null);
    const times = last > number ? `calls ${number} to ${last} of ${count}` : count > 1 ? `call ${number} of ${count}` : "called once";
    const from = (what, source) => (source ? createElement("span", { class: "quiet" }, `${what} of ${source}`) : null);
    const facts = [["input", call.input, from("output", call.inputFrom)], ["initial state", call.initialState ?? "zeros", from("final state", call.stateFrom)], ["output", call.output], ["final state", call.finalState]];
    const open = page === null ? createElement("p", { class: "quiet" }, `No page: ${call.reason}.`)
      : createElement("a", { class: "btn go", href: `#${new URLSearchParams(addressOf(page))}`, onclick: (event) => { event.preventDefault(); go(page); }, "aria-label": `Open ${name || module}, ${times}` }, "Open");
    return createElement("li", { class: "call", "data-name": name }, createElement("h2", {}, name || "the model", createElement("span", { class: "module" }, module), createElement("span", { class: "quiet" }, times), open),
      createElement("dl", {}, facts.map(([term, text, source]) => createElement("div", {}, createElement("dt", {}, term), createElement("dd", {}, text), source && createElement("dd", {}, source)))),
      page === null ? null : createWorst(data.pages[page].health));
  }

  function createWorst(health) {
    const [worst] = health.findings;
    if (!worst) return createElement("p", {}, createElement("span", { class: "fine" }, "✓ "), "No problem found. ", createElement("span", { class: "quiet" }, checkedText(health)));
    return createElement("p", { class: worst.severity === "note" ? "worst" : "worst alarm" }, createElement("b", {}, worst.severity === "note" ? "Note: " : "Problem: "), findingText(worst));
  }

  window.addEventListener("popstate", show);
  show();
  return { onKeyDown: (event) => view?.onKeyDown(event) };
}

/** Join calls of a module that follow each other, if they look the same and none of them has a page. */
function groupCalls(calls) {
  const groups = [];
  for (const call of calls) {
    const before = groups.at(-1)?.call;
    const isSame = before && ["name", "input", "output", "initialState", "reason"].every((key) => before[key] === call[key]) && before.page === null && call.page === null;
    if (isSame) groups.at(-1).last = call.number;
    else groups.push({ call, last: call.number });
  }
  return groups;
}

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
