// Values: decoding, formatting as in unrolled.tracing.explain, and colors.

/** Decode base64. */
export function decodeBytes(data) {
  const text = atob(data);
  const bytes = new Uint8Array(text.length);
  for (let k = 0; k < bytes.length; k += 1) bytes[k] = text.charCodeAt(k);
  return bytes;
}

/** Decode {float64, data}: base64 of little-endian floats. */
export function decodeValues({ float64, data }) {
  const bytes = decodeBytes(data);
  return float64 ? new Float64Array(bytes.buffer) : new Float32Array(bytes.buffer);
}

/** Format a number with four decimal places, or in scientific notation if it is very small or large. */
export function formatNumber(value) {
  if (Number.isNaN(value)) return "nan";
  if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
  const size = Math.abs(value);
  const sign = value < 0 || Object.is(value, -0) ? "-" : "";
  return sign + (size === 0 || (size >= 5e-5 && size < 1e5) ? formatFixed(size) : formatScientific(size));
}

export const MINUS = "\u2212";

/** Replace the hyphens that are minus signs of formatted numbers. */
export const withMinus = (text) => text.replace(/(?<!e)-/g, MINUS);

/** Format a number in a line of arithmetic: without zeros at the end if it has no more digits. */
export function formatOperand(value) {
  const text = formatNumber(value);
  const short = text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text;
  const isExact = Math.abs(Number(short) - value) <= 1e-7 * Math.abs(value); // up to the rounding of float32
  return withMinus(isExact && short !== "-0" ? short : isExact ? "0" : text);
}

// Python rounds halves to even, JavaScript rounds them up.
function formatFixed(size) {
  const isHalf = Number.isInteger(size * 32) && size.toFixed(5).endsWith("5");
  return isHalf && "13579".includes(size.toFixed(5).at(-2)) === false
    ? size.toFixed(5).slice(0, -1)
    : size.toFixed(4);
}

function formatScientific(size) {
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
export const NAN_COLOR = [240, 228, 66];
const INFINITY_COLOR = [204, 121, 167];

const parseHex = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
const COLORMAPS = { light: LIGHT.map(parseHex), dark: DARK.map(parseHex) };

/** Return the color of a value on a scale from -limit to limit, as [red, green, blue]. */
export function valueColor(value, limit, theme) {
  if (Number.isNaN(value)) return NAN_COLOR;
  if (!Number.isFinite(value)) return INFINITY_COLOR;
  const stops = COLORMAPS[theme];
  const position = ((Math.max(-1, Math.min(1, limit > 0 ? value / limit : 0)) + 1) / 2) * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(position));
  return stops[low].map((part, channel) => Math.round(part + (position - low) * (stops[low + 1][channel] - part)));
}

const GATE_COLORS = { light: ["#ffffff", "#0b7a63"].map(parseHex), dark: ["#1d2228", "#4fd3b2"].map(parseHex) };

/** Return the color of a gate, from 0 to 1. */
export function gateColor(value, theme) {
  if (!Number.isFinite(value)) return valueColor(value, 1, theme);
  const [low, high] = GATE_COLORS[theme];
  return low.map((part, channel) => Math.round(part + Math.max(0, Math.min(1, value)) * (high[channel] - part)));
}

/** Return black or white, whichever is easier to read on a color. */
export function textColor([red, green, blue]) {
  const linear = [red, green, blue].map((part) => (part / 255) ** 2.2);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18 ? "#000" : "#fff";
}

/** Return the largest finite magnitude in several arrays. */
export function largestMagnitude(arrays) {
  let largest = 0;
  for (const values of arrays) {
    for (const value of values) {
      const size = Math.abs(value);
      if (size > largest && size !== Infinity) largest = size;
    }
  }
  return largest;
}

/** Join the outputs of the directions of a layer. */
export function joinArrays(arrays) {
  return arrays.length === 1 ? arrays[0] : Float64Array.from(arrays.flatMap((array) => [...array]));
}
