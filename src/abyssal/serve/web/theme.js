"use strict";
// Before the first paint, so that nobody in the dark is flashed at: what was chosen, else what the system says.

try {
  const theme = localStorage.getItem("abyssal.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage may be forbidden; the system's preference then holds.
}
