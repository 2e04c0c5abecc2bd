// Symbols for the numbers of a layer.

import { addendFormula, asFactor, ATOM, callFormula, continuesNormalization, elementsOf, formula, indexText, parametersOf, termFormula, withIndex } from "./formula.js";
import { escape, parameterText, symbol } from "./names.js";

const LONG_FORMULA = 24; // characters

/** The symbols and formulas of the numbers of a layer, in markup. */
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
    const unit = number.u === undefined ? "" : indexText(number);
    if (model.isParameter(number)) return this.parameter(number);
    const { kind, node, term, state } = model.isStart(number) ? { kind: "state" } : model.quantity(number.q);
    if (kind === "before") return symbol(state.name, `before ${time}`) + unit;
    if (kind === "input" || kind === "state") return symbol(number.q, time) + unit;
    if (kind === "term") return withIndex(this.#term(node, term, time), number).markup;
    const label = model.labels.get(node.id);
    if (kind === "sum") return `sum<sub>${symbol(label || node.glyph)}</sub>${unit}`;
    if (label) return symbol(label, time) + unit;
    return this.expression(node, number, time);
  }

  /** The symbol of a number in a product or quotient, in parentheses where it needs them: (1 − z₂[1]). A long one is shortened. */
  factor(number, isDivisor = false) {
    const { model } = this;
    const found = model.isParameter(number) || model.isStart(number) ? null : model.quantity(number.q);
    if (found?.kind !== "node" || model.labels.get(found.node.id)) return this.of(number);
    const time = this.step(number.t);
    const whole = this.#formula(found.node, number, time);
    return asFactor(Symbols.plain(whole.markup).length > LONG_FORMULA ? withIndex(callFormula(found.node, "…") ?? this.#short(found.node, time), number) : whole, isDivisor);
  }

  /** An element of a parameter, named by its gate where it has one. */
  parameter({ q, u, j }) {
    const names = this.model.parameters.get(q).rowNames;
    const block = names.find(({ start, stop }) => u >= start && u < stop);
    const [name, row] = block && (block.gate || names.length < 2) ? [block.symbol, u - block.start + block.firstUnit] : [q, u];
    return parameterText(name) + indexText({ u: row, j });
  }

  /** The formula of a term that has a value of its own. */
  term(node, term, time) {
    return this.#term(node, term, time).markup;
  }

  #term(node, term, time) {
    return addendFormula(node, term, (one) => this.#termFormula(one, null, time));
  }

  /** The symbol of a node's operand at step t, without an index. */
  source(source, time) {
    return this.read(source, time).markup;
  }

  /** Return the formula of a term's operand as {markup, precedence}. */
  read(source, time) {
    const isNode = source && source !== "x" && !source.startsWith("before:");
    if (isNode && !this.model.labels.get(source)) return this.#formula(this.model.nodesById.get(source), null, time);
    return { markup: source ? symbol(...this.#read(source, time)) : "", precedence: ATOM };
  }

  #read(source, time) {
    const { model } = this;
    if (!source.startsWith("before:")) return [source === "x" ? "x" : model.labels.get(source), time];
    if (model.changedStates) return [source.slice("before:".length), `before ${time}`];
    const before = typeof time === "number" ? this.step(model.previous(time)) : model.backward ? `${time}+1` : `${time}−1`;
    return [source.slice("before:".length), before];
  }

  /** The formula of a node. With a number, of this element. */
  expression(node, number, time) {
    return this.#formula(node, number, time).markup;
  }

  /** The formula of a node for a narrow place. If it is long, what functions inside it are applied to is left out: c ⊙ tanh(…). */
  shortExpression(node, time) {
    const whole = this.expression(node, null, time);
    return Symbols.plain(whole).length > LONG_FORMULA ? this.#short(node, time).markup : whole;
  }

  #short(node, time) {
    const { model } = this;
    const omitted = { markup: "…", precedence: ATOM };
    const withoutParameters = (normalization) => ({ ...normalization, text: normalization.text.replace(/\(\{\}[^)]*\)/, "({})") });
    const terms = node.terms.filter((term) => !continuesNormalization(term)).map((term) => ({ ...term, normalization: term.normalization && withoutParameters(term.normalization) }));
    const operand = (term) => {
      if (term.normalization) return omitted;
      const source = model.nodesById.get(term.source);
      if (!source || model.labels.get(source.id)) return termFormula(term, elementsOf(this.read(term.source, time), term));
      return termFormula(term, elementsOf(callFormula(source, omitted.markup) ?? this.#short(source, time), term));
    };
    return formula({ ...node, terms }, operand);
  }

  #formula(node, number, time) {
    const readsVectors = node.terms.some((term) => term.weighted) || node.shapes.length > 0;
    if (!number || !readsVectors) return formula(node, (term) => this.#termFormula(term, number, time), number ? "·" : " ⊙ ");
    return withIndex(this.#formula(node, null, time), number);
  }

  #termFormula(term, number, time) {
    const hasElement = number && typeof number.t === "number" && term.source && !term.weighted;
    return termFormula(term, hasElement ? this.#element(term, number, time) : elementsOf(this.read(term.source, time), term));
  }

  /** The formula of the number that a term reads for one unit. */
  #element(term, { t, u }, time) {
    const node = this.model.nodesById.get(term.source);
    const number = this.model.sourceOf(term, t, u);
    return node && !this.model.labels.get(node.id) ? this.#formula(node, number, time) : { markup: this.of(number), precedence: ATOM };
  }

  /** What a table of a layer's numbers is about: its name, its weighted sum, or its activation function. */
  title(node) {
    const label = this.model.labels.get(node.id);
    return label ? symbol(label) : node.glyph === "W" ? this.expression(node, null, "t") : escape(node.glyph);
  }

  /** The same with the rows of the weights, or their names, if it is one of several layers without a name. */
  distinctTitle(node) {
    const { labels, nodes } = this.model;
    const isNameless = (one) => one.kind === "layer" && one.glyph !== "W" && !labels.get(one.id);
    if (!isNameless(node) || nodes.filter(isNameless).length < 2) return this.title(node);
    const weights = node.terms.filter((term) => term.weighted).map((term) => (term.gate ? escape(term.gate) : parameterText(parametersOf(term)[0])));
    return `${this.title(node)} <small>${weights.join(", ")}</small>`;
  }

  /** The name of a number for screen readers: "h, step 2, unit 1". */
  spoken(number) {
    const { model } = this;
    const { q, t, u, j } = number;
    if (model.isParameter(number)) return `${q}, row ${u}${j === undefined ? "" : `, column ${j}`}`;
    const isBefore = model.quantity(q)?.kind === "before";
    const place = `${model.isStart(number) ? "initial" : isBefore ? `before step ${t}` : `step ${t}`}, ${q === "x" ? "feature" : "unit"} ${u}`;
    return `${this.spokenQuantity(model.isStart(number) ? null : model.quantity(q), q)}, ${place}`;
  }

  /** The name of a quantity for screen readers. */
  spokenQuantity(found, q) {
    if (!found || found.kind === "input" || found.kind === "state") return q;
    if (found.kind === "before") return found.state.name;
    const { kind, node, term } = found;
    const label = this.model.labels.get(node.id);
    const name = Symbols.plain(label ? symbol(label) : this.expression(node, null, "t")).replaceAll("−", " minus ").replaceAll("⊙", "times");
    if (kind === "sum") return `sum for ${name}`;
    if (kind === "term") return `part of ${name}: ${Symbols.plain(this.term(node, term, "t"))}`;
    return name;
  }

  /** Plain text of markup, for titles and screen readers. */
  static plain(markup) {
    return markup.replace(/<sub>(.*?)<\/sub>/g, (_, inner) => ` ${inner}`).replace(/<[^>]+>/g, "").replace(/&#(\d+);/g, (_, code) => String.fromCharCode(code));
  }
}
