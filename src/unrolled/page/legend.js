// What the colors, lines and bars of the drawing mean.

import { differenceLegend } from "./comparison.js";
import { createElement } from "./dom.js";
import { MAX_BARS } from "./drawing.js";
import { isGate } from "./gates.js";

/** Create the legend. Returns {element, update}. */
export function createLegend(view) {
  const element = createElement("div", { class: "legend", "aria-hidden": "true" });
  const key = (className, text) => [createElement("span", { class: `k ${className}` }), text];

  function update() {
    const { model } = view;
    element.hidden = !model.drawing;
    if (element.hidden) return;
    const isDifference = view.mode === "difference";
    const hasShares = !isDifference && model.drawing.nodes.some((node) => node.range === "gate");
    const hasGates = model.nodes.some((node) => isGate(model, node));
    const keys = [...(hasShares ? [key("gate", hasGates ? "gate, 0 to 1" : "0 to 1")] : []), key("pos", "above zero"), key("neg", "below zero"), ...(view.edits.possible ? [key("can", "you can change it")] : [])];
    const text = isDifference ? differenceLegend(view) : `${bars(model)}Thicker line: larger number. Gray: the whole vector.`;
    element.replaceChildren(createElement("p", {}, text), createElement("p", {}, keys.flat()));
  }

  return { element, update };
}

/** What the bars in a box are: all units of a layer if there is room, else only the chosen one. */
function bars(model) {
  const sizes = model.drawing.nodes.filter((node) => node.kind === "layer").map((node) => model.sizes[node.value]);
  const most = Math.max(0, ...sizes.filter((size) => size <= MAX_BARS));
  if (most < 2) return "";
  const units = most === 2 ? "0 and 1" : `${Array.from({ length: most - 1 }, (_, unit) => unit).join(", ")} and ${most - 1}`;
  return `Bars in a box: units ${units}; the chosen one is dark. `;
}
