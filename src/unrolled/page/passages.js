// Passages of a text: where a unit is strongest, and where several units behave as in a selected range.
//
// A range is [first, last], both included. Values are those of one unit at every step, or of all units, step after
// step. A value that isn't known, or isn't finite, belongs to no passage.

/** The windows with the highest means (sign 1) or the lowest ones (sign -1) that don't overlap: [{range, mean}]. */
export function strongestPassages(values, width, sign, count) {
  const size = Math.min(width, values.length);
  const sums = new Float64Array(values.length + 1);
  const missing = new Uint32Array(values.length + 1);
  values.forEach((value, k) => {
    sums[k + 1] = sums[k] + (Number.isFinite(value) ? value : 0);
    missing[k + 1] = missing[k] + (Number.isFinite(value) ? 0 : 1);
  });
  const windows = [];
  for (let from = 0; from + size <= values.length; from += 1) {
    if (missing[from + size] === missing[from]) windows.push({ range: [from, from + size - 1], mean: (sums[from + size] - sums[from]) / size });
  }
  windows.sort((a, b) => sign * (b.mean - a.mean) || a.range[0] - b.range[0]);
  const found = [];
  for (const one of windows) {
    if (found.length === count) break;
    if (found.every(({ range }) => one.range[0] > range[1] || one.range[1] < range[0])) found.push(one);
  }
  return found;
}

/** Whether a unit is on at a step: above the threshold, or with sign -1 below its negative. */
const isOn = (values, units, step, { unit, sign }, threshold) => sign * values[step * units + unit] >= threshold;

/** Whether a unit is on over a range, and off at the steps right before and after it. */
function isOnExactly(values, units, [first, last], one, threshold) {
  const length = values.length / units;
  for (let step = first; step <= last; step += 1) if (!isOn(values, units, step, one, threshold)) return false;
  const isOff = (step) => step < 0 || step >= length || !isOn(values, units, step, one, threshold);
  return isOff(first - 1) && isOff(last + 1);
}

/** The units that are on exactly over a range, the strongest first: [{unit, sign, mean}]. */
export function unitsOnOver(values, units, range, threshold, signs) {
  const found = [];
  for (let unit = 0; unit < units; unit += 1) {
    for (const sign of signs) {
      if (!isOnExactly(values, units, range, { unit, sign }, threshold)) continue;
      let sum = 0;
      for (let step = range[0]; step <= range[1]; step += 1) sum += values[step * units + unit];
      found.push({ unit, sign, mean: sum / (range[1] - range[0] + 1) });
    }
  }
  return found.sort((a, b) => Math.abs(b.mean) - Math.abs(a.mean) || a.unit - b.unit);
}

/**
 * Other passages in which units behave as in a range: [{range, matches}].
 *
 * A passage is a longest run of steps in which at least half of the units are on. Those in which more units are on
 * over the whole run, and off before and after it, come first; then those whose length is closer to that of the range.
 */
export function similarPassages(values, units, chosen, range, threshold, count) {
  if (!chosen.length) return [];
  const length = values.length / units;
  const passages = [];
  let first = null;
  for (let step = 0; step <= length; step += 1) {
    const isInside = step < length && 2 * chosen.filter((one) => isOn(values, units, step, one, threshold)).length >= chosen.length;
    if (isInside && first === null) first = step;
    if (isInside || first === null) continue;
    const run = [first, step - 1];
    first = null;
    if (run[0] > range[1] || run[1] < range[0]) passages.push({ range: run, matches: chosen.filter((one) => isOnExactly(values, units, run, one, threshold)).length });
  }
  const size = ([from, to]) => to - from;
  const distance = (one) => Math.abs(size(one.range) - size(range));
  return passages.sort((a, b) => b.matches - a.matches || distance(a) - distance(b) || a.range[0] - b.range[0]).slice(0, count);
}
