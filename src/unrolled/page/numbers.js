// Numbers as text, as unrolled.explain writes them, and as colours.

/** The numbers of {wide, data}: base64 of little-endian floats. */
export function decode({ wide, data }) {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  return wide ? new Float64Array(bytes.buffer) : new Float32Array(bytes.buffer);
}

/** To four decimal places; in scientific form where that would hide it. */
export function number(value) {
  if (Number.isNaN(value)) return "nan";
  if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
  const size = Math.abs(value);
  const sign = value < 0 || Object.is(value, -0) ? "-" : "";
  return sign + (size === 0 || (size >= 5e-5 && size < 1e5) ? fixed(size) : scientific(size));
}

// Halfway between two texts Python takes the even one and JavaScript the larger one.
function fixed(size) {
  const halfway = Number.isInteger(size * 32) && size.toFixed(5).endsWith("5");
  return halfway && "13579".includes(size.toFixed(5).at(-2)) === false
    ? size.toFixed(5).slice(0, -1)
    : size.toFixed(4);
}

function scientific(size) {
  let text = size.toExponential(3);
  if (size >= 1e5 && Number.isInteger(size)) {
    const digits = BigInt(size).toString();
    if (/^50*$/.test(digits.slice(4)) && "02468".includes(digits[3])) {
      text = `${digits[0]}.${digits.slice(1, 4)}e+${digits.length - 1}`;
    }
  }
  return text.replace(/e([+-])(\d)$/, "e$10$2");
}

const LIGHT = ["#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b"];
const DARK = ["#8cc6ff", "#3d7fc1", "#233f5c", "#1d2127", "#5a2a2e", "#bd4a4d", "#ffa59b"];
const NAN = [240, 228, 66];
const INFINITE = [204, 121, 167];

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const SCALES = { light: LIGHT.map(rgb), dark: DARK.map(rgb) };

/** The colour of a number on a scale that goes from -most to most, as [red, green, blue]. */
export function colour(value, most, theme) {
  if (Number.isNaN(value)) return NAN;
  if (!Number.isFinite(value)) return INFINITE;
  const stops = SCALES[theme];
  const at = ((Math.max(-1, Math.min(1, most > 0 ? value / most : 0)) + 1) / 2) * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(at));
  return stops[low].map((part, k) => Math.round(part + (at - low) * (stops[low + 1][k] - part)));
}

/** Black or white, whichever is easier to read on a colour. */
export function ink([red, green, blue]) {
  const linear = [red, green, blue].map((part) => (part / 255) ** 2.2);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18 ? "#000" : "#fff";
}

/** The largest of the finite numbers, without their signs. */
export function largest(arrays) {
  let most = 0;
  for (const values of arrays) {
    for (const value of values) {
      const size = Math.abs(value);
      if (size > most && size !== Infinity) most = size;
    }
  }
  return most;
}
