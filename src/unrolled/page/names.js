// Names of quantities and parameters, in markup.

const GREEK = { __proto__: null, alpha: "α", beta: "β", gamma: "γ", delta: "δ", epsilon: "ε", zeta: "ζ", eta: "η", theta: "θ", lambda: "λ", mu: "μ", nu: "ν", rho: "ρ", sigma: "σ", tau: "τ", phi: "φ", psi: "ψ", omega: "ω" };

export const escape = (text) => String(text).replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

const FUNCTION_NAMES = new Set(["log", "exp", "sin", "cos", "tan", "tanh", "sqrt", "min", "max", "sum", "mean", "norm", "softmax"]);

/** A name as base and index: hidden_n is "hidden" with the index "n". The name of a function has none: log_f isn't the logarithm to the base f. */
export function splitName(name) {
  const at = FUNCTION_NAMES.has(name.split("_")[0]) ? 0 : name.indexOf("_");
  const base = at > 0 ? name.slice(0, at) : name;
  return [GREEK[base] ?? base, at > 0 ? name.slice(at + 1).replaceAll("_", " ") : ""];
}

/** The markup of a symbol. A base of several letters is a word. */
export function symbol(name, ...indices) {
  const [base, index] = splitName(name);
  const below = [index, ...indices].filter((one) => one !== "").map(escape).join(",");
  return `<var${base.length > 1 ? ' class="word"' : ""}>${escape(base)}</var>${below ? `<sub>${below}</sub>` : ""}`;
}

/** A description to show after the name of its quantity, without the name if it begins with that: "for the new state". */
export function afterName(name, description) {
  if (description.toLowerCase() === name.toLowerCase()) return "";
  return description.toLowerCase().startsWith(`${name.toLowerCase()} `) ? description.slice(name.length + 1) : description;
}

/** The rows of a parameter around one row, with the gate that they compute; undefined for another number. */
export const blockOf = (model, { q, u }) => model.parameters.get(q)?.rowNames.find(({ start, stop }) => u >= start && u < stop);

/** Weights as in torch's documentation, W_if, or with the rows of a gate in brackets, W_ih[candidate]. */
export function parameterText(text) {
  return escape(text)
    .replace(/\bweight_(\w+)/g, "<var>W</var><sub>$1</sub>")
    .replace(/\bbias_(\w+)/g, "<var>b</var><sub>$1</sub>")
    .replace(/\b([Wb])_(\w+)/g, "<var>$1</var><sub>$2</sub>")
    .replaceAll("·", " ")
    .replaceAll("⊙", " ⊙ ");
}
