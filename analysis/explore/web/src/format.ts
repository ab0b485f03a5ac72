// Numbers as people read them.

/** 0.0312, 12.4, 1,234: three digits that count, no exponent where it can be avoided; a dash where it is not known. */
export function show(value: number | null | undefined, digits = 3): string {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size < 1e-4) return value.toExponential(digits - 1);
  return String(Number(value.toPrecision(digits)));
}

/** A share as a percentage. */
export function percent(value: number | null | undefined): string {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  return `${show(100 * value)} %`;
}

/** A probability as a percentage, to a hundredth of a percent. */
export function probability(value: number | null | undefined): string {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  return value > 0 && value < 5e-5 ? "< 0.01 %" : `${(100 * value).toFixed(2)} %`;
}

export const count = (n: number, one: string, several = `${one}s`) => `${n.toLocaleString("en-US")} ${n === 1 ? one : several}`;
