// The settings of a chat: a form whose fields are remembered, and the request's parameters that they make.

import { byId } from "./elements.js";
import { browser } from "./stored.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

export class Settings {
  #form = byId("settings-form");
  #panel = byId("settings");
  #button = byId("settings-button");
  #served = [];

  constructor() {
    this.#restore();
    this.#form.addEventListener("input", () => this.#keep());
    this.#form.addEventListener("submit", (event) => event.preventDefault());
    this.#form.addEventListener("reset", () => setTimeout(() => this.#keep()));
    this.#button.addEventListener("click", () => this.toggle(this.#panel.hidden));
    byId("settings-close").addEventListener("click", () => this.toggle(false));
    this.#panel.addEventListener("keydown", (event) => event.key === "Escape" && this.toggle(false));
  }

  /** Opens or closes the panel; the focus goes with it. */
  toggle(open) {
    this.#panel.hidden = !open;
    // On narrow screens the panel lies over the conversation, which then cannot be reached by keyboard either.
    document.querySelector(".talk").inert = open && matchMedia("(max-width: 760px)").matches;
    this.#button.setAttribute("aria-expanded", String(open));
    document.body.classList.toggle("settings-open", open);
    (open ? byId("set-system") : this.#button).focus();
  }

  /** Models that are served.  The field may name others: those of the server's routes. */
  offer(models) {
    this.#served = models;
    byId("models").replaceChildren(...models.map((name) => new Option(name, name)));
    byId("set-model").placeholder = models[0] ?? "";
  }

  /** The field's, else the first that is served; empty where none is known. */
  get model() {
    return byId("set-model").value.trim() || (this.#served[0] ?? "");
  }

  get system() {
    return byId("set-system").value.trim();
  }

  /** What the request says beside model and messages; empty fields say nothing.  Throws an Error that names the field. */
  parameters() {
    const found = {};
    for (const name of NUMBERS) {
      const field = this.#form.elements[name];
      if (field.validity.badInput || !field.validity.valid) {
        this.toggle(true);
        field.focus();
        throw new Error(`${field.labels[0].firstElementChild.textContent}: ${field.validationMessage}`);
      }
      if (field.value !== "") found[name] = Number(field.value);
    }
    const thinking = byId("set-thinking").value;
    if (thinking) found.thinking = { type: thinking };
    return found;
  }

  #keep() {
    browser.set("settings", JSON.stringify(Object.fromEntries(new FormData(this.#form))));
  }

  #restore() {
    let kept = {};
    try {
      kept = JSON.parse(browser.get("settings")) ?? {};
    } catch {
      // nothing that could be read
    }
    for (const [name, value] of Object.entries(kept))
      if (this.#form.elements[name] && typeof value === "string") this.#form.elements[name].value = value;
  }
}
