// A model's text read as Markdown, as far as models write it: paragraphs, headings, lists, quotes, tables, rules, code.
//
// `parse` makes a tree of plain objects and knows no document, so that it can be tested alone; `markdown_view.js` turns
// the tree into elements.  Whatever is not understood stays text.  Text that is still being written is a prefix of what
// it will be: an open fence is code to the end, an open `**` is two stars until its partner comes.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(\S.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:\s+(.*)|)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const DIVIDER = /^ *\|?(?: *:?-+:? *\|)+(?: *:?-+:? *)?\|? *$/;
const DEEPEST = 12; // lists in lists and quotes in quotes beyond this are text
const FARTHEST = 4000; // characters between a mark and its partner
const MOST_TRIES = 64; // for a partner

/** Blocks of `text`, in order. */
export function parse(text, depth = 0) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) at++;
    else at = block(lines, at, blocks, depth);
  }
  return blocks;
}

// Reads one block that begins at line `at`; returns the line after it.
function block(lines, at, blocks, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return code(lines, at, fence, blocks);
  const heading = HEADING.exec(line);
  if (heading) {
    blocks.push({ kind: "heading", level: heading[1].length, inline: inline(withoutMarks(heading[2].trimEnd())) });
    return at + 1;
  }
  if (RULE.test(line)) {
    blocks.push({ kind: "rule" });
    return at + 1;
  }
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, blocks, depth);
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, at, blocks, depth);
  if (line.includes("|") && (lines[at + 1] ?? "").length < FARTHEST && DIVIDER.test(lines[at + 1] ?? "")) return table(lines, at, blocks);
  return paragraph(lines, at, blocks, depth);
}

// `## Title ##` is the same as `## Title`.
function withoutMarks(title) {
  let end = title.length;
  while (title[end - 1] === "#") end--;
  return end < title.length && /[ \t]/.test(title[end - 1] ?? " ") ? title.slice(0, end).trimEnd() : title;
}

/** A text that is still being written, as it will probably go on: marks that are open in its last paragraph are closed,
 * so that words do not jump when their partner comes. */
