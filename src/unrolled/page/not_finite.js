// NaN and infinity among the numbers of a step. A finding may name a variable without a place in the drawing, such as the
// sums of all gates. What follows from it isn't finite, either.

/** The first number of a step that isn't finite, {q, t, u}, among those for which a function is true; null if there is none. */
export function firstNotFinite(model, t, isWanted = () => true) {
  for (const q of model.order) {
    const index = model.valueIndex(q);
    const u = model.read(model.values.row(t), index).findIndex((value) => !Number.isFinite(value));
    if (u >= 0 && isWanted(index, u)) return { q, t, u };
  }
  return null;
}
