// The list of keys.

import { createElement } from "./dom.js";

const KEYS = [
  ["← →", "step, or column of a weight"], ["↑ ↓", "unit, or row of a weight"], ["j k", "next and previous number, in the order of computation"], ["Enter", "the first number that this one is computed from"],
  ["a letter", "the gate or state of that name; with Shift if the key does something else"], ["space", "play and pause"], ["e", "change the number"], ["Ctrl+Z", "undo the last change"], ["Shift R", "undo all changes"], ["w", "weights"], ["t n Esc", "tour: start, next, end"], ["d", "dark or light"], ["Backspace", "back"], ["?", "this list"],
];

export function createKeyList({ baseline, labels }, hasMaps) {
  const own = [...(hasMaps ? [["+ − 0", "heat maps: zoom in, zoom out, all steps"]] : []), ...(labels ? [["Shift ← →", "select a range of the text"]] : []), ...(baseline ? [["b", "this trace, the baseline, the difference"]] : [])];
  const keys = [...KEYS.slice(0, -2), ...own, ...KEYS.slice(-2)];
  return createElement("div", { class: "keys" }, keys.map(([key, text]) => [createElement("span", {}, key.split(" ").length > 1 && key !== "a letter" ? key.split(" ").map((one) => [createElement("kbd", {}, one), " "]) : createElement("kbd", {}, key)), createElement("span", {}, text)]));
}

export function createKeys(data, hasMaps) {
  return createElement("dialog", { class: "keys-dialog", "aria-label": "Keyboard" }, createElement("h2", {}, "Keyboard"), createKeyList(data, hasMaps),
    createElement("form", { method: "dialog" }, createElement("button", { class: "btn" }, "Close", createElement("kbd", {}, "Esc"))));
}
