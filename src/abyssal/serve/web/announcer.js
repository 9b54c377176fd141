// Reads a growing answer to screen readers: whole sentences, in order, not more often than they can be followed.
//
// A live region around the answer itself would be read again from its beginning whenever a block is drawn anew.

import { element } from "./elements.js";

const PAUSE = 1500; // milliseconds
const MOST_KEPT = 40;

export class Announcer {
  #region;
  #text = "";
  #told = 0;
  #timer = null;

  constructor(region) {
    this.#region = region;
  }

  begin() {
    clearTimeout(this.#timer);
    this.#timer = null;
    this.#text = "";
    this.#told = 0;
    this.#region.replaceChildren();
  }

  /** The whole text so far. */
  update(text) {
    this.#text = text;
    this.#timer ??= setTimeout(() => {
      this.#timer = null;
      this.#tell(lastSentence(this.#text));
    }, PAUSE);
  }

  /** No more comes: the rest, and a last word. */
  end(word) {
    clearTimeout(this.#timer);
    this.#timer = null;
    this.#tell(this.#text.length);
    this.#say(word);
  }

  #tell(end) {
    if (end > this.#told) this.#say(this.#text.slice(this.#told, end).replace(/[*_`#|>]+/g, " ").trim());
    this.#told = Math.max(this.#told, end);
  }

  #say(text) {
    if (!text) return;
    this.#region.append(element("p", {}, text));
    while (this.#region.children.length > MOST_KEPT) this.#region.firstChild.remove();
  }
}

/** Where the last whole sentence or line of `text` ends. */
export function lastSentence(text) {
  let end = 0;
  for (const found of text.matchAll(/[.!?。！？](?=\s)|\n/g)) end = found.index + 1;
  return end;
}
