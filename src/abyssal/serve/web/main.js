// The page: which view is shown, the theme, the key, and what the server serves.

import { call, key } from "./api.js";
import { Board } from "./board.js";
import { Chat } from "./chat.js";
import { byId, say } from "./elements.js";
import { browser } from "./stored.js";

const root = document.documentElement;

// ---- the key

const WANTED = "The server wants an API key. This tab remembers it until it is closed.";
const dialog = byId("key-dialog");

function askForKey(text) {
  if (dialog.open) return;
  say(byId("key-text"), text ?? "This tab remembers it until it is closed, and nothing else does.");
  byId("key-field").value = key.get();
  dialog.showModal();
}

function useKey(value) {
  key.set(value.trim());
  dialog.close();
  board.restart();
  lookForModels();
}

byId("key-button").addEventListener("click", () => askForKey());
byId("key-cancel").addEventListener("click", () => dialog.close());
byId("key-forget").addEventListener("click", () => useKey(""));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key-field").value);
});

// ---- views

const chat = new Chat(() => askForKey(WANTED));
const board = new Board(() => askForKey("The board is the operator's: give a key that may see it."));
const views = { chat, board };
let current = null;

function navigate() {
  const name = location.hash === "#board" ? "board" : "chat";
  if (name === current) return;
  if (current) views[current].hide?.();
  current = name;
  for (const other of Object.keys(views)) byId(`view-${other}`).hidden = other !== name;
  for (const link of document.querySelectorAll("[data-view-link]"))
    if (link.dataset.viewLink === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  document.title = `${name === "board" ? "Board" : "Chat"} · abyssal`;
  views[name].show();
}

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("content").focus();
});
addEventListener("hashchange", navigate);

// ---- the theme

const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

function nameTheme() {
  say(byId("theme-name"), isDark() ? "Use the light theme" : "Use the dark theme");
  board.recolor();
}

byId("theme-button").addEventListener("click", () => {
  const wanted = isDark() ? "light" : "dark";
  if ((wanted === "dark") === system.matches) {
    delete root.dataset.theme;
    browser.remove("theme");
  } else {
    root.dataset.theme = wanted;
    browser.set("theme", wanted);
  }
  nameTheme();
});
system.addEventListener("change", nameTheme);

// ---- what is served

const RETRY = 3000; // milliseconds
const LOOK = 10_000;
let asking = 0;

async function lookForModels() {
  const mine = ++asking;
  try {
    const { data } = await (await call("/v1/models")).json();
    const names = data.map((model) => model.id);
    chat.offer(names);
    byId("served").hidden = !names.length;
    say(byId("served-name"), names[0] ?? "");
  } catch (error) {
    byId("served").hidden = true;
    chat.offer([], error.message);
    if (error.status === 401) askForKey(WANTED);
    else setTimeout(() => mine === asking && lookForModels(), RETRY);
  }
}

// Whether the model runs: beside its name.
async function lookAtState() {
  let state = "not reached";
  try {
    state = (await (await fetch("/ready", { cache: "no-store" })).json()).status;
  } catch {
    // the server is gone, or something before it answers
  }
  byId("served").classList.toggle("unwell", state !== "ready");
  say(byId("served-state"), state === "ready" ? "" : state);
}

nameTheme();
navigate();
lookForModels();
lookAtState();
setInterval(() => document.hidden || lookAtState(), LOOK);
