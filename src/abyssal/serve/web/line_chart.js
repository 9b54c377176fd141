// A line chart over the last minutes, in SVG.  Lines differ by dashes as well as by colour.

import { drawn, element, say } from "./elements.js";
import { ticks } from "./numbers.js";

const HEIGHT = 168;
const MARGIN = { left: 44, right: 10, top: 10, bottom: 22 };
const WINDOW = 300; // seconds
const SPOKEN_EVERY = 10; // seconds between changes of the text alternative

export class LineChart {
  #told = -Infinity;

  /**
   * @param lines `{key, label, tone, format}`: `key` names a column of the history, `tone` a class of the style sheet
   * @param options `high`: the axis reaches at least to it; `fixed`: and no further; `stacked`: lines lie on each other
   */
  constructor(title, lines, { format, high = 1, fixed = false, stacked = false, note = "" }) {
    Object.assign(this, { title, lines, format, high, fixed, stacked });
    this.grid = drawn("g", { class: "grid" });
    this.marks = drawn("g");
    this.cursor = drawn("line", { class: "cursor", visibility: "hidden" });
    this.svg = drawn("svg", { role: "img", height: HEIGHT }, this.grid, this.marks, this.cursor);
    this.tip = element("div", { class: "tip", hidden: true });
    this.values = new Map(lines.map((line) => [line.key, element("b", {})]));
    const legend = lines.map((line) => element("span", { class: "key" }, swatch(line, stacked), line.label, " ", this.values.get(line.key)));
    this.plot = element("div", { class: "plot" }, this.svg, this.tip);
    this.node = element("article", { class: "card" },
      element("div", { class: "card-head" }, element("h2", {}, title), element("p", { class: "legend" }, legend)), this.plot,
      note ? element("p", { class: "soft small" }, note) : null);
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
    this.inner = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: HEIGHT - MARGIN.bottom };
    this.#scale();
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
    let high = this.high;
    if (!this.fixed)
      for (let index = Math.max(0, this.first); index < this.history.time.length; index++)
        high = Math.max(high, ...this.#levels(index).map((value) => value ?? 0));
    this.steps = ticks(high, 3);
    this.top = this.steps.at(-1);
  }

  #x = (time) => this.inner.right - ((this.now - time) / WINDOW) * (this.inner.right - this.inner.left);
  #y = (value) => this.inner.bottom - (Math.min(value, this.top) / this.top) * (this.inner.bottom - this.inner.top);

  #drawGrid() {
    const { left, right, bottom } = this.inner, parts = [];
    for (const step of this.steps) {
      const y = this.#y(step).toFixed(1);
      parts.push(drawn("line", { x1: left, x2: right, y1: y, y2: y, class: step ? "" : "base" }));
      parts.push(drawn("text", { x: left - 8, y: +y + 4, "text-anchor": "end" }, this.format(step)));
    }
    const minutes = right - left < 280 ? [5, 3, 1] : [5, 4, 3, 2, 1];
    for (const ago of minutes)
      parts.push(drawn("text", { x: this.#x(this.now - 60 * ago), y: HEIGHT - 5, "text-anchor": "middle" }, `−${ago} min`));
    parts.push(drawn("text", { x: right, y: HEIGHT - 5, "text-anchor": "end" }, "now"));
    this.grid.replaceChildren(...parts);
  }

  #drawLines() {
    const paths = this.lines.map(() => ""), areas = this.lines.map(() => "");
    const pens = this.lines.map(() => "M");
    const starts = this.lines.map(() => null);
    const close = (line, x) => {
      if (starts[line] !== null) areas[line] += `L${x} ${this.inner.bottom}L${starts[line]} ${this.inner.bottom}Z`;
      starts[line] = null;
      pens[line] = "M";
    };
    let x = 0, before = null;
    for (let index = Math.max(0, this.first); index < this.history.time.length; index++) {
      const time = this.history.time[index], gap = before !== null && time - before > 5;
      const last = x;
      x = +this.#x(time).toFixed(1);
      before = time;
      this.#levels(index).forEach((value, line) => {
        if (value === null || gap) close(line, last);
        if (value === null) return;
        starts[line] ??= x;
        const step = `${pens[line]}${x} ${this.#y(value).toFixed(1)}`;
        paths[line] += step;
        areas[line] += step;
        pens[line] = "L";
      });
    }
    this.lines.forEach((_, line) => close(line, x));
    const parts = [];
    // From the top of the stack down, so that each area shows what it adds.
    for (let line = this.lines.length - 1; line >= 0; line--) {
      const tone = this.lines[line].tone;
      if (this.stacked || this.lines.length === 1) parts.push(drawn("path", { class: `area ${tone}${this.stacked ? " stacked" : ""}`, d: areas[line] }));
      parts.push(drawn("path", { class: `line ${tone}`, d: paths[line] }));
    }
    this.marks.replaceChildren(...parts);
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

function swatch(line, filled) {
  const mark = filled
    ? drawn("rect", { x: 1, y: 1, width: 12, height: 8, rx: 2, class: `block ${line.tone}` })
    : drawn("path", { d: "M0 5h18", class: `line ${line.tone}` });
  return drawn("svg", { class: "swatch", width: filled ? 14 : 18, height: 10, "aria-hidden": "true" }, mark);
}
