// How numbers are printed, and how many digits a line of arithmetic needs to be right when checked by hand.

const DECIMALS = 4;
const MAX_DECIMALS = 8;
const MINUS_SIGN = "−";

const minus = (text) => text.replace("-", MINUS_SIGN);

/** Format a number with a fixed number of decimals; a very large one in scientific notation. */
export function fixed(value, decimals = DECIMALS) {
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : `${MINUS_SIGN}∞`;
  if (Math.abs(value) >= 1e5) return minus(value.toExponential(decimals - 1));
  const text = value.toFixed(decimals);
  return Number(text) === 0 ? (0).toFixed(decimals) : minus(text);
}

/** Return the decimals of a result: four, or as many as a tiny number needs for two digits. */
export function decimalsOf(value) {
  const size = Math.abs(value);
  if (!(size > 0) || size >= 0.5 * 10 ** -DECIMALS) return DECIMALS;
  return Math.min(12, 1 - Math.floor(Math.log10(size)));
}

/** Format a result: 0.8190, or 0.000017. Below 1e-12 in scientific notation. */
export function shown(value) {
  const size = Math.abs(value);
  return size > 0 && size < 1e-11 ? minus(value.toExponential(1)) : fixed(value, decimalsOf(value));
}

/** The decimals of a number that is printed with at least some decimals: more if it is tiny. */
export const printedDecimals = (value, decimals) => Math.max(decimals, decimalsOf(value));

/** Format a given number with as few decimals as it has, at least two: 0.50, −1.2345. */
export function given(value, decimals = DECIMALS) {
  const isShort = Math.abs(value) < 1e3 && Math.abs(value * 100 - Math.round(value * 100)) < 1e-4 && (value === 0 || Math.abs(value) > 1e-4);
  return isShort ? fixed(value, 2) : Math.abs(value) < 5e-5 ? shown(value) : fixed(value, decimals);
}

export const FUNCTIONS = {
  sigmoid: (v) => 1 / (1 + Math.exp(-v)),
  tanh: Math.tanh,
  relu: (v) => Math.max(0, v),
  exp: Math.exp,
  softplus: (v) => (v > 20 ? v : Math.log1p(Math.exp(v))),
  silu: (v) => v / (1 + Math.exp(-v)),
  cos: Math.cos,
  sin: Math.sin,
  sqrt: Math.sqrt,
  log: Math.log,
};

/** Return the function of a call such as "tanh({})", or null if its arguments aren't just the operand. */
export function functionOf(call) {
  const match = /^(\w+)\(\{\}(?:, inplace=False)?\)$/.exec(call ?? "");
  return (match && FUNCTIONS[match[1]]) ?? null;
}

