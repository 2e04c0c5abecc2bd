// The numbers of a heat map: of every step and unit, or means over some of them.

import { fixed, shown } from "./digits.js";
import { decodeBytes } from "./numbers.js";

const MAX_CODE = 252; // of a finite mean in a heat map that is coded in 8 bits
const SPECIAL_CODES = new Map([[253, NaN], [254, Infinity], [255, -Infinity]]);
const MAX_EXACT_STEPS = 256; // of a part that is zoomed into; a longer one shows the means that the page has

/**
 * The numbers of a quantity in the window [first, stop) of the steps, in one of two orders of the units.
 *
 * Returns {values, steps, features, binSteps, binFeatures, statistics, stepAt(x), featureAt(y), columnOf(step), rowOf(feature), print(value), isWindow}.
 * isWindow says whether the statistics are only of the window.
 */
export function createGrid(model, q, [first, stop], order) {
  const isPart = stop - first < model.length;
  const canBeExact = model.complete && isPart && stop - first <= MAX_EXACT_STEPS;
  if (model.maps && !canBeExact) return binnedGrid(model.maps[q], [first, stop], order);
  return { ...fullGrid(model, q, [first, stop], order), isWindow: isPart };
}

/** The order of the features of a quantity: of each unit, or of each unit in each of several blocks, such as gates. */
export function featureOrder({ unitOrder, units }, q, size, order) {
  const isBlocks = order === "similar" && q !== "x" && size % units === 0;
  if (!isBlocks) return Array.from({ length: size }, (_, feature) => feature);
  return Array.from({ length: size }, (_, y) => y - (y % units) + unitOrder[y % units]);
}

function positionsOf(features) {
  const positions = new Int32Array(features.length);
  features.forEach((feature, y) => { positions[feature] = y; });
  return positions;
}

/** The values of a quantity at every step of a window. */
function fullGrid(model, q, [first, stop], order) {
  const index = model.valueIndex(q);
  const size = model.sizes[index];
  const features = featureOrder(model, q, size, order);
  const positions = positionsOf(features);
  const values = new Float64Array((stop - first) * size);
  for (let x = 0; x < stop - first; x += 1) {
    const row = model.read(model.values.row(first + x), index);
    for (let y = 0; y < size; y += 1) values[x * size + y] = row[features[y]];
  }
  return { values, steps: stop - first, features: size, binSteps: 1, binFeatures: 1, statistics: statistics(values),
    stepAt: (x) => first + x, featureAt: (y) => features[y], columnOf: (step) => step - first, rowOf: (feature) => positions[feature], print: shown };
}

/** The means of a heat map. Those of a recorded run are coded in 8 bits. */
export function mapMeans({ low, high, codes, means }) {
  return means ?? Float64Array.from(decodeBytes(codes), (code) => SPECIAL_CODES.get(code) ?? low + ((high - low) * code) / MAX_CODE);
}

/** The distance between two means that a heat map can tell apart. */
export const mapResolution = ({ low, high, means, resolution }) => resolution ?? (means ? 0 : (high - low) / MAX_CODE);

/** The part of a heat map's means that is in a window. */
function binnedGrid(map, [first, stop], order) {
  const { binSteps, binFeatures, rows, featureOrder: features } = order === "weights" && map.byIndex ? map.byIndex : map;
  const isSorted = order === "weights" && !map.byIndex; // one unit in each row, so that the rows can be sorted here
  const [from, to] = [Math.floor(first / binSteps), Math.ceil(stop / binSteps)];
  const all = mapMeans(order === "weights" && map.byIndex ? map.byIndex : map);
  const values = all.slice(from * rows, to * rows);
  if (isSorted) for (let x = 0; x < to - from; x += 1) for (let y = 0; y < rows; y += 1) values[x * rows + features[y]] = all[(from + x) * rows + y];
  const shownFeatures = isSorted ? [...features].sort((a, b) => a - b) : features;
  const positions = positionsOf(shownFeatures);
  const resolution = mapResolution(map);
  const print = (value) => (resolution > 0 ? `about ${fixed(value, Math.max(0, Math.min(8, Math.floor(-Math.log10(resolution)))))}` : shown(value));
  return { values, steps: to - from, features: rows, binSteps, binFeatures, statistics: map.statistics ?? statistics(all), isWindow: false,
    stepAt: (x) => Math.max(first, (from + x) * binSteps), featureAt: (y) => shownFeatures[y * binFeatures], columnOf: (step) => Math.floor(step / binSteps) - from, rowOf: (feature) => Math.floor(positions[feature] / binFeatures), print };
}

/** The statistics of the finite values. */
function statistics(values) {
  const found = { low: Infinity, high: -Infinity, sum: 0, finite: 0, count: values.length, saturated: { gate: 0, tanh: 0 } };
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    [found.low, found.high, found.sum, found.finite] = [Math.min(found.low, value), Math.max(found.high, value), found.sum + value, found.finite + 1];
    if (value < 0.01 || value > 0.99) found.saturated.gate += 1;
    if (Math.abs(value) > 0.99) found.saturated.tanh += 1;
  }
  return found;
}

/** The smallest, mean and largest value, and the share that is saturated, as [label, text]. */
export function statisticsLines({ low, high, sum, finite, count, saturated }, range) {
  const lines = finite ? [["min", fixed(low, 2)], ["mean", fixed(sum / finite, 2)], ["max", fixed(high, 2)]] : [];
  if (range) lines.push(["saturated", `${Math.round((100 * saturated[range]) / Math.max(1, finite))} %`]);
  if (finite < count) lines.push(["not finite", String(count - finite)]);
  return lines;
}
