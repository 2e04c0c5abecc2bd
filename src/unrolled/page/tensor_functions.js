// The functions of torch that steps use, in double precision. The array that stores a result rounds it.
// Change them together with unrolled/tracing/step_functions.py and step_translations.py.

// --- Elementwise functions: numbers to a number. ---

const isInfinite = (x) => x === Infinity || x === -Infinity;
const relu = (x) => Math.max(x, 0);
const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const clamp = (x, low, high) => Math.min(Math.max(x, low ?? -Infinity), high ?? Infinity);
const softplus = (x, beta, threshold) => (x * beta > threshold ? x : Math.log1p(Math.exp(x * beta)) / beta);
const elu = (x, alpha, scale = 1, inner = 1) => (x > 0 ? scale * x : scale * alpha * Math.expm1(x * inner));
const remainder = (a, b) => {
  const rest = a % b;
  return rest !== 0 && b < 0 !== rest < 0 ? rest + b : rest;
};

function roundToEven(x, decimals = 0) {
  if (decimals) return roundToEven(x * 10 ** decimals) / 10 ** decimals;
  const low = Math.floor(x);
  if (x - low !== 0.5) return Math.round(x);
  return low % 2 === 0 ? low : low + 1;
}

function divide(a, b, rounding) {
  if (rounding === null || b === 0) return a / b;
  if (rounding === "trunc") return Math.trunc(a / b);
  const rest = a % b;
  const quotient = (a - rest) / b - (rest !== 0 && b < 0 !== rest < 0); // exact, unlike a / b
  return Number.isFinite(quotient) ? Math.round(quotient) : quotient;
}

function power(a, b) {
  if (a === 1 || (a === -1 && isInfinite(b))) return 1; // unlike JavaScript, also for NaN and infinities
  return a ** b;
}

const logAddExp = (a, b) => (a === b ? a + Math.LN2 : Math.max(a, b) + Math.log1p(Math.exp(-Math.abs(a - b))));

/** The error function, by its power series, or by a continued fraction of its complement. */
function erf(x) {
  if (Math.abs(x) > 2.5) return Math.sign(x) * (1 - erfc(Math.abs(x)));
  let term = x;
  let sum = x;
  for (let n = 1; n < 80 && Math.abs(term) > 1e-18; n += 1) {
    term *= (2 * x * x) / (2 * n + 1);
    sum += term;
  }
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
}

function erfc(x) {
  if (!(x > 2.5)) return 1 - erf(x);
  let fraction = 0;
  for (let n = 100; n > 0; n -= 1) fraction = n / 2 / (x + fraction);
  return Math.exp(-x * x) / Math.sqrt(Math.PI) / (x + fraction);
}

function gelu(x, approximate) {
  if (approximate === "none") return (x * (1 + erf(x * Math.SQRT1_2))) / 2;
  return (x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x)))) / 2;
}

const SAME_AS_MATH = [ // the functions of Math with the same names
  ..."exp expm1 log log2 log10 log1p sqrt abs floor ceil trunc atan2".split(" "),
  ..."sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh".split(" "),
];

export const ELEMENT_FUNCTIONS = {
  ...Object.fromEntries(SAME_AS_MATH.map((name) => [name, Math[name]])),
  cast: (x) => x,
  sigmoid, relu, softplus, clamp, erf, erfc, gelu, remainder,
  maximum: Math.max, minimum: Math.min, round: roundToEven, pow: power, div: divide,
  hypot: (a, b) => Math.hypot(a, b),
  relu6: (x) => clamp(x, 0, 6),
  silu: (x) => x / (1 + Math.exp(-x)),
  mish: (x) => x * Math.tanh(softplus(x, 1, 20)),
  elu: (x, alpha) => elu(x, alpha),
  celu: (x, alpha) => elu(x, alpha, 1, 1 / alpha),
  selu: (x) => elu(x, 1.6732632423543772, 1.0507009873554805),
  leaky_relu: (x, slope) => (x > 0 ? x : x * slope),
  softsign: (x) => x / (1 + Math.abs(x)),
  logsigmoid: (x) => Math.min(x, 0) - Math.log1p(Math.exp(-Math.abs(x))),
  hardsigmoid: (x) => clamp(x + 3, 0, 6) / 6,
  hardswish: (x) => (x * clamp(x + 3, 0, 6)) / 6,
  hardtanh: clamp,
  hardshrink: (x, size) => (x >= -size && x <= size ? 0 : x),
  softshrink: (x, size) => (x > size ? x - size : x < -size ? x + size : x * 0),
  tanhshrink: (x) => x - Math.tanh(x),
  threshold: (x, limit, value) => (x <= limit ? value : x),
  exp2: (x) => 2 ** x,
  rsqrt: (x) => 1 / Math.sqrt(x),
  reciprocal: (x) => 1 / x,
  square: (x) => x * x,
  neg: (x) => -x,
  sign: (x) => (x > 0) - (x < 0),
  frac: (x) => x - Math.trunc(x),
  sinc: (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x)),
  logit: (x, eps) => {
    const p = eps === null ? x : clamp(x, eps, 1 - eps);
    return Math.log(p / (1 - p));
  },
  nan_to_num: (x, nan, high, low) => (x !== x ? nan : x === Infinity ? high : x === -Infinity ? low : x),
  isnan: (x) => x !== x,
  isinf: isInfinite,
  isfinite: Number.isFinite,
  signbit: (x) => x < 0 || Object.is(x, -0),
  logical_not: (x) => x === 0,
  add: (a, b, alpha) => a + alpha * b,
  sub: (a, b, alpha) => a - alpha * b,
  mul: (a, b) => a * b,
  fmod: (a, b) => a % b,
  fmax: (a, b) => (a !== a ? b : b !== b ? a : Math.max(a, b)),
  fmin: (a, b) => (a !== a ? b : b !== b ? a : Math.min(a, b)),
  logaddexp: logAddExp,
  copysign: (a, b) => (b < 0 || Object.is(b, -0) ? -Math.abs(a) : Math.abs(a)),
  heaviside: (x, atZero) => (x === 0 ? atZero : Number(x > 0)),
  xlogy: (a, b) => (b !== b ? NaN : a === 0 ? 0 : a * Math.log(b)),
  eq: (a, b) => a === b,
  ne: (a, b) => a !== b,
  lt: (a, b) => a < b,
  le: (a, b) => a <= b,
  gt: (a, b) => a > b,
  ge: (a, b) => a >= b,
  logical_and: (a, b) => a !== 0 && b !== 0,
  logical_or: (a, b) => a !== 0 || b !== 0,
  logical_xor: (a, b) => (a !== 0) !== (b !== 0),
  where: (condition, a, b) => (condition ? a : b),
  lerp: (a, b, weight) => (Math.abs(weight) < 0.5 ? a + weight * (b - a) : b - (b - a) * (1 - weight)),
  addcmul: (x, a, b, value) => x + value * a * b,
  addcdiv: (x, a, b, value) => x + (value * a) / b,
};

