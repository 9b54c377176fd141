// The chat: turns, and an answer that streams in.

import { Announcer } from "./announcer.js";
import { ApiError, call, errorMessage } from "./api.js";
import { byId, say } from "./elements.js";
import { Settings } from "./settings.js";
import { events } from "./sse.js";
import { tab } from "./stored.js";
import { AnswerView, questionElement } from "./turn_view.js";

const UNKNOWN = "No model is known yet: the server has not answered.";
const NEAR = 80; // pixels from the end within which the view follows it

export class Chat {
  #turns = [];
  #views = [];
  #abort = null;
  #why = UNKNOWN;
  #settings = new Settings();
  #announcer = new Announcer(byId("announcer"));
  #prompt = byId("prompt");
  #list = byId("turns");
  #scroller = byId("messages");

  /** `askForKey` is called where the server wants one. */
  constructor(askForKey) {
    this.askForKey = askForKey;
    byId("composer").addEventListener("submit", (event) => (event.preventDefault(), this.#send()));
    byId("stop-button").addEventListener("click", () => this.stop());
    byId("new-button").addEventListener("click", () => this.#clear());
    this.#prompt.addEventListener("keydown", (event) => this.#key(event));
    this.#prompt.addEventListener("input", () => this.#fit());
    this.#restore();
    this.#buttons();
  }

  /** Models that are served; `why` there is none. */
  offer(models, why = UNKNOWN) {
    this.#settings.offer(models);
    this.#why = why;
  }

  show() {
    this.#fit();
    this.#prompt.focus();
    this.#follow(true);
  }

  stop() {
    this.#abort?.abort();
  }

  #key(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.#send();
    } else if (event.key === "Escape" && this.#abort) this.stop();
  }

  #fit() {
    this.#prompt.style.height = "auto";
    this.#prompt.style.height = `${this.#prompt.scrollHeight}px`;
  }

  #send() {
    const text = this.#prompt.value.trim();
    if (!text || this.#abort) return;
    if (this.#ask([...this.#turns, { role: "user", content: text }])) {
      this.#prompt.value = "";
      this.#fit();
    }
  }

  // Puts a new answer under `turns`, whose last is a question.  Whether it was asked.
  #ask(turns) {
    let body;
    try {
      body = this.#body(turns);
    } catch (error) {
      this.#complain(error.message);
      return false;
    }
    this.#complain("");
    this.#turns = [...turns, { role: "assistant", content: "", reasoning: "", running: true }];
    this.#draw();
    this.#follow(true);
    // The button that was pressed goes away.  Where fingers type, the focus would bring up a keyboard over the answer.
    if (matchMedia("(pointer: fine)").matches) this.#prompt.focus();
    this.#stream(body, this.#turns.at(-1));
    return true;
  }

  #body(turns) {
    if (!this.#settings.model) throw new Error(this.#why);
    const messages = turns.filter((turn) => turn.role === "user" || turn.content).map(({ role, content }) => ({ role, content }));
    if (this.#settings.system) messages.unshift({ role: "system", content: this.#settings.system });
    const options = { stream: true, stream_options: { include_usage: true } };
    return { model: this.#settings.model, messages, ...options, ...this.#settings.parameters() };
  }

  async #stream(body, turn) {
    const clock = new AbortController();
    this.#abort = clock;
    this.#buttons();
    this.#announcer.begin();
    const began = performance.now();
    const since = () => (performance.now() - began) / 1000;
    try {
      const response = await call("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal: clock.signal });
      for await (const { data } of events(response)) {
        if (data === "[DONE]") break;
        take(turn, JSON.parse(data), since());
        this.#later(turn);
      }
      if (!turn.finish) throw new ApiError(0, "The connection ended before the answer did.");
    } catch (error) {
      this.#failed(turn, error);
    }
    turn.took = since();
    turn.running = false;
    this.#abort = null;
    this.#finish(turn);
  }

  #failed(turn, error) {
    if (error.name === "AbortError") turn.finish = "stopped";
    else {
      turn.error = error instanceof ApiError ? error.message : `The answer broke off: ${error.message}`;
      if (error.status === 401) this.askForKey();
    }
  }

  #finish(turn) {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    this.#views.at(-1)?.show(turn, { last: true });
    this.#announcer.update(turn.content);
    this.#announcer.end(turn.error ?? (turn.finish === "stopped" ? "Stopped." : "End of the answer."));
    this.#buttons();
    this.#follow();
    this.#keep();
  }

  // At most once a frame, however many tokens come.
  #later(turn) {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      const near = this.#near();
      this.#views.at(-1)?.show(turn, { last: true });
      if (near) this.#follow(true);
      this.#announcer.update(turn.content);
    });
  }

  #near() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR;
  }

  #follow(always = this.#near()) {
    if (always) this.#scroller.scrollTop = this.#scroller.scrollHeight;
  }

  #draw() {
    this.#views = [];
    const nodes = this.#turns.map((turn, index) => {
      if (turn.role === "user") return questionElement(turn.content);
      const view = new AnswerView({ again: () => this.#again() });
      view.show(turn, { last: index === this.#turns.length - 1 });
      this.#views.push(view);
      return view.node;
    });
    this.#list.replaceChildren(...nodes);
    byId("welcome").hidden = this.#turns.length > 0;
  }

  #again() {
    if (this.#abort) return;
    this.#ask(this.#turns.slice(0, -1));
  }

  #clear() {
    this.stop();
    this.#turns = [];
    this.#views = [];
    this.#complain("");
    this.#announcer.begin();
    this.#draw();
    this.#keep();
    this.#prompt.focus();
  }

  #buttons() {
    const running = this.#abort !== null;
    // The focus never falls from a button that goes away.
    const held = document.activeElement === byId("stop-button");
    byId("stop-button").hidden = !running;
    byId("send-button").hidden = running;
    if (held && !running) this.#prompt.focus();
    byId("prompt-hint").classList.toggle("running", running);
  }

  #complain(message) {
    const alert = byId("chat-error");
    say(alert, message);
    alert.hidden = !message;
  }

  #keep() {
    tab.set("turns", JSON.stringify(this.#turns.filter((turn) => !turn.running)));
  }

  #restore() {
    try {
      const kept = JSON.parse(tab.get("turns")) ?? [];
      if (Array.isArray(kept) && kept.every((turn) => typeof turn.content === "string")) this.#turns = kept;
    } catch {
      // nothing kept
    }
    this.#draw();
  }
}

// Puts a chunk of the stream into its turn; `at` is seconds since it was asked.
function take(turn, chunk, at) {
  if (chunk.error) throw new ApiError(chunk.error.status ?? 500, errorMessage(chunk) || "The answer broke off.");
  if (chunk.usage) turn.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const { content, reasoning_content: reasoning } = choice.delta ?? {};
  if (content || reasoning) turn.first ??= at;
  if (reasoning) turn.reasoning += reasoning;
  if (content) {
    if (turn.reasoning) turn.thought ??= at - turn.first;
    turn.content += content;
  }
  if (choice.finish_reason) turn.finish = choice.finish_reason;
}
