// One turn of a conversation on the page: a question, or an answer with its reasoning, its figures and its fate.

import { element, say } from "./elements.js";
import { copyText, MarkdownView } from "./markdown_view.js";
import { percent, seconds, short, whole } from "./numbers.js";

export function questionElement(text) {
  return element("li", { class: "turn question" },
    element("h2", { class: "hidden-visually" }, "You"),
    element("div", { class: "bubble" }, text));
}

/** An answer: `show` draws it anew from its turn as often as the turn changes. */
export class AnswerView {
  #reasoning = null;
  #markdown;

  constructor(actions) {
    this.body = element("div", { class: "answer-text" });
    this.waiting = element("p", { class: "waiting" }, element("span", { class: "pulse", "aria-hidden": "true" }), "Waiting for the first token");
    this.fate = element("p", { class: "fate", hidden: true });
    this.figures = element("p", { class: "figures" });
    this.copy = element("button", { type: "button", class: "quiet copy", onclick: () => copyText(this.turn.content, this.copy) }, "Copy");
    this.again = element("button", { type: "button", class: "quiet copy", onclick: () => actions.again() }, "Try again");
    this.foot = element("div", { class: "answer-foot", hidden: true }, this.copy, this.again, this.figures);
    this.node = element("li", { class: "turn answer" },
      element("h2", { class: "hidden-visually" }, "Answer"), this.waiting, this.body, this.fate, this.foot);
    this.#markdown = new MarkdownView(this.body);
  }

  show(turn, { last }) {
    this.turn = turn;
    this.waiting.hidden = !turn.running || Boolean(turn.content || turn.reasoning);
    if (turn.reasoning) this.#showReasoning(turn);
    this.#markdown.show(turn.content, turn.running);
    this.node.classList.toggle("running", Boolean(turn.running));
    this.node.setAttribute("aria-busy", String(Boolean(turn.running)));
    say(this.fate, fateOf(turn));
    this.fate.hidden = !this.fate.textContent;
    this.fate.classList.toggle("failed", Boolean(turn.error));
    say(this.figures, figuresOf(turn));
    this.foot.hidden = Boolean(turn.running);
    this.copy.hidden = !turn.content;
    this.again.hidden = !last;
  }

  #showReasoning(turn) {
    this.#reasoning ??= this.#reasoningElement();
    const { summary, view, pulse } = this.#reasoning;
    const thinking = turn.running && !turn.content;
    const spent = turn.thought ? ` for ${seconds(turn.thought)}` : "";
    say(summary, thinking ? "Thinking" : `Thought${spent}`);
    pulse.hidden = !thinking;
    view.show(turn.reasoning, thinking);
  }

  #reasoningElement() {
    const pulse = element("span", { class: "pulse", "aria-hidden": "true" });
    const summary = element("span", {});
    const text = element("div", { class: "reasoning-text" });
    this.node.insertBefore(element("details", { class: "reasoning" }, element("summary", {}, summary, pulse), text), this.body);
    return { summary, pulse, view: new MarkdownView(text) };
  }
}

function fateOf(turn) {
  if (turn.error) return turn.error;
  if (turn.running) return "";
  if (turn.finish === "stopped") return "Stopped.";
  if (turn.finish === "length") return "Cut off: the most tokens were reached.";
  if (turn.finish === "content_filter") return "Ended by the server.";
  if (!turn.content && !turn.reasoning) return "The model answered nothing.";
  return "";
}

function figuresOf({ usage, first, took }) {
  if (!usage) return "";
  const { prompt_tokens: prompt, completion_tokens: output } = usage;
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const parts = [`${whole(output)} ${output === 1 ? "token" : "tokens"}`];
  if (output > 1 && took > first) parts.push(`${short((output - 1) / (took - first))} a second`);
  if (first !== undefined) parts.push(`first after ${seconds(first)}`);
  if (prompt) parts.push(cached ? `prompt ${whole(prompt)}, ${percent(cached / prompt)} from cache` : `prompt ${whole(prompt)}`);
  return parts.join(" · ");
}