// --- Functions of the vectors along some axes: a vector to a number, or to another vector. ---

const sum = (v) => v.reduce((total, x) => total + x, 0);
const largest = (v) => v.reduce((a, b) => Math.max(a, b), -Infinity);
const norm = (v, order) => {
  const sizes = v.map(Math.abs);
  if (order === Infinity) return largest(sizes);
  if (order === -Infinity) return -largest(sizes.map((x) => -x));
  if (order === 0) return sizes.filter((x) => x !== 0).length;
  return order === 2 ? Math.sqrt(sum(v.map((x) => x * x))) : sum(sizes.map((x) => x ** order)) ** (1 / order);
};
const variance = (v, correction) => {
  const mean = sum(v) / v.length;
  return sum(v.map((x) => (x - mean) ** 2)) / Math.max(0, v.length - correction);
};
const logSumExp = (v) => {
  const shift = isInfinite(largest(v)) ? 0 : largest(v);
  return shift + Math.log(sum(v.map((x) => Math.exp(x - shift))));
};
const softmax = (v) => {
  const shift = largest(v);
  const exponentials = v.map((x) => Math.exp(x - shift));
  const total = sum(exponentials);
  return exponentials.map((x) => x / total);
};

/** Return the position of the first NaN, or else of the first of the largest numbers. */
function positionOfLargest(v) {
  const nan = v.findIndex((x) => x !== x);
  return nan >= 0 ? nan : v.indexOf(largest(v));
}

/** Return the positions of a vector's elements in ascending or descending order. NaN counts as the largest. */
function sortedPositions(v, descending) {
  const compare = (a, b) => (a !== a ? (b !== b ? 0 : 1) : b !== b ? -1 : a - b || 0);
  const positions = Array.from(v, (_, k) => k);
  return positions.sort((i, j) => (descending ? compare(v[j], v[i]) : compare(v[i], v[j])));
}

function positionOfMedian(v) {
  const positions = sortedPositions(v, false);
  const isNaN = v[positions.at(-1)] !== v[positions.at(-1)];
  return isNaN ? positionOfLargest(v) : positions[Math.floor((v.length - 1) / 2)];
}

function accumulate(v, combine) {
  let total;
  return v.map((x, k) => (total = k ? combine(total, x) : x));
}

export const REDUCTIONS = {
  sum, logsumexp: logSumExp, norm, var: variance, amax: largest, argmax: positionOfLargest, argmedian: positionOfMedian,
  mean: (v) => sum(v) / v.length,
  running_mean: (v) => v.reduce((mean, x, k) => mean + (x - mean) / (k + 1), 0), // as in torch.var_mean
  prod: (v) => v.reduce((total, x) => total * x, 1),
  amin: (v) => v.reduce((a, b) => Math.min(a, b), Infinity),
  argmin: (v) => positionOfLargest(v.map((x) => -x)),
  any: (v) => v.some((x) => x !== 0),
  all: (v) => v.every((x) => x !== 0),
  count_nonzero: (v) => v.filter((x) => x !== 0).length,
  std: (v, correction) => Math.sqrt(variance(v, correction)),
  median: (v) => v[positionOfMedian(v)],
};
export const VECTOR_FUNCTIONS = {
  softmax,
  softmin: (v) => softmax(v.map((x) => -x)),
  log_softmax: (v) => {
    const shift = largest(v);
    const logarithm = Math.log(sum(v.map((x) => Math.exp(x - shift))));
    return v.map((x) => x - shift - logarithm);
  },
  cumsum: (v) => accumulate(v, (a, b) => a + b),
  cumprod: (v) => accumulate(v, (a, b) => a * b),
  logcumsumexp: (v) => accumulate(v, logAddExp),
  sort: (v, descending) => sortedPositions(v, descending).map((k) => v[k]),
  argsort: sortedPositions,
  normalize: (v, order, eps) => {
    const size = Math.max(norm(v, order), eps);
    return v.map((x) => x / size);
  },
  layer_norm: (v, eps) => {
    const mean = sum(v) / v.length;
    const scale = Math.sqrt(variance(v, 0) + eps);
    return v.map((x) => (x - mean) / scale);
  },
  rms_norm: (v, eps) => {
    const scale = Math.sqrt(sum(v.map((x) => x * x)) / v.length + eps);
    return v.map((x) => x / scale);
  },
};
