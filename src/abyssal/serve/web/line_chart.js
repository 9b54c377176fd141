// A line chart over the last minutes, in SVG.  Lines differ by dashes as well as by colour.

import { drawn, element, say } from "./elements.js";
import { ticks } from "./numbers.js";

const HEIGHT = 168;
const MARGIN = { right: 10, top: 10, bottom: 22 };
const GLYPH = 6.8; // pixels of a label's character
const WINDOW = 300; // seconds
const LONGEST_GAP = 5; // seconds between samples that a line is drawn over
const SPOKEN_EVERY = 10; // seconds between changes of the text alternative

export class LineChart {
  #told = -Infinity;

  /**
   * @param lines `{key, label, tone, format}`: `key` names a column of the history, `tone` a class of the style sheet
   * @param options `high`: the axis reaches at least to it; `fixed`: and no further; `stacked`: lines lie on each
   *   other; `log`: the axis goes by tens
   */
  constructor(title, lines, { format, high = 1, fixed = false, stacked = false, log = false }) {
    Object.assign(this, { title, lines, format, high, fixed, stacked, log });
    this.grid = drawn("g", { class: "grid" });
    this.marks = drawn("g");
    this.cursor = drawn("line", { class: "cursor", visibility: "hidden" });
    this.svg = drawn("svg", { role: "img", height: HEIGHT }, this.grid, this.marks, this.cursor);
    this.tip = element("div", { class: "tip", hidden: true });
    this.values = new Map(lines.map((line) => [line.key, element("b", {})]));
    const legend = lines.map((line) => element("span", { class: "key" }, swatch(line, stacked), line.label, " ", this.values.get(line.key)));
    this.plot = element("div", { class: "plot" }, this.svg, this.tip);
    this.node = element("article", { class: "card" },
      element("div", { class: "card-head" }, element("h2", {}, title), element("p", { class: "legend" }, legend)), this.plot);
    this.plot.addEventListener("pointermove", (event) => this.#point(event));
    this.plot.addEventListener("pointerleave", () => this.#unpoint());
    new ResizeObserver(() => this.history && this.draw(this.history)).observe(this.plot);
  }

  /** Draws columns of numbers or nulls beside a column of times. */
  draw(history) {
    this.history = history;
    const width = this.plot.clientWidth;
    if (!width) return;
    this.now = history.time.at(-1) ?? 0;
    this.first = history.time.findIndex((time) => time >= this.now - WINDOW);
    this.#scale();
    const label = Math.max(...this.steps.map((step) => this.format(step).length));
    this.inner = { left: 10 + label * GLYPH, right: width - MARGIN.right, top: MARGIN.top, bottom: HEIGHT - MARGIN.bottom };
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.#drawGrid();
    this.#drawLines();
    for (const line of this.lines) {
      const value = history[line.key].at(-1);
      say(this.values.get(line.key), value === null || value === undefined ? "–" : this.format(value));
    }
    this.#speak();
  }

  #levels(index) {
    let sum = 0;
    return this.lines.map(({ key }) => {
      const value = this.history[key][index];
      if (value === null) return null;
      return this.stacked ? (sum += value) : value;
    });
  }

  #scale() {
    let low = Infinity, high = this.log ? 0 : this.high;
    for (let index = Math.max(0, this.first); index < this.history.time.length && !this.fixed; index++)
      for (const level of this.#levels(index))
        if (level !== null && (!this.log || level > 0)) [low, high] = [Math.min(low, level), Math.max(high, level)];
    this.steps = this.log ? tens(low, high) : ticks(high, 3);
    this.top = this.steps.at(-1);
  }

  #x = (time) => this.inner.right - ((this.now - time) / WINDOW) * (this.inner.right - this.inner.left);

  #y(value) {
    const [low, high] = [this.steps[0], this.top];
    const share = this.log ? Math.log(Math.max(value, low) / low) / Math.log(high / low) : Math.min(value, high) / high;
    return +(this.inner.bottom - share * (this.inner.bottom - this.inner.top)).toFixed(1);
  }

