// Numbers as people read them.

/** Three digits and a letter: 1234567 is 1.23M. */
export function short(value) {
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit * 0.9995) return +(value / unit).toPrecision(3) + letter;
  return String(size < 10 ? +value.toFixed(size < 1 ? 2 : 1) : Math.round(value));
}

export const whole = (value) => Math.round(value).toLocaleString("en");

export function percent(share) {
  const value = 100 * share;
  return `${value > 0 && value < 9.95 ? value.toFixed(1) : Math.round(value)}\u00a0%`; // the sign stays with its number
}

export function bytes(count) {
  let index = 0, value = count;
  while (value >= 1024 && index < 4) (value /= 1024), index++;
  return `${value < 10 && index ? value.toFixed(1) : Math.round(value)} ${["B", "KiB", "MiB", "GiB", "TiB"][index]}`;
}

/** A latency. */
export function seconds(value) {
  if (value < 0.0995) return `${+(1000 * value).toPrecision(2)} ms`;
  if (value < 0.9995) return `${Math.round(1000 * value)} ms`;
  return value < 10 ? `${+value.toFixed(2)} s` : `${Math.round(value)} s`;
}

/** How long something has been: 2 h 13 min. */
export function duration(value) {
  const minutes = Math.floor(value / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min` : `${Math.floor(value)} s`;
}

/** An amount of money, given in billionths: at least two decimals, and as many as show two digits that count. */
export function money(nano, currency) {
  const amount = nano / 1e9;
  const decimals = amount > 0 && amount < 0.1 ? Math.min(9, 1 - Math.floor(Math.log10(amount))) : 2;
  return `${amount.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: decimals })} ${currency}`;
}

/** Round steps from 0 to at least `high`, about `count` of them. */
export function ticks(high, count) {
  if (!(high > 0)) return [0, 1];
  const rough = high / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let index = 0; ; index++) {
    found.push(+(index * step).toPrecision(12));
    if (index * step >= high * 0.999) return found;
  }
}
