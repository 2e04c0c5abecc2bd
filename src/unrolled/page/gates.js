// Which quantities are gates, and what they scale. A number from 0 to 1 that is only added to others isn't a gate.

/** Return the products that a node goes into, also after a product with a constant: [{product, isExact}]. */
function productsOf(model, node, isExact = true) {
  return model.readers.get(node.id).filter((reader) => reader.operation === "product").flatMap((product) => {
    const hasOther = product.terms.some((term) => term.source !== node.id && term.source);
    return hasOther ? [{ product, isExact }] : productsOf(model, product, false);
  });
}

/** The differences 1 − gate that the drawing has as gates, too. */
const complementsOf = (model, node) => model.readers.get(node.id).filter((reader) => reader.operation === "difference" && reader.range === "gate");

/** Whether a node is from 0 to 1 and scales another number, or is called a gate in the cell's docstring. */
export function isGate(model, node) {
  if (node.range !== "gate") return false;
  const isCalledGate = /\bgate\b/.test((model.descriptions[node.name] ?? "").split(":")[0]);
  return isCalledGate || [node, ...complementsOf(model, node)].some((one) => productsOf(model, one).length > 0);
}

/**
 * What a gate multiplies: {other, state, keeps}, or null if that is more than one number.
 *
 * The term of the other factor; its name if it is a state before the step; whether the product is a part of the new state.
 */
export function gatedFactor(model, node) {
  const { product, isExact } = productsOf(model, node)[0] ?? {};
  if (!isExact || product.terms.length !== 2) return null;
  const other = product.terms.find((term) => term.source !== node.id && term.source);
  const state = other.source.startsWith("before:") ? model.statesByName.get(other.source.slice(7)) : null;
  const keeps = state !== null && (product.id === state.end || model.nodesById.get(state.end).terms.some((term) => term.source === product.id));
  return { other, state: state?.name ?? null, keeps };
}

/** A share between 0 and 1 in percent. */
export function percent(share) {
  const value = 100 * share;
  if (value < 0.01) return "less than 0.01 %";
  if (value > 99.99) return "more than 99.99 %";
  return value < 1 || value > 99 ? `${Number(value.toFixed(2))} %` : `${Math.round(value)} %`;
}

/** A factor with few digits. */
export const shortNumber = (value) => String(Number(value.toPrecision(3))).replace(/^-/, "−");
