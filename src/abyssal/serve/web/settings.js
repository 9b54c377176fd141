// The settings of a chat: a form whose fields are remembered, and the request's parameters that they make.

import { byId } from "./elements.js";
import { browser } from "./stored.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

export class Settings {
  #form = byId("settings-form");
  #panel = byId("settings");
  #button = byId("settings-button");

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
    this.#button.setAttribute("aria-expanded", String(open));
    document.body.classList.toggle("settings-open", open);
    (open ? byId("set-system") : this.#button).focus();
  }

  /** Models to choose from.  One that was chosen before stays chosen where it still exists. */
  offer(models) {
    const field = byId("set-model");
    const wanted = field.value || this.#remembered.model;
    field.replaceChildren(...models.map((name) => new Option(name, name)));
    if (models.includes(wanted)) field.value = wanted;
  }

  get model() {
    return byId("set-model").value;
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

  get #remembered() {
    try {
      return JSON.parse(browser.get("settings")) ?? {};
    } catch {
      return {};
    }
  }

  #restore() {
    for (const [name, value] of Object.entries(this.#remembered))
      if (this.#form.elements[name] && name !== "model" && typeof value === "string") this.#form.elements[name].value = value;
  }
}
