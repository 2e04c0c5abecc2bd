// The terms of a weighted sum.

/** The rows of arithmetic of a weighted sum: a weight times an element each, and the bias. */
export function weightedRows(model, term, step, unit) {
  const [firstRow, lastRow] = term.rows ?? [0, 0];
  const parameter = model.parameters.get(term.parameter);
  if (!parameter?.values || !term.rows) return null;
  const sourceCount = term.elements?.length ?? model.sourceSize(term.source);
  const perBlock = sourceCount / term.blocks;
  const block = Math.floor(unit / ((lastRow - firstRow) / term.blocks));
  const [firstColumn] = term.columns ?? [0];
  const rows = Array.from({ length: perBlock }, (_, column) => {
    const row = firstRow + unit;
    const at = firstColumn + column;
    const position = block * perBlock + column;
    const weight = term.transposed ? { q: term.parameter, u: at, j: row } : { q: term.parameter, u: row, j: at };
    return { sign: 1, factors: [weight, model.sourceNumber(term.source, step, term.elements ? term.elements[position] : position)] };
  });
  if (term.bias) rows.push({ sign: 1, factors: [{ q: term.bias, u: (term.biasRows?.[0] ?? 0) + unit }] });
  return rows;
}
