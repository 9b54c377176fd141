// Loads of experts, a row a layer: what share of the tokens each got, over the even share, on a scale of doublings.

import { byId, element, say } from "./elements.js";

const LIMIT = 2; // doublings either way: from a quarter of the even share to four times
const GUTTER = 34, TOP = 18; // pixels for numbers of layers and experts
const ROW = { least: 9, most: 22, total: 460 };
const FRAME = 4; // pixels of padding around it, for the focus
const NARROWEST = 3; // pixels of a cell; where that does not fit, the map scrolls

export const times = (load) => `${load < 10 ? load.toFixed(load < 1 ? 2 : 1) : Math.round(load)} ×`;

export class HeatMap {
  #canvas = byId("heat");
  #cell = null;
  #colors = null;

  constructor() {
    this.#canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.#canvas.addEventListener("pointerleave", () => document.activeElement !== this.#canvas && this.#choose(null));
    this.#canvas.addEventListener("keydown", (event) => this.#move(event));
    this.#canvas.addEventListener("blur", () => this.#choose(null));
    new ResizeObserver(() => this.draw()).observe(this.#canvas.parentElement);
  }

  /** `layers`: numbers; `loads`: of each layer, a list of loads over the even share. */
  show({ layers, loads }) {
    byId("experts").hidden = !loads.length;
    Object.assign(this, { layers, loads });
    if (!loads.length) return;
    this.draw();
    this.#tell();
  }

  recolor() {
    this.#colors = null;
    this.draw();
  }

  draw() {
    const frame = this.#canvas.parentElement.clientWidth - 2 * FRAME;
    if (!this.loads?.length || frame <= 0) return;
    this.#colors ??= readColors();
    const columns = Math.max(...this.loads.map((row) => row.length));
    const width = Math.max(frame, GUTTER + columns * NARROWEST);
    const row = Math.max(ROW.least, Math.min(ROW.most, Math.floor(ROW.total / this.loads.length)));
    this.size = { column: (width - GUTTER) / columns, row, columns };
    const pen = prepare(this.#canvas, width, TOP + row * this.loads.length);
    this.#drawCells(pen);
    this.#drawNumbers(pen);
    this.#drawScale();
  }

  #drawCells(pen) {
    const { column, row } = this.size;
    const seam = column > 6 && row > 6 ? 1 : 0;
    this.loads.forEach((loads, layer) =>
      loads.forEach((load, expert) => {
        pen.fillStyle = this.#color(load);
        const x = GUTTER + expert * column;
        // Without a seam, cells overlap by half a pixel: no light shows between them.
        pen.fillRect(x, TOP + layer * row, column - seam + (seam ? 0 : 0.5), row - seam);
      }));
    if (!this.#cell) return;
    const [layer, expert] = this.#cell;
    pen.strokeStyle = this.#colors.mark;
    pen.lineWidth = 2;
    pen.strokeRect(GUTTER + expert * column - 1, TOP + layer * row - 1, column + 1, row + 1);
  }

  #drawNumbers(pen) {
    const { column, row, columns } = this.size;
    pen.fillStyle = this.#colors.text;
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "right";
    const every = Math.ceil(13 / row);
    this.layers.forEach((layer, index) => {
      if (index % every === 0) pen.fillText(String(layer), GUTTER - 8, TOP + index * row + row / 2 + 4);
    });
    pen.textAlign = "center";
    const step = [1, 2, 4, 8, 16, 32, 64, 128].find((count) => count * column >= 26) ?? 256;
    for (let expert = 0; expert < columns; expert += step)
      pen.fillText(String(expert), Math.max(GUTTER + 4, GUTTER + (expert + 0.5) * column), TOP - 6);
  }

  #drawScale() {
    const canvas = byId("heat-scale"), pen = prepare(canvas, 140, 10);
    for (let x = 0; x < 140; x++) {
      pen.fillStyle = this.#color(2 ** ((x / 139) * 2 * LIMIT - LIMIT));
      pen.fillRect(x, 0, 1.5, 10);
    }
  }

