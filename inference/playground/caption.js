// The caption field: suggestions while typing, from the model's captions and by the model itself.

import { ask } from "./api.js";
import { byId, make, showFieldError } from "./dom.js";

const MOST = 6;
const WAIT_MILLISECONDS = 250;

export class Caption {
  /** examples: captions of the data. mayAsk: whether the model may be asked to complete one.
   *  onExample: called when one of the examples was pressed. */
  constructor(examples, { mayAsk, onExample }) {
    this.input = byId("caption");
    this.list = byId("suggestions");
    this.examples = examples;
    this.mayAsk = mayAsk;
    this.active = -1;
    this.timer = 0;
    this.asking = new AbortController();
    this.showExamples(onExample);
    this.input.addEventListener("input", () => this.typed());
    this.input.addEventListener("keydown", (event) => this.pressed(event));
    this.input.addEventListener("blur", () => this.close());
    this.list.addEventListener("pointerdown", (event) => event.preventDefault()); // keeps the focus
    this.list.addEventListener("click", (event) => {
      const option = event.target.closest("li");
      if (option) this.take(option.textContent);
    });
  }

  showExamples(onExample) {
    const choose = ({ target }) => {
      this.value = target.textContent;
      onExample();
    };
    byId("examples").hidden = this.examples.length === 0;
    byId("examples").append(
      ...this.examples.map((textContent) =>
        make("button", { type: "button", className: "chip", textContent, onclick: choose }),
      ),
    );
  }

  get value() {
    return this.input.value;
  }

  set value(text) {
    this.input.value = text;
    this.refuse("");
    this.close();
  }

  refuse(message) {
    showFieldError(this.input, message);
  }

  typed() {
    this.refuse("");
    this.close();
    const text = this.value.trimStart();
    if (!text) return;
    const wanted = text.toLowerCase();
    const found = this.examples.filter(
      (each) => each.toLowerCase().includes(wanted) && each !== text,
    );
    this.show(found);
    this.timer = setTimeout(() => this.complete(text, found), WAIT_MILLISECONDS);
  }

  /** Ask the model to go on after the last whole word, and keep what agrees with the letters. */
  async complete(text, found) {
    if (!this.mayAsk()) return;
    this.asking = new AbortController();
    const complete = text.slice(0, text.lastIndexOf(" ") + 1).trimEnd();
    const body = { complete, num_completions: 16, seed: 0, deadline_seconds: 10 };
    try {
      const { captions } = await ask(body, this.asking.signal);
      const start = text.toLowerCase().trimEnd();
      const more = captions
        .map((each) => each.caption)
        .filter((each) => each.toLowerCase().startsWith(start) && each.length > start.length);
      if (this.value.trimStart() === text) this.show([...new Set([...found, ...more])]);
    } catch {
      // No suggestions: the model is busy, or cannot complete captions.
    }
  }

  show(captions) {
    this.active = -1;
    this.input.removeAttribute("aria-activedescendant");
    this.list.replaceChildren(
      ...captions.slice(0, MOST).map((caption, number) =>
        make("li", {
          id: `suggestion-${number}`,
          role: "option",
          "aria-selected": "false",
          textContent: caption,
        }),
      ),
    );
    this.list.hidden = captions.length === 0;
    this.input.setAttribute("aria-expanded", String(!this.list.hidden));
  }

  close() {
    clearTimeout(this.timer);
    this.asking.abort();
    this.show([]);
  }

  take(caption) {
    this.value = caption;
    this.input.focus();
  }

  pressed(event) {
    const options = [...this.list.children];
    if (options.length === 0) return;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      const places = options.length + 1; // one of them is the field itself
      const step = event.key === "ArrowDown" ? 1 : -1;
      this.active = ((this.active + 1 + step + places) % places) - 1;
      for (const [number, option] of options.entries()) {
        option.setAttribute("aria-selected", String(number === this.active));
      }
      if (this.active < 0) this.input.removeAttribute("aria-activedescendant");
      else this.input.setAttribute("aria-activedescendant", options[this.active].id);
    } else if (event.key === "Enter" && this.active >= 0) {
      event.preventDefault();
      this.take(options[this.active].textContent);
    } else if (event.key === "Escape") {
      event.stopPropagation();
      this.close();
    }
  }
}
