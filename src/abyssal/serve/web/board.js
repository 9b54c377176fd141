// The live board: reads /board/events, a snapshot with history first and then a sample a second.

import { ApiError, call } from "./api.js";
import { byId, element, say } from "./elements.js";
import { HeatMap } from "./heat_map.js";
import { LineChart } from "./line_chart.js";
import { bytes, duration, money, percent, seconds, short, whole } from "./numbers.js";
import { events } from "./sse.js";

const KEPT = 600; // samples
const RETRIES = [1, 2, 5, 10]; // seconds
const STATES = { starting: "Starting", ready: "Ready", restarting: "The engine is being restarted", failed: "The engine has failed" };

export class Board {
  #abort = null;
  #failures = 0;
  #timer = null;
  #paused = false;
  #shown = false;
  #heat = new HeatMap();
  #tiles = new Tiles(byId("tiles"));
  #drafts = new Drafts();

  constructor(askForKey) {
    this.askForKey = askForKey;
    const rate = (value) => short(value);
    this.charts = [
      new LineChart("Tokens a second", [
        { key: "output_rate", label: "output", tone: "tone-1" },
        { key: "prompt_rate", label: "prompts", tone: "tone-2" }], { format: rate }),
      new LineChart("Requests", [
        { key: "running", label: "running", tone: "tone-1" },
        { key: "waiting", label: "in the queue", tone: "tone-2" }], { format: rate, high: 4 }),
      new LineChart("Pages in use", [{ key: "pages", label: "of all pages", tone: "tone-1" }], { format: percent, high: 1, fixed: true }),
      new LineChart("Prompt tokens", [
        { key: "memory_rate", label: "memory", tone: "tone-1" },
        { key: "disk_rate", label: "disk", tone: "tone-3" },
        { key: "computed_rate", label: "computed", tone: "tone-2" }], { format: rate, stacked: true }),
      new LineChart("Waiting for a token", [
        { key: "first_token", label: "first", tone: "tone-2" },
        { key: "between_tokens", label: "between", tone: "tone-1" }], { format: seconds, log: true }),
    ];
    byId("charts").append(...this.charts.map((chart) => chart.node), this.#drafts.node);
    byId("pause-button").addEventListener("click", () => this.#pause(!this.#paused));
    document.addEventListener("visibilitychange", () => this.restart());
  }

  show() {
    this.#shown = true;
    this.restart();
  }

  hide() {
    this.#shown = false;
    this.restart();
  }

  recolor() {
    this.#heat.recolor();
  }

  /** Connects anew where the board can be seen, else not at all: nobody is asked for what nobody looks at. */
  restart() {
    this.#abort?.abort();
    this.#abort = null;
    clearTimeout(this.#timer);
    if (this.#shown && !this.#paused && !document.hidden) this.#connect();
  }

  #pause(paused) {
    this.#paused = paused;
    const button = byId("pause-button");
    button.setAttribute("aria-pressed", String(paused));
    say(button, paused ? "Go on" : "Pause");
    if (paused) say(byId("board-state"), "Paused");
    this.restart();
  }

  async #connect() {
    const clock = new AbortController();
    this.#abort = clock;
    try {
      const response = await call("/board/events", { signal: clock.signal });
      for await (const { name, data } of events(response)) {
        if (clock.signal.aborted) return;
        this.#failures = 0;
        this.#complain("");
        if (name === "snapshot") this.#snapshot(JSON.parse(data));
        else if (name === "sample") this.#sample(JSON.parse(data));
      }
      throw new ApiError(0, "The server closed the connection.");
    } catch (error) {
      if (clock.signal.aborted) return;
      this.#lost(error);
    }
  }

  #lost(error) {
    if (error.status === 401 || error.status === 403) {
      say(byId("board-state"), "Closed");
      this.#complain(error.message);
      if (error.status === 401) this.askForKey();
      return;
    }
    const wait = RETRIES[Math.min(this.#failures++, RETRIES.length - 1)];
    say(byId("board-state"), "Not connected");
    this.#complain(`${error.message} Trying again.`);
    this.#timer = setTimeout(() => this.restart(), 1000 * wait);
  }

  #complain(message) {
    const alert = byId("board-error");
    say(alert, message);
    alert.hidden = !message;
  }

  #snapshot(board) {
    this.history = board.history;
    this.#draw(board);
  }

  #sample(board) {
    if (!this.history) return;
    for (const [name, column] of Object.entries(this.history)) {
      column.push(board.now[name] ?? null);
      if (column.length > KEPT) column.shift();
    }
    this.#draw(board);
  }

