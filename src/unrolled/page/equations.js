// The equations of the cell, with the part of the chosen number lit.

import { createElement, createMarkup } from "./dom.js";
import { definitionText, elementsOf, formula, termFormula } from "./formula.js";
import { escape, symbol } from "./names.js";
import { outputDescription, outputName } from "./tensor_names.js";

/** The output at step t, or what it is for a layer below another. */
function outputMarkup(model) {
  const [name, index] = outputName(model, "t").split("[");
  if (!index) return `<span class="rm">${escape(outputDescription(model).replace(/^(part of )?the /, "$1"))}</span>`;
  return `<span class="rm">${name}</span>[${escape(index).replace("t", "<var>t</var>")}`;
}

/** Create the list of equations. Returns {element, update}. */
export function createEquations(view) {
  const element = createElement("ol", { class: "equations", "aria-label": "Equations of one step" });
  let drawn = null;

  function update() {
    if (drawn !== view.model) {
      const lines = view.model.equations.map(plainLine);
      const definitions = view.model.definitions.map((one) => Object.assign(plainLine(definitionText(one)), { terms: [{ constants: one.parameters }] }));
      element.replaceChildren(...(lines.length ? lines : [...definitions, ...view.model.nodes.filter(hasLine).map(line)]));
      drawn = view.model;
    }
    const chosen = view.number.q;
    for (const item of element.children) item.classList.toggle("on", item.quantities.includes(chosen) || item.terms.some(reads));
    for (const part of element.querySelectorAll("[data-q]")) {
      const isPart = chosen.startsWith("sum.") && part.dataset.q.startsWith(`${chosen.slice(4)}.`);
      const found = view.model.isParameter(view.number) && view.model.quantity(part.dataset.q);
      part.classList.toggle("on", part.dataset.q === chosen || isPart || (found && found.kind === "term" && reads(found.term)));
    }
  }

  /** Whether a term has the chosen parameter, in its own rows. */
  function reads(term) {
    const { q, u, j } = view.number;
    const isIn = (rows, row) => !rows || (row >= rows[0] && row < rows[1]);
    return term.constants.includes(q) || (term.parameter === q && isIn(term.rows, term.transposed ? j : u)) || (term.bias === q && isIn(term.biasRows, u));
  }

  const plainLine = (markup) => Object.assign(createMarkup("li", markup), { quantities: [], terms: [] });

  const hasLine = (node) => view.model.labels.get(node.id) !== "";

  function line(node) {
    const { model, symbols } = view;
    const key = model.keys.get(node.id);
    const left = part(key, symbol(model.labels.get(node.id), "t"));
    const output = model.states[0].end === node.id ? ` <span class="quiet">= ${outputMarkup(model)}</span>` : "";
    const item = createElement("li", {});
    item.innerHTML = `${left} = ${right(node).markup}${output}`;
    const inside = inner(node);
    item.quantities = [...model.quantitiesOf(node), ...inside.map((one) => model.keys.get(one.id))];
    item.terms = [node, ...inside].flatMap((one) => one.terms);
    item.addEventListener("click", (event) => {
      const chosen = event.target.closest("[data-q]");
      if (chosen) view.choose({ q: chosen.dataset.q, t: view.step, u: Math.min(view.unit, model.size(chosen.dataset.q) - 1) });
    });
    return item;
  }

  /** The nodes without a name that are part of a line. */
  function inner(node) {
    return node.terms.flatMap((term) => {
      const source = view.model.nodesById.get(term.source);
      return source && !hasLine(source) ? [source, ...inner(source)] : [];
    });
  }

  const part = (q, markup) => `<span data-q="${escape(q)}">${markup}</span>`;

  const inPart = (q, written) => ({ ...written, markup: part(q, written.markup) });

  function right(node) {
    const { model, symbols } = view;
    const operand = (term) => {
      const source = model.nodesById.get(term.source);
      const isWrittenOut = source && !hasLine(source) && !model.isPart(node, term);
      const vector = isWrittenOut ? inPart(model.keys.get(source.id), right(source)) : symbols.read(term.source, "t");
      return termFormula(term, elementsOf(vector, term));
    };
    const mark = (written, term) => (model.isPart(node, term) ? inPart(`${model.keys.get(node.id)}.${node.terms.indexOf(term)}`, written) : written);
    return formula(node, operand, " ⊙ ", mark);
  }

  return { element, update };
}
