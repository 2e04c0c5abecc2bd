// The line below the title: an offer of the tour, a stop of the tour, the worst finding, or what the reader's changes do.

import { createElement } from "./dom.js";
import { effectOfChanges } from "./own_changes.js";
import { tourStops } from "./tour.js";

const STORED = "unrolled-tour";

function stored() {
  try {
    return localStorage.getItem(STORED);
  } catch {
    return null; // a frame without storage
  }
}

function store(value) {
  try {
    localStorage.setItem(STORED, value);
  } catch { /* the offer comes again next time */ }
}

/** Return a finding with its place: "decoder, layer 0, backward: …". */
export function findingText({ place, message }, module = "") {
  return [[module, place].filter(Boolean).join(", "), message].filter(Boolean).join(": ");
}

/** Say what was checked, and what wasn't. The diagnosis says why. */
export function checkedText({ checked, notChecked }) {
  const missing = notChecked.map((text) => text.split(": ")[0]);
  return [checked.length && `Checked: ${checked.join(", ")}.`, missing.length && `Not checked: ${missing.join(", ")}.`].filter(Boolean).join(" ");
}

/** Create the guide line. Returns {element, update, start, next, stop, touring}. */
export function createGuide(view) {
  const element = createElement("div", { class: "guide", role: "status" });
  let stop = -1;
  let stops = [];
  let shown = "";
  let isHidden = stored() === "off";

  const isNarrow = matchMedia("(max-width: 820px)"); // as in the style sheet
  const button = (text, onclick, className = "", key = "") => createElement("button", { type: "button", class: `btn ${className}`.trim(), onclick }, text, key ? createElement("kbd", { "aria-hidden": "true" }, key) : null);
  const text = (markup) => {
    const paragraph = createElement("p");
    paragraph.innerHTML = markup;
    return paragraph;
  };

  function go(to) {
    stop = to;
    if (to >= 0) {
      view.mode = "this"; // the texts of the tour are about its numbers
      stops = tourStops(view);
      view.choose(stops[to].number, { push: false });
      showFramed();
    } else {
      isHidden = true;
      store("off");
      view.refresh();
    }
  }

  /** What a stop frames. A page of a wide layer has no strip. */
  const framedBy = ({ target, narrowTarget = target }) => view.root.querySelector(isNarrow.matches ? narrowTarget : target) ?? view.root.querySelector(".arithmetic");

  /** Scroll to what the stop frames, unless it is visible below the guide line. */
  function showFramed() {
    const framed = framedBy(stops[stop]);
    const { top, bottom } = framed.getBoundingClientRect();
    if (top < element.getBoundingClientRect().bottom) framed.scrollIntoView({ block: "center" });
    else if (bottom > window.innerHeight) framed.scrollIntoView({ block: "nearest" });
  }

  function update() {
    for (const marked of view.root.querySelectorAll(".toured")) marked.classList.remove("toured");
    if (stop >= 0) framedBy(stops[stop]).classList.add("toured");
    const effect = effectOfChanges(view);
    const state = [stop, isHidden, view.layerIndex, view.row.edits.size > 0, effect].join();
    if (state === shown) return; // screen readers read a status again when it is replaced
    shown = state;
    const hadFocus = element.contains(element.getRootNode().activeElement);
    draw(effect);
    if (hadFocus) (element.querySelector(".go") ?? element.querySelector("button"))?.focus();
  }

  function draw(effect) {
    element.className = "guide";
    element.hidden = false;
    const { findings } = view.data.health;
    if (stop >= 0) {
      const { title, text: said } = stops[stop];
      element.classList.add("touring");
      element.replaceChildren(createElement("span", { class: "count" }, `${stop + 1} of ${stops.length}`), text(`<b>${title}.</b> ${said}`),
        createElement("span", { class: "acts" }, createElement("button", { type: "button", class: "btn", disabled: stop === 0, onclick: () => go(stop - 1) }, "Back"),
          button(stop === stops.length - 1 ? "Done" : "Next", next, "go", "N"), button("Skip", () => go(-1), "link", "Esc")));
    } else if (findings.length) {
      const [worst] = findings;
      element.classList.toggle("alarm", worst.severity !== "note");
      const said = createElement("p", {}, createElement("b", {}, worst.severity === "note" ? "Note: " : "Problem: "), findingText(worst),
        worst.missing ? createElement("span", { class: "quiet" }, ` ${worst.missing}`) : null);
      element.replaceChildren(said, createElement("span", { class: "acts" },
        view.numberOf(worst) ? button("Show it", () => view.openFinding(worst)) : null,
        button(findings.length > 1 ? `${findings.length - 1} more` : "Diagnosis", () => view.root.querySelector(".health").scrollIntoView())));
    } else if (effect) {
      element.replaceChildren(text(`<b class="edited">Your change:</b> ${effect}`), createElement("span", { class: "acts" }, button(isHidden ? "Tour" : "Start the tour", () => go(0), "link", "T")));
    } else if (view.pageData.baseline) {
      element.hidden = true; // the line of the comparison is above
    } else if (!isHidden) {
      const number = tourStops(view).at(-2)?.number ?? view.number;
      element.replaceChildren(text(`<b>New to ${view.data.shortName}?</b> A few short stops explain where ${view.symbols.of(number)} comes from. Every number on this page is real and can be clicked.`),
        createElement("span", { class: "acts" }, button("Start the tour", () => go(0), "go", "T"), button("No, thanks", () => go(-1), "link")));
    } else {
      element.replaceChildren(createElement("p", {}, createElement("span", { class: "fine" }, "✓ "), `No problem found in ${view.model.length} ${view.model.length === 1 ? "step" : "steps"}${view.row.edits.size ? ", without your changes" : ""}. `, createElement("span", { class: "quiet" }, checkedText(view.data.health))),
        createElement("span", { class: "acts" }, button("Tour", () => go(0), "link", "T")));
    }
  }

  function next() {
    go(stop + 1 < stops.length ? stop + 1 : -1);
  }

  return { element, update, start: () => go(0), next, stop: () => go(-1), get touring() { return stop >= 0; } };
}