  #draw(board) {
    say(byId("board-state"), stateOf(board));
    this.#tiles.show(board);
    for (const chart of this.charts) chart.draw(this.history);
    this.#drafts.show(board.drafts);
    if (board.experts) this.#heat.show(board.experts);
  }
}

function stateOf({ state, uptime, restarts, model }) {
  const parts = [STATES[state] ?? state, model, `up ${duration(uptime)}`];
  if (restarts) parts.push(`${restarts} engine ${restarts === 1 ? "restart" : "restarts"}`);
  return parts.filter(Boolean).join(" · ");
}

/** The large numbers. */
class Tiles {
  #fields = new Map();

  constructor(list) {
    for (const [name, label] of [["output", "Output"], ["running", "Running"], ["queue", "Queue"], ["pages", "Pages in use"], ["hits", "Cache hits"], ["saved", "Saved by the cache"]]) {
      const value = element("dd", { class: "value", id: `tile-${name}` }, "–"), notes = [1, 2].map(() => element("dd", { class: "soft small" }));
      this.#fields.set(name, { value, notes });
      list.append(element("div", { class: "tile" }, element("dt", {}, label), value, notes));
    }
  }

  #set(name, value, unit, ...notes) {
    const field = this.#fields.get(name);
    if (field.shown !== value + unit) field.value.replaceChildren(value, " ", element("small", {}, unit));
    field.shown = value + unit;
    field.notes.forEach((node, index) => say(node, notes[index] ?? ""));
  }

  show({ now, totals, saved }) {
    this.#set("output", short(now.output_rate ?? 0), "tokens/s", `${short(totals.output_tokens)} since the start`);
    this.#set("running", whole(now.running), now.running === 1 ? "request" : "requests", `${whole(totals.requests)} answered`);
    this.#set("queue", whole(now.waiting), "waiting", `${whole(totals.preemptions)} preemptions`);
    const disk = totals.disk_bytes ? `and ${bytes(totals.disk_bytes)} on disk` : "";
    this.#set("pages", percent(now.pages ?? 0), "", `${whole(now.used_pages)} of ${whole(now.total_pages)}`, disk);
    const prompt = totals.prompt_tokens || 1, hits = totals.memory_hit_tokens + totals.disk_hit_tokens;
    this.#set("hits", percent(hits / prompt), "of prompts",
      `${percent(totals.memory_hit_tokens / prompt)} from memory`, `${percent(totals.disk_hit_tokens / prompt)} from disk`);
    if (saved.priced) this.#set("saved", ...money(saved.nano, saved.currency).split(" "), `${short(hits)} tokens`, "were not computed");
    else this.#set("saved", short(hits), "tokens", "were not computed;", "no prices are set");
  }
}

/** How often drafts of the MTP modules are accepted, by position. */
class Drafts {
  constructor() {
    this.list = element("ol", { class: "bars" });
    this.note = element("p", { class: "soft small" });
    this.node = element("article", { class: "card" },
      element("div", { class: "card-head" }, element("h2", {}, "Drafts accepted, by position")), this.list, this.note);
  }

  show(drafts) {
    if (!drafts.length) {
      this.list.replaceChildren();
      say(this.note, "No drafts were verified yet: speculation is off, or nobody has asked.");
      return;
    }
    if (this.list.children.length !== drafts.length) this.#build(drafts.length);
    drafts.forEach(({ drafted, accepted }, index) => {
      const share = drafted ? accepted / drafted : 0, row = this.list.children[index];
      row.querySelector(".fill").style.width = `${100 * share}%`;
      say(row.querySelector("b"), percent(share));
      say(row.querySelector(".count"), `${short(accepted)} of ${short(drafted)}`);
    });
    const tokens = 1 + drafts.reduce((sum, { accepted }) => sum + accepted, 0) / Math.max(1, drafts[0].drafted);
    say(this.note, `${tokens.toFixed(2)} tokens for each verified step of a request, over the last minute with drafts.`);
  }

  #build(count) {
    this.list.replaceChildren(...Array.from({ length: count }, (_, index) => element("li", {},
      element("span", { class: "soft" }, `Draft ${index + 1}`),
      element("span", { class: "track", "aria-hidden": "true" }, element("span", { class: "fill" })),
      element("b", {}), element("span", { class: "count soft small" }))));
  }
}
