// Names of quantities as symbols, in markup.

const GREEK = { __proto__: null, alpha: "α", beta: "β", gamma: "γ", delta: "δ", epsilon: "ε", zeta: "ζ", eta: "η", theta: "θ", lambda: "λ", mu: "μ", nu: "ν", rho: "ρ", sigma: "σ", tau: "τ", phi: "φ", psi: "ψ", omega: "ω" };

export const escape = (text) => String(text).replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

/** A name as base and index: hidden_n is "hidden" with the index "n". */
export function splitName(name) {
  const at = name.indexOf("_");
  const base = at > 0 ? name.slice(0, at) : name;
  return [GREEK[base] ?? base, at > 0 ? name.slice(at + 1).replaceAll("_", " ") : ""];
}

/** The markup of a symbol. A base of several letters is a word. */
export function symbol(name, ...indices) {
  const [base, index] = splitName(name);
  const below = [index, ...indices].filter((one) => one !== "").map(escape).join(",");
  return `<var${base.length > 1 ? ' class="word"' : ""}>${escape(base)}</var>${below ? `<sub>${below}</sub>` : ""}`;
}

/** Weights as in torch's documentation, W_if, or with the rows of a gate in brackets, W_ih[candidate]. */
export function parameterText(text) {
  return escape(text)
    .replace(/\bweight_(\w+)/g, "<var>W</var><sub>$1</sub>")
    .replace(/\bbias_(\w+)/g, "<var>b</var><sub>$1</sub>")
    .replace(/\b([Wb])_(\w+)/g, "<var>$1</var><sub>$2</sub>")
    .replaceAll("·", " ");
}

/** Symbols for the numbers of a layer. */
export class Symbols {
  constructor(model) {
    this.model = model;
  }

  step(t) {
    return t === this.model.start ? "start" : t;
  }

  /** The symbol of a number: h₂[1]. With time "t" it is that of the quantity at any step. */
  of(number, time = this.step(number.t)) {
    const { model } = this;
    const unit = number.u === undefined ? "" : `<span class="ix">[${number.u}${number.j === undefined ? "" : `,${number.j}`}]</span>`;
    if (model.isParameter(number)) return this.parameter(number);
    const { kind, node, term } = model.isStart(number) ? { kind: "state" } : model.quantity(number.q);
    if (kind === "input" || kind === "state") return symbol(number.q, time) + unit;
    if (kind === "term") return `(${this.term(term, time)})${unit}`;
    const label = model.labels.get(node.id);
    if (kind === "sum") return `sum<sub>${symbol(label || node.glyph)}</sub>${unit}`;
    if (label) return symbol(label, time) + unit;
    return this.expression(node, number, time);
  }

  /** An element of a parameter, named by its gate where it has one. */
  parameter({ q, u, j }) {
    const names = this.model.parameters.get(q).rowNames;
    const block = names.find(({ start, stop }) => u >= start && u < stop);
    const [name, row] = block && (block.gate || names.length < 2) ? [block.symbol, u - block.start + block.firstUnit] : [q, u];
    return `${parameterText(name)}<span class="ix">[${row}${j === undefined ? "" : `,${j}`}]</span>`;
  }

  /** The formula of a weighted sum. */
  term(term, time) {
    const [before, after = ""] = term.text.split("{}");
    return parameterText(before) + (term.source ? this.source(term.source, time) : "") + parameterText(after);
  }

  /** The symbol of a node's operand at step t, without an index. */
  source(source, time) {
    if (source === "x") return symbol("x", time);
    if (source.startsWith("before:")) return symbol(source.slice(7), typeof time === "number" ? this.step(this.model.previous(time)) : this.model.backward ? `${time}+1` : `${time}−1`);
    const node = this.model.nodesById.get(source);
    const label = this.model.labels.get(source);
    return label ? symbol(label, time) : this.expression(node, null, time);
  }

  /** The formula of a node. With a number, of this element. */
  expression(node, number, time) {
    const operand = (term) => {
      if (term.weighted) return this.term(term, time);
      if (term.source === null) return parameterText(term.text);
      const inner = number && typeof number.t === "number" ? this.of(this.model.sourceOf(term, number.t, number.u)) : this.source(term.source, time);
      const source = this.model.nodesById.get(term.source);
      const isLoose = source && !this.model.labels.get(source.id) && ["sum", "difference"].includes(source.operation);
      const [before, after = ""] = term.text.split("{}");
      return `${parameterText(before)}${isLoose && (node.operation === "product" || before || after) ? `(${inner})` : inner}${parameterText(after)}`;
    };
    const signed = () => node.terms.map((term, k) => `${term.sign < 0 || (k && node.operation === "difference") ? (k ? " − " : "−") : k ? " + " : ""}${operand(term)}`).join("");
    switch (node.operation) {
      case "activation": return `<span class="rm">${escape(node.glyph)}</span>(${signed()})`;
      case "sum": case "difference": return signed();
      case "product": return node.terms.map(operand).join(number ? "·" : " ⊙ ");
      case "quotient": return node.terms.map(operand).join(" / ");
      default: return `<span class="rm">${escape(node.glyph)}</span>(${node.terms.map(operand).join(", ")})`;
    }
  }

  /** What a table of a layer's numbers is about: its name, its weighted sum, or its activation function. */
  title(node) {
    const label = this.model.labels.get(node.id);
    return label ? symbol(label) : node.glyph === "W" ? this.expression(node, null, "t") : escape(node.glyph);
  }

  /** The name of a number for screen readers: "h, step 2, unit 1". */
  spoken(number) {
    const { model } = this;
    const { q, t, u, j } = number;
    if (model.isParameter(number)) return `${q}, row ${u}${j === undefined ? "" : `, column ${j}`}`;
    const place = `${model.isStart(number) ? "initial" : `step ${t}`}, ${q === "x" ? "feature" : "unit"} ${u}`;
    return `${this.spokenQuantity(model.isStart(number) ? null : model.quantity(q), q)}, ${place}`;
  }

  /** The name of a quantity for screen readers. */
  spokenQuantity(found, q) {
    if (!found || found.kind === "input" || found.kind === "state") return q;
    const { kind, node, term } = found;
    const label = this.model.labels.get(node.id);
    const name = Symbols.plain(label ? symbol(label) : this.expression(node, null, "t")).replaceAll("−", " minus ").replaceAll("⊙", "times");
    if (kind === "sum") return `sum for ${name}`;
    if (kind === "term") return `part of ${name}: ${Symbols.plain(this.term(term, "t"))}`;
    return name;
  }

  /** Plain text of markup, for titles and screen readers. */
  static plain(markup) {
    return markup.replace(/<sub>(.*?)<\/sub>/g, (_, inner) => ` ${inner}`).replace(/<[^>]+>/g, "").replace(/&#(\d+);/g, (_, code) => String.fromCharCode(code));
  }
}
