// Markdown's tree as elements.  Only text nodes are made of a model's text, and links lead to http, https and mail.

import { element } from "./elements.js";
import { closed, parse } from "./markdown.js";

/** Shows a text that grows: blocks that stayed the same keep their elements, so that a selection in them stays too. */
export class MarkdownView {
  #target;
  #shown = [];

  constructor(target) {
    this.#target = target;
  }

  /** `growing`: more of the text is to come. */
  show(text, growing = false) {
    const blocks = parse(growing ? closed(text) : text).map((block) => ({ block, key: JSON.stringify(block) }));
    let same = 0;
    while (same < blocks.length && same < this.#shown.length && blocks[same].key === this.#shown[same].key) same++;
    for (const old of this.#shown.splice(same)) old.made.remove();
    for (const { block, key } of blocks.slice(same)) {
      const made = blockElement(block);
      this.#target.append(made);
      this.#shown.push({ key, made });
    }
  }
}

const BLOCKS = {
  paragraph: (block) => element("p", {}, inlines(block.inline)),
  // Below the page's own headings.
  heading: (block) => element(`h${Math.min(6, block.level + 2)}`, {}, inlines(block.inline)),
  rule: () => element("hr"),
  quote: (block) => element("blockquote", {}, block.blocks.map(blockElement)),
  list: (block) => element(block.ordered ? "ol" : "ul", { start: block.ordered && block.start !== 1 ? block.start : null },
    block.items.map((item) => element("li", {}, itemContents(item)))),
  code: codeBlock,
  table: tableBlock,
};

const blockElement = (block) => BLOCKS[block.kind](block);

// An item's first paragraph needs no element of its own.
const itemContents = (item) => item.flatMap((block, index) =>
  index === 0 && block.kind === "paragraph" ? inlines(block.inline) : [blockElement(block)]);

function codeBlock(block) {
  const text = block.text;
  const copy = element("button", { type: "button", class: "quiet copy", onclick: () => copyText(text, copy) }, "Copy");
  return element("div", { class: "code-block" },
    element("div", { class: "code-head" }, element("span", {}, block.language || "text"), copy),
    element("pre", { tabindex: "0" }, element("code", {}, text)));
}

function tableBlock(block) {
  const cell = (name, inline, index) =>
    element(inline.length ? name : "td", { class: `align-${block.aligns[index] ?? "left"}`, scope: name === "th" && inline.length ? "col" : null }, inlines(inline));
  const row = (name, cells) => element("tr", {}, cells.map((inline, index) => cell(name, inline, index)));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table" }, element("table", {},
    element("thead", {}, row("th", block.head)), element("tbody", {}, block.rows.map((cells) => row("td", cells)))));
}

const INLINES = { strong: "strong", em: "em", struck: "s" };

function inlines(pieces) {
  return pieces.map((piece) => {
    if (piece.kind === "text") return document.createTextNode(piece.text);
    if (piece.kind === "break") return element("br");
    if (piece.kind === "code") return element("code", {}, piece.text);
    if (piece.kind === "link")
      return element("a", { href: piece.url, target: "_blank", rel: "noopener noreferrer" }, inlines(piece.inline));
    return element(INLINES[piece.kind], {}, inlines(piece.inline));
  });
}

/** Puts `text` on the clipboard, and says so on the button. */
export async function copyText(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = label), 1500);
}
