// A written normalization: the sum, the mean and standard deviation of all sums, and the parameters.

import { decimalsOf, fixed, printedDecimals, restValue, round, rowValue, splitRows } from "./digits.js";
import { shortNumber } from "./gates.js";
import { createSpan, Ledger } from "./ledger.js";

const LEAST = 4; // decimals
const MOST = 12;

/** The lines of a normalization. What is derived has it as `normalization`, and the rows of the sum that is normalized. */
export class NormalizationLedger extends Ledger {
  /** The numbers of the lines: the sum, the mean, the deviation, and the sum without them. */
  get numbers() {
    if (this.found) return this.found;
    const { rowsOf, size, index, eps, isCentered } = this.derived.normalization;
    const sums = Array.from({ length: size }, (_, k) => rowsOf(k).reduce((sum, row) => sum + row.sign * rowValue(row, this.valueOf), 0));
    const mean = isCentered ? sums.reduce((a, b) => a + b, 0) / size : 0;
    const deviation = Math.sqrt(sums.reduce((all, one) => all + (one - mean) ** 2, 0) / size + eps);
    this.found = { sum: sums[index], mean, deviation, normalized: (sums[index] - mean) / deviation };
    return this.found;
  }

  get omission() {
    const { size, eps, isCentered } = this.derived.normalization;
    const what = this.derived.rows.length > 1 ? "sums" : "numbers";
    return `. ${isCentered ? "The mean and the standard deviation are those" : "The root mean square is that"} of all ${size} ${what}, with ε = ${shortNumber(eps)}`;
  }

  /** The fewest decimals with which every line but those of the mean and the deviation is right. */
  chooseDecimals() {
    for (let factor = LEAST; factor <= MOST; factor += 1) {
      for (let product = LEAST; product <= factor; product += 1) {
        for (let part = LEAST; part <= product; part += 1) {
          for (let sum = LEAST; sum <= part; sum += 1) {
            const decimals = { factor, product, part, sum };
            if (this.isRightWith(decimals)) return decimals;
          }
        }
      }
    }
    return null;
  }

  /** Whether the lines are right. The normalized sum, and its product with the gain, have the decimals of `sum`. */
  isRightWith({ factor, product, part, sum: last }) {
    const { rows, normalization: { gain, bias } } = this.derived;
    const { sum, mean, deviation, normalized } = this.numbers;
    const same = (a, b, decimals) => round(a, decimals) === round(b, decimals);
    const printed = (one) => round(this.valueOf(one), printedDecimals(this.valueOf(one), factor));
    const valueOfRow = (row) => round(rowValue(row, this.valueOf), product);
    const [kept, rest] = splitRows(rows, this.valueOf);
    const areProductsRight = kept.every((row) => row.factors.length < 2 || same(rowValue(row, printed), rowValue(row, this.valueOf), product));
    const added = kept.reduce((all, row) => all + row.sign * (row.factors.length < 2 ? printed(row.factors[0]) : valueOfRow(row)), round(restValue(rest, this.valueOf), product));
    const isSumRight = rows.length < 2 || same(added, sum, part);
    const own = rows.length < 2 ? rows[0].sign * printed(rows[0].factors[0]) : round(sum, part);
    const end = decimalsOf(this.value);
    if (!areProductsRight || !isSumRight) return false;
    const quotient = (own - round(mean, part)) / round(deviation, part);
    if (!gain && !bias) return same(quotient, this.value, end);
    if (!same(quotient, normalized, last)) return false;
    if (!gain) return same(round(normalized, last) + printed(bias), this.value, end);
    const scaled = printed(gain) * round(normalized, last);
    if (!bias) return same(scaled, this.value, end);
    return same(scaled, gain.constant * normalized, last) && same(round(gain.constant * normalized, last) + printed(bias), this.value, end);
  }

  addAll() {
    const { rows, normalization: { gain, bias, isCentered } } = this.derived;
    const { sum, mean, deviation, normalized } = this.numbers;
    const { part, sum: last } = this.decimals;
    const text = (value, decimals = part) => fixed(value, decimals);
    this.addSum(rows, true);
    if (rows.length > 1) {
      this.addRule("part");
      this.addLine("", ["sum"], [], text(sum), "sub");
    }
    this.addRule();
    if (isCentered) this.addLine("", ["mean"], [], text(mean), "sub");
    this.addLine("", [isCentered ? "standard deviation" : "root mean square"], [], text(deviation), "sub");
    const own = rows.length > 1 ? text(sum) : this.print(rows[0].factors[0]);
    const above = isCentered ? `(${own} − ${mean < 0 ? `(${text(mean)})` : text(mean)})` : own;
    const isLast = !gain && !bias;
    this.addLine("", [`${above} / ${text(deviation)}`], [], isLast ? this.result() : text(normalized, last), isLast ? "total" : "sub");
    if (isLast) return;
    if (gain) this.addLine("", [this.name(gain)], [this.factor(gain), createSpan("", text(normalized, last))], bias ? text(gain.constant * normalized, last) : this.result(), bias ? "" : "total");
    if (!bias) return;
    this.addLine("+", [this.name(bias)], [], this.factor(bias));
    this.addRule();
    this.addLine("", [this.name(this.number)], [], this.result(), "total");
  }
}