/** The function of a whole vector, as a function of its numbers and the number of an element; null if there is none. */
function vectorFunctionOf(call) {
  if (!/^softmax\(\{\}/.test(call)) return null;
  return (values, k) => Math.exp(values[k]) / values.reduce((sum, value) => sum + Math.exp(value), 0);
}

export const round = (value, decimals) => Number(value.toFixed(decimals));
const same = (a, b, decimals) => a.toFixed(decimals) === b.toFixed(decimals) || (round(a, decimals) === 0 && round(b, decimals) === 0);

/** Return the product, or quotient, of the factors of a row. */
export function rowValue(row, valueOf) {
  const values = row.factors.map(valueOf);
  return row.quotient ? values[0] / values[1] : values.reduce((product, value) => product * value, 1);
}

/** The decimals of a factor. A quotient that has a line of its own has those of its line. */
export function factorDecimals({ before = [] }, one, { factor, product }) {
  const hasLine = before.some(({ number, isQuotient }) => isQuotient && number.q === one.q && number.u === one.u);
  return hasLine ? product : factor;
}

const MAX_ROWS = 8; // of a sum; a longer one shows its largest terms

/** Return the largest rows in their order, and the others. The bias is always among the first. */
export function splitRows(rows, valueOf) {
  if (rows.length <= MAX_ROWS + 1) return [rows, []];
  const hasBias = rows.some((row) => row.factors.length > 1);
  const size = (row) => (hasBias && row.factors.length < 2 ? Infinity : Math.abs(rowValue(row, valueOf)));
  const kept = new Set([...rows].sort((a, b) => size(b) - size(a)).slice(0, MAX_ROWS));
  return [rows.filter((row) => kept.has(row)), rows.filter((row) => !kept.has(row))];
}

/** Return the sum of the rows that a long sum doesn't show. */
export const restValue = (rows, valueOf) => rows.reduce((sum, row) => sum + row.sign * rowValue(row, valueOf), 0);

/**
 * Return the fewest decimals with which every printed line is right when it is done by hand.
 *
 * Factors, products, sums of parts and the sum may each have more decimals than the result: {factor, product, part, sum}.
 * Null if no choice is enough, as for large numbers.
 */
export function chooseDecimals(derived, result, valueOf) {
  const end = decimalsOf(result);
  const apply = functionOf(derived.call);
  const applyToVector = derived.vector ? vectorFunctionOf(derived.call) : null;
  const agreesWithVector = (decimals) => !applyToVector || same(applyToVector(derived.vector.map((one) => round(valueOf(one), decimals)), derived.element), result, end);
  const total = derived.of ? valueOf(derived.of) : null;
  const splits = new Map();
  const split = (rows) => {
    if (!splits.has(rows)) splits.set(rows, splitRows(rows, valueOf));
    return splits.get(rows);
  };
  const isRight = ({ factor, product, part, sum }) => {
    const printed = (one) => round(valueOf(one), printedDecimals(valueOf(one), factorDecimals(derived, one, { factor, product })));
    const rowPrinted = (row) => rowValue(row, printed);
    const lineIsRight = (row, decimals) => row.factors.length < 2 || same(rowPrinted(row), rowValue(row, valueOf), decimals);
    const added = (rows) => {
      const [kept, rest] = split(rows);
      return kept.reduce((s, row) => s + row.sign * (row.factors.length < 2 ? rowPrinted(row) : round(rowValue(row, valueOf), product)), round(restValue(rest, valueOf), product));
    };
    if (derived.parts) {
      let joined = 0;
      for (const one of derived.parts) {
        if (!one.rows.every((row) => lineIsRight(row, product))) return false;
        if (one.total && !same(added(one.rows), valueOf(one.total), part)) return false;
        joined += one.sign * (one.total ? round(valueOf(one.total), part) : added(one.rows));
      }
      if (!derived.of) return same(joined, result, end);
      return same(joined, total, sum) && (!apply || same(apply(round(total, sum)), result, end)) && agreesWithVector(sum);
    }
    for (const line of derived.before ?? []) {
      const isRightLine = line.rows
        ? line.rows.every((row) => lineIsRight(row, product)) && (line.isQuotient || same(added(line.rows), valueOf(line.number), part))
        : !functionOf(line.call) || same(functionOf(line.call)(round(valueOf(line.of), part)), valueOf(line.number), printedDecimals(valueOf(line.number), factor));
      if (!isRightLine) return false;
    }
    if (derived.rows.length === 1 && !derived.glyph) return lineIsRight(derived.rows[0], end);
    if (derived.vector) return agreesWithVector(factor);
    if (derived.glyph) return !apply || same(apply(rowPrinted(derived.rows[0])), result, end);
    return derived.rows.every((row) => lineIsRight(row, product)) && same(added(derived.rows), result, end);
  };
  const finite = [result, ...derived.rows.map((row) => rowValue(row, valueOf))].every((value) => Math.abs(value) < 1e5);
  if (!finite) return null;
  for (let factor = DECIMALS; factor <= MAX_DECIMALS + 4; factor += 1) {
    for (let product = DECIMALS; product <= factor; product += 1) {
      for (let part = DECIMALS; part <= product; part += 1) {
        for (let sum = DECIMALS; sum <= part; sum += 1) {
          const decimals = { factor, product, part, sum };
          if (isRight(decimals)) return decimals;
        }
      }
    }
  }
  return null;
}

export const ALL_DECIMALS = { factor: MAX_DECIMALS, product: MAX_DECIMALS, part: MAX_DECIMALS, sum: MAX_DECIMALS };
