// Server-sent events from a fetch's body.  EventSource sends no Authorization header, so it cannot be used here.

/** Cuts text into events.  Feed it pieces cut anywhere; the rest of an event waits for the next piece. */
export class EventParser {
  #rest = "";
  #name = "";
  #data = [];

  /** Events that `text` completes: `{name, data}`. */
  push(text) {
    this.#rest += text;
    const found = [];
    for (;;) {
      const end = this.#rest.search(/\r\n|\n|\r(?!$)/);
      if (end < 0) return found;
      const line = this.#rest.slice(0, end);
      this.#rest = this.#rest.slice(end + (this.#rest.startsWith("\r\n", end) ? 2 : 1));
      if (line === "") {
        if (this.#data.length) found.push({ name: this.#name || "message", data: this.#data.join("\n") });
        this.#name = "";
        this.#data = [];
      } else this.#field(line);
    }
  }

  #field(line) {
    const [, name, value] = /^([^:]*)(?:: ?(.*))?$/s.exec(line);
    if (name === "data") this.#data.push(value ?? "");
    else if (name === "event") this.#name = value ?? "";
  }
}

/** Events of a response as they come. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const parser = new EventParser();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield* parser.push(value);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