  #color(load) {
    const place = load > 0 ? Math.max(-1, Math.min(1, Math.log2(load) / LIMIT)) : -1;
    const [from, to] = [this.#colors.even, place < 0 ? this.#colors.low : this.#colors.high];
    const mixed = from.map((value, index) => Math.round(value + (to[index] - value) * Math.abs(place)));
    return `rgb(${mixed.join(" ")})`;
  }

  #point(event) {
    const bounds = this.#canvas.getBoundingClientRect();
    const expert = Math.floor((event.clientX - bounds.left - GUTTER) / this.size.column);
    const layer = Math.floor((event.clientY - bounds.top - TOP) / this.size.row);
    this.#choose(this.loads[layer]?.[expert] === undefined ? null : [layer, expert]);
  }

  #move(event) {
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity] }[event.key];
    if (!by || !this.loads?.length) return;
    event.preventDefault();
    const within = (value, length) => Math.max(0, Math.min(length - 1, value));
    const [layer, expert] = this.#cell ?? [0, by[1] < 0 ? 1 : -1];
    const row = within(layer + by[0], this.loads.length);
    this.#choose([row, within(expert + by[1], this.loads[row].length)]);
    this.#reveal();
  }

  #reveal() {
    const frame = this.#canvas.parentElement, x = GUTTER + this.#cell[1] * this.size.column;
    if (x - GUTTER < frame.scrollLeft) frame.scrollLeft = x - GUTTER;
    else if (x + 20 > frame.scrollLeft + frame.clientWidth) frame.scrollLeft = x + 20 - frame.clientWidth;
  }

  #choose(cell) {
    if (String(cell) === String(this.#cell)) return;
    this.#cell = cell;
    this.draw();
    this.#read();
  }

  #read() {
    const told = this.#cell
      ? `Layer ${this.layers[this.#cell[0]]}, expert ${this.#cell[1]}: ${times(this.loads[this.#cell[0]][this.#cell[1]])} its even share`
      : "Point at a cell, or move with the arrow keys.";
    say(byId("heat-read"), told);
  }

  #tell() {
    const rows = this.loads.map((loads, index) => {
      const order = loads.map((_, expert) => expert).sort((a, b) => loads[b] - loads[a]);
      const [busiest, idlest] = [order[0], order.at(-1)];
      return { layer: this.layers[index], busiest, most: loads[busiest], idlest, least: loads[idlest], low: loads.filter((load) => load < 0.5).length };
    });
    const worst = rows.reduce((a, b) => (b.most > a.most ? b : a));
    const summary = `${rows.length} ${rows.length === 1 ? "layer" : "layers"} of ${this.size?.columns ?? this.loads[0].length} experts. Busiest: expert ${worst.busiest} of layer ${worst.layer}, ${times(worst.most)} its even share.`;
    say(byId("experts-summary"), summary);
    this.#canvas.setAttribute("aria-label", `Expert load by layer and expert. ${summary} The table below says it by layer.`);
    byId("experts-rows").replaceChildren(...rows.map((row) => element("tr", {}, element("th", { scope: "row" }, row.layer),
      ...[row.busiest, times(row.most), row.idlest, times(row.least), row.low].map((value) => element("td", {}, value)))));
    if (this.#cell) this.#read();
  }
}

// Sized for the screen's pixels; returns its pen.
function prepare(canvas, width, height) {
  const density = devicePixelRatio || 1;
  canvas.width = Math.round(width * density);
  canvas.height = Math.round(height * density);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(density, density);
  return pen;
}

// What the style sheet's names come to in this theme: a probe's computed colour is always rgb().
function readColors() {
  const probe = element("i", { hidden: true });
  document.body.append(probe);
  const read = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };
  const numbers = (name) => read(name).match(/[\d.]+/g).slice(0, 3).map(Number);
  const colors = { low: numbers("--heat-low"), even: numbers("--heat-even"), high: numbers("--heat-high"), text: read("--soft"), mark: read("--text") };
  probe.remove();
  return colors;
}