  #drawGrid() {
    const { left, right } = this.inner, parts = [];
    this.steps.forEach((step, index) => {
      const y = this.#y(step);
      parts.push(drawn("line", { x1: left, x2: right, y1: y, y2: y, class: index ? "" : "base" }));
      parts.push(drawn("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, this.format(step)));
    });
    for (const ago of right - left < 320 ? [4, 2] : [4, 3, 2, 1])
      parts.push(drawn("text", { x: this.#x(this.now - 60 * ago), y: HEIGHT - 5, "text-anchor": "middle" }, `−${ago} min`));
    parts.push(drawn("text", { x: right, y: HEIGHT - 5, "text-anchor": "end" }, "now"));
    this.grid.replaceChildren(...parts);
  }

  #drawLines() {
    const parts = [], filled = this.stacked || (this.lines.length === 1 && !this.log);
    this.lines.forEach(({ tone }, line) => {
      const runs = this.#runs(line), style = `${tone}${this.stacked ? " stacked" : ""}`;
      if (filled) parts.push(drawn("path", { class: `area ${style}`, d: runs.map(band).join("") }));
      parts.push(drawn("path", { class: `line ${style}`, d: runs.map((points) => path(points.map(([x, , y]) => [x, y]))).join("") }));
    });
    this.marks.replaceChildren(...parts);
  }

  // Points of a line, [x, y of what lies below it, y], cut where there is nothing to show.
  #runs(line) {
    const runs = [];
    let run = null, before = null;
    for (let index = Math.max(0, this.first); index < this.history.time.length; index++) {
      const time = this.history.time[index], levels = this.#levels(index);
      if (before !== null && time - before > LONGEST_GAP) run = null;
      before = time;
      if (levels[line] === null) run = null;
      else {
        if (!run) runs.push((run = []));
        run.push([+this.#x(time).toFixed(1), this.stacked && line ? this.#y(levels[line - 1] ?? 0) : this.inner.bottom, this.#y(levels[line])]);
      }
    }
    return runs;
  }

  #point(event) {
    if (!this.history?.time.length) return;
    const bounds = this.plot.getBoundingClientRect(), at = event.clientX - bounds.left;
    const time = this.now - ((this.inner.right - at) / (this.inner.right - this.inner.left)) * WINDOW;
    let index = this.history.time.length - 1;
    while (index > 0 && this.history.time[index - 1] >= time) index--;
    const x = this.#x(this.history.time[index]);
    if (x < this.inner.left - 1) return this.#unpoint();
    for (const [name, value] of Object.entries({ x1: x, x2: x, y1: this.inner.top, y2: this.inner.bottom, visibility: "visible" }))
      this.cursor.setAttribute(name, value);
    const ago = Math.round(this.now - this.history.time[index]);
    this.tip.replaceChildren(element("div", { class: "soft" }, ago ? `${Math.floor(ago / 60)}:${String(ago % 60).padStart(2, "0")} ago` : "now"),
      ...this.lines.map((line) => {
        const value = this.history[line.key][index];
        return element("div", {}, swatch(line, this.stacked), line.label, " ", element("b", {}, value === null ? "–" : this.format(value)));
      }));
    this.tip.hidden = false;
    const left = x > bounds.width / 2;
    this.tip.style.left = left ? "auto" : `${x + 12}px`;
    this.tip.style.right = left ? `${bounds.width - x + 12}px` : "auto";
  }

  #unpoint() {
    this.tip.hidden = true;
    this.cursor.setAttribute("visibility", "hidden");
  }

  #speak() {
    if (this.now - this.#told < SPOKEN_EVERY) return;
    this.#told = this.now;
    const told = this.lines.map((line) => {
      const values = this.history[line.key].slice(Math.max(0, this.first)).filter((value) => value !== null);
      if (!values.length) return `${line.label}: nothing yet`;
      const [low, high] = [Math.min(...values), Math.max(...values)].map(this.format);
      return `${line.label}: now ${this.format(values.at(-1))}, between ${low} and ${high}`;
    });
    this.svg.setAttribute("aria-label", `${this.title}, last 5 minutes. ${told.join("; ")}.`);
  }
}

const path = (points) => points.map(([x, y], index) => `${index ? "L" : "M"}${x} ${y}`).join("") + (points.length === 1 ? "h.1" : "");

// Between a line and what lies below it.
const band = (points) => `${path([...points.map(([x, , y]) => [x, y]), ...points.map(([x, below]) => [x, below]).reverse()])}Z`;

// Powers of ten around the values.
function tens(low, high) {
  if (!(high > 0)) return [0.001, 0.01, 0.1, 1];
  const first = Math.floor(Math.log10(low) + 1e-9), last = Math.max(first + 1, Math.ceil(Math.log10(high) - 1e-9));
  return Array.from({ length: last - first + 1 }, (_, index) => 10 ** (first + index));
}

function swatch(line, filled) {
  const mark = filled
    ? drawn("rect", { x: 1, y: 1, width: 12, height: 8, rx: 2, class: `block ${line.tone}` })
    : drawn("path", { d: "M0 5h18", class: `line ${line.tone}` });
  return drawn("svg", { class: "swatch", width: filled ? 14 : 18, height: 10, "aria-hidden": "true" }, mark);
}
