// The sampling settings: fields made from the request's schema, their values and their errors.

import { byId, make, showFieldError } from "./dom.js";

// What each is called, and how far one press of an arrow key goes.
const FIELDS = {
  num_candidates: ["Candidates", 1],
  temperature: ["Temperature", 0.1],
  guidance_scale: ["Guidance scale", 0.5],
  top_k: ["Top k", 1],
  top_p: ["Top p", 0.05],
  preview_rows: ["Preview rows", 1],
  deadline_seconds: ["Deadline (s)", 1],
  seed: ["Seed", 1],
};

export class Settings {
  /** schema: of the request that generates. defaults: values that the page prefers. */
  constructor(schema, defaults) {
    this.inputs = {};
    this.schema = schema;
    for (const [name, [label, step]] of Object.entries(FIELDS)) {
      const property = schema.properties[name];
      if (!property) continue;
      byId("fields").append(this.makeField(name, label, step, property));
      this.inputs[name].value = defaults[name] ?? property.default ?? "";
      byId("help").append(
        make("dt", { textContent: label }),
        make("dd", { textContent: property.description }),
      );
    }
    this.newSeed = make("input", { type: "checkbox", id: "new-seed", checked: true });
    const box = make("label", { className: "check" }, this.newSeed, " New one each time");
    this.inputs.seed.closest(".field").append(box);
    this.inputs.seed.addEventListener("input", () => (this.newSeed.checked = false));
  }

  makeField(name, label, step, property) {
    const { minimum, exclusiveMinimum, maximum } = numberOf(property);
    const input = make("input", {
      id: name,
      type: "number",
      inputMode: "decimal",
      step,
      "aria-describedby": `${name}-hint ${name}-error`,
    });
    if (minimum !== undefined) input.min = minimum;
    if (maximum !== undefined) input.max = maximum;
    if (isOptional(property)) input.placeholder = "none";
    input.dataset.default = property.default ?? "";
    input.addEventListener("input", () => showFieldError(input, ""));
    this.inputs[name] = input;
    return make(
      "div",
      { className: "field" },
      make("label", { htmlFor: name, textContent: label }),
      input,
      make("p", {
        className: "hint",
        id: `${name}-hint`,
        textContent: rangeOf({ minimum, exclusiveMinimum, maximum }),
      }),
      make("p", { className: "error", id: `${name}-error` }),
    );
  }

  /** Return the values that are given; a seed is chosen where a new one is wanted.
   *  Returns null, with a message at the field, where one is no number. */
  read() {
    if (this.newSeed.checked || this.inputs.seed.value === "") {
      this.inputs.seed.value = crypto.getRandomValues(new Uint32Array(1))[0];
    }
    const values = {};
    let wrong = null;
    for (const [name, input] of Object.entries(this.inputs)) {
      showFieldError(input, "");
      if (input.validity.badInput) {
        showFieldError(input, "must be a number");
        wrong ??= input;
      } else if (input.value !== "") values[name] = Number(input.value);
      // Left out, it would be the model's default.
      else if (isOptional(this.schema.properties[name]) && input.dataset.default) values[name] = null;
    }
    if (!wrong) return values;
    this.show(wrong);
    return null;
  }

  /** Show the values of a run whose pictures are to come again. */
  fill(values) {
    for (const [name, input] of Object.entries(this.inputs)) {
      showFieldError(input, "");
      if (name in values) input.value = values[name];
      else if (name !== "preview_rows") input.value = this.schema.properties[name].default ?? "";
    }
    this.newSeed.checked = false;
  }

  /** Show an error of the server at its field; return whether there is such a field. */
  refuse(field, message) {
    const input = this.inputs[field];
    if (!input) return false;
    showFieldError(input, message);
    this.show(input);
    return true;
  }

  show(input) {
    byId("settings").open = true;
    input.focus();
  }
}

/** Return the part of a schema that is about numbers. */
function numberOf(property) {
  const kinds = property.anyOf ?? [property];
  return kinds.find((kind) => kind.type !== "null") && {
    ...kinds.find((kind) => kind.type !== "null"),
    ...(property.maximum === undefined ? {} : { maximum: property.maximum }),
  };
}

const isOptional = (property) => Boolean(property.anyOf?.some((kind) => kind.type === "null"));

/** Return a range in words. */
function rangeOf({ minimum, exclusiveMinimum, maximum }) {
  const upper = maximum === Number.MAX_SAFE_INTEGER ? "2⁵³ − 1" : maximum?.toLocaleString("en");
  if (exclusiveMinimum !== undefined) return `above ${exclusiveMinimum} to ${upper}`;
  return upper === undefined ? `${minimum} or more` : `${minimum} to ${upper}`;
}
