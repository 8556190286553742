// The panel that finds out which of some captions fits a picture.

import { ask, toBase64 } from "./api.js";
import { byId, make, showFieldError } from "./dom.js";

export class Classify {
  /** examples: captions to begin with. onError: called with an error that no field has. */
  constructor(examples, onError) {
    this.onError = onError;
    this.file = null;
    this.panel = byId("classify");
    this.classes = byId("classes");
    this.classes.value = examples.join("\n");
    this.panel.hidden = false;
    this.input = byId("classify-file");
    this.input.addEventListener("change", () => this.take(this.input.files[0]));
    this.classes.addEventListener("input", () => showFieldError(this.classes, ""));
    byId("classify-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    const drop = byId("drop");
    for (const [kind, isOver] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
      drop.addEventListener(kind, (event) => {
        event.preventDefault();
        drop.classList.toggle("over", isOver);
        if (kind === "drop") this.take(event.dataTransfer.files[0]);
      });
    }
  }

  /** Show a picture, and classify it. caption: one more to choose from. */
  take(file, caption = "") {
    if (!file) return;
    this.file = file;
    const image = byId("classify-picture");
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(file);
    image.hidden = false;
    image.onload = () => image.classList.toggle("pixelated", image.naturalWidth <= 128);
    byId("drop-words").textContent = "Drop another picture, or choose a file";
    const captions = this.captions();
    if (caption && !captions.includes(caption)) {
      this.classes.value = [caption, ...captions].join("\n");
    }
    this.classes.scrollTop = 0;
    this.run();
  }

  captions() {
    return this.classes.value.split("\n").map((each) => each.trim()).filter(Boolean);
  }

  async run() {
    showFieldError(this.classes, "");
    byId("images-error").textContent = "";
    if (!this.file) {
      byId("images-error").textContent = "Choose a picture first.";
      return;
    }
    const classes = this.captions();
    try {
      const images = [await toBase64(this.file)];
      const [[, captions, probabilities]] = await ask({ images, classes, top: 10 });
      byId("predictions").replaceChildren(
        ...captions.map((caption, place) => makePrediction(caption, probabilities[place])),
      );
    } catch (error) {
      byId("predictions").replaceChildren();
      const field = error.field?.replace(/\[.*/, "");
      if (field === "classes") showFieldError(this.classes, error.message);
      else if (field === "images") byId("images-error").textContent = error.message;
      else this.onError(error);
    }
  }
}

function makePrediction(caption, probability) {
  const bar = make("span", { className: "bar-of" });
  bar.style.width = `${100 * probability}%`;
  return make(
    "li",
    {},
    make("span", { className: "name", textContent: caption }),
    make("span", { className: "percent", textContent: `${(100 * probability).toFixed(1)} %` }),
    bar,
  );
}
