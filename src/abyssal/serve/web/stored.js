// Small values that outlive a reload.  Where the browser forbids storage, they live as long as the page.

function area(open) {
  const kept = new Map();
  return {
    get(name) {
      try {
        return open().getItem(`abyssal.${name}`);
      } catch {
        return kept.get(name) ?? null;
      }
    },
    set(name, value) {
      kept.set(name, value);
      try {
        open().setItem(`abyssal.${name}`, value);
      } catch {
        // full or forbidden
      }
    },
    remove(name) {
      kept.delete(name);
      try {
        open().removeItem(`abyssal.${name}`);
      } catch {
        // forbidden
      }
    },
  };
}

/** Of this tab: secrets and conversations. */
export const tab = area(() => sessionStorage);
/** Of this browser: the theme and settings. */
export const browser = area(() => localStorage);