export function closed(text) {
  if ((text.match(/^ {0,3}(?:`{3}|~{3})/gm) ?? []).length % 2) return text; // amid code
  const begin = text.lastIndexOf("\n\n") + 1, before = text.slice(0, begin);
  let last = text.slice(begin);
  for (const mark of ["`", "**"]) {
    const count = last.split(mark).length - 1;
    if (count % 2 === 0) continue;
    const bare = last.trimEnd();
    last = bare.endsWith(mark) ? bare.slice(0, -mark.length) : bare + mark;
    break; // what is inside code is no mark
  }
  return before + last;
}

function code(lines, at, [, marks, language], blocks) {
  const held = [];
  const closes = (line) => line.trim().length >= marks.length && line.trim() === marks[0].repeat(line.trim().length);
  for (at++; at < lines.length && !closes(lines[at]); at++) held.push(lines[at]);
  blocks.push({ kind: "code", language: language.trim().split(/\s+/)[0], text: held.join("\n"), open: at >= lines.length });
  return at + 1;
}

function quote(lines, at, blocks, depth) {
  const held = [];
  for (let found; at < lines.length && (found = QUOTE.exec(lines[at])); at++) held.push(found[1]);
  blocks.push({ kind: "quote", blocks: parse(held.join("\n"), depth + 1) });
  return at;
}

function list(lines, at, blocks, depth) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark);
  const items = [];
  while (at < lines.length) {
    const found = ITEM.exec(lines[at]);
    if (!found || found[1].length !== indent.length || /\d/.test(found[2]) !== ordered || RULE.test(lines[at])) break;
    const held = [found[3] ?? ""];
    const inner = indent.length + found[2].length + 1;
    for (at++; at < lines.length; at++) {
      const lead = /^ */.exec(lines[at])[0].length;
      if (!lines[at].trim()) {
        // A blank line belongs to the item if what follows is indented under it.
        const next = lines.slice(at + 1, at + 3).find((line) => line.trim());
        if (next === undefined || /^ */.exec(next)[0].length <= indent.length) break;
        held.push("");
      } else if (lead > indent.length) held.push(lines[at].slice(Math.min(lead, inner)));
      else if (!starts(lines[at]) && held[held.length - 1]) held.push(lines[at]);
      else break;
    }
    items.push(parse(held.join("\n"), depth + 1));
    let next = at;
    while (next < lines.length && !lines[next].trim()) next++;
    if (next < lines.length && ITEM.test(lines[next])) at = next;
  }
  blocks.push({ kind: "list", ordered, start: ordered ? parseInt(mark, 10) : 1, items });
  return at;
}

function table(lines, at, blocks) {
  const aligns = cells(lines[at + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left");
  const row = (line) => cells(line).slice(0, aligns.length).map(inline);
  const head = row(lines[at]), rows = [];
  for (at += 2; at < lines.length && lines[at].includes("|") && lines[at].trim(); at++) rows.push(row(lines[at]));
  blocks.push({ kind: "table", aligns, head, rows });
  return at;
}

const cells = (line) => line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/)
  .map((cell) => cell.trim().replaceAll("\\|", "|"));

const starts = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

function paragraph(lines, at, blocks, depth) {
  const held = [lines[at]];
  for (at++; at < lines.length && lines[at].trim() && (depth >= DEEPEST || !starts(lines[at])); at++) held.push(lines[at]);
  blocks.push({ kind: "paragraph", inline: inline(held.map((line) => line.trimStart()).join("\n")) });
  return at;
}

const LINK = /^\[([^\][\n]{1,300})\]\(\s*<?((?:https?:\/\/|mailto:)[^\s<>()]{1,2000})>?(?:\s+"[^"\n]*")?\s*\)/;
const ADDRESS = /^https?:\/\/[^\s<>"'`)\]]{1,2000}/;
const SPECIAL = /[`*_~[\\\n]|https?:\/\//g;

/** Pieces of one block's text: `{kind, text}` or `{kind, inline}`. */
export function inline(text, depth = 0) {
  const pieces = [];
  let at = 0, plain = "";
  const add = (piece) => {
    if (plain) pieces.push({ kind: "text", text: plain });
    plain = "";
    pieces.push(piece);
  };
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text);
    if (!next) {
      plain += text.slice(at);
      break;
    }
    plain += text.slice(at, next.index);
    at = next.index;
    const found = special(text, at, depth);
    if (!found) plain += text[at++];
    else {
      if (found.piece) add(found.piece);
      else plain += found.plain;
      at = found.end;
    }
  }
  if (plain) pieces.push({ kind: "text", text: plain });
  return pieces;
}

// What begins at `at`: a piece or plain text, and where it ends.  Nothing where the mark is only a character.
function special(text, at, depth) {
  const mark = text[at];
  if (mark === "\\" && /[\\`*_~[\]()#+\-.!|<>{}]/.test(text[at + 1] ?? "")) return { plain: text[at + 1], end: at + 2 };
  if (mark === "\n") return { piece: { kind: "break" }, end: at + 1 };
  if (mark === "`") return codeSpan(text, at);
  if (mark === "[") {
    const link = LINK.exec(text.slice(at, at + 2400));
    return link && { piece: { kind: "link", url: link[2], inline: inline(link[1], depth + 1) }, end: at + link[0].length };
  }
  if (mark === "h") {
    const url = ADDRESS.exec(text.slice(at, at + 2100))?.[0].replace(/[.,;:!?]+$/, "");
    return url && { piece: { kind: "link", url, inline: [{ kind: "text", text: url }] }, end: at + url.length };
  }
  return depth < DEEPEST ? emphasis(text, at, depth) : null;
}

function codeSpan(text, at) {
  const marks = /^`+/.exec(text.slice(at))[0];
  let tries = 0;
  for (let end = at + marks.length; (end = text.indexOf(marks, end)) >= 0 && end - at < FARTHEST && tries < MOST_TRIES; tries++) {
    const length = /^`+/.exec(text.slice(end))[0].length;
    if (length === marks.length) {
      const held = text.slice(at + marks.length, end).replaceAll("\n", " ");
      return { piece: { kind: "code", text: /^ .*[^ ].* $/.test(held) ? held.slice(1, -1) : held }, end: end + length };
    }
    end += length;
  }
  return { plain: marks, end: at + marks.length };
}

const EMPHASES = [["***", "both"], ["**", "strong"], ["__", "strong"], ["~~", "struck"], ["*", "em"], ["_", "em"]];

function emphasis(text, at, depth) {
  for (const [mark, kind] of EMPHASES) {
    if (!text.startsWith(mark, at)) continue;
    const begin = at + mark.length;
    if (!/\S/.test(text[begin] ?? "") || (mark[0] === "_" && /\w/.test(text[at - 1] ?? ""))) continue;
    const end = closing(text, begin, mark);
    if (end < 0) continue;
    const held = inline(text.slice(begin, end), depth + 1);
    const piece = kind === "both" ? { kind: "strong", inline: [{ kind: "em", inline: held }] } : { kind, inline: held };
    return { piece, end: end + mark.length };
  }
  return null;
}

// Where the partner of an opening mark is: after a character that is no space, and not part of a longer mark.
function closing(text, begin, mark) {
  let tries = 0;
  for (let end = begin + 1; (end = text.indexOf(mark, end)) >= 0 && end - begin < FARTHEST && tries < MOST_TRIES; end++, tries++) {
    const after = text[end + mark.length] ?? "";
    if (/\s/.test(text[end - 1]) || (mark.length === 1 && (after === mark || text[end - 1] === mark))) continue;
    if (mark[0] === "_" && /\w/.test(after)) continue;
    return end;
  }
  return -1;
}
