// The two dialogs: one picture of a run, large; and the model card.

import { byId, isSmall, make, wholeSide, withMinus } from "./dom.js";
import { nameOf, save } from "./download.js";

/** One picture with its scores, and what can be done with it. */
export class PictureDialog {
  /** size: of pictures. actions: what the buttons call with a run and a picture. */
  constructor(size, { prime, classify }) {
    this.size = size;
    this.dialog = byId("picture");
    this.on("picture-save", () => save(nameOf(this.run, this.picture), this.picture.blob));
    this.on("picture-prime", () => this.leave(() => prime(this.run, this.picture)));
    this.on("picture-classify", () => this.leave(() => classify(this.run, this.picture)));
    this.on("picture-before", () => this.go(-1));
    this.on("picture-after", () => this.go(1));
    byId("picture-classify").hidden = classify === null;
    this.dialog.addEventListener("keydown", ({ key }) => {
      if (key === "ArrowLeft") this.go(-1);
      if (key === "ArrowRight") this.go(1);
    });
    closeOnBackdrop(this.dialog);
  }

  on(id, action) {
    byId(id).addEventListener("click", action);
  }

  /** Show a picture of a run. */
  open(run, picture) {
    Object.assign(this, { run, picture });
    const image = byId("picture-large");
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(picture.blob);
    image.alt = `Candidate ${picture.candidate} for “${run.request.caption}”`;
    const side = wholeSide(this.size, Math.min(innerWidth * 0.85, innerHeight * 0.6, 512));
    image.style.width = `${side}px`;
    image.classList.toggle("pixelated", isSmall(this.size));
    const { candidate, rank, clip_score, log_likelihood } = picture;
    byId("picture-title").textContent = rank === null ? `Candidate ${candidate}` : `Rank ${rank}`;
    byId("picture-caption").textContent = run.request.caption;
    const facts = { Candidate: candidate, Seed: run.request.seed };
    if (clip_score !== null) facts["CLIP score"] = withMinus(clip_score.toFixed(4));
    facts["Log-likelihood"] = `${withMinus(log_likelihood.toFixed(2))} nats`;
    byId("picture-facts").replaceChildren(...rows(facts));
    const place = run.pictures.indexOf(picture);
    byId("picture-before").disabled = place <= 0;
    byId("picture-after").disabled = place === run.pictures.length - 1;
    if (!this.dialog.open) this.dialog.showModal();
  }

  /** Show the picture so many ranks further on. */
  go(step) {
    const next = this.run.pictures[this.run.pictures.indexOf(this.picture) + step];
    if (next) this.open(this.run, next);
  }

  leave(action) {
    this.dialog.close();
    action();
  }
}

/** Fill in the dialog about the model, and let the button open it. */
export function describeModel(card) {
  const total = card.components.reduce((sum, each) => sum + each.parameters, 0);
  const pairs = Math.max(0, ...card.components.map((each) => each.pairs.train ?? 0));
  const words = [`${(total / 1e6).toPrecision(2)} million weights`];
  if (card.image_size) words.unshift(`${card.image_size} × ${card.image_size} pixels`);
  if (pairs) words.push(`trained on ${pairs.toLocaleString("en")} pairs`);
  byId("model").textContent = words.join(" · ");
  const made = card.git_revision ? `${card.library_version} ${card.git_revision}` : card.library_version;
  const whole = { Licence: card.licence || "not given", "Made by": `dalle-sagemaker ${made}` };
  byId("card").replaceChildren(
    make("dl", { className: "facts" }, ...rows(whole)),
    ...card.components.map(aboutComponent),
    make("h3", { textContent: "Sampling" }),
    make("p", {
      textContent: card.guidance
        ? "Captions were dropped in training, so a guidance scale above 1 may help."
        : "No captions were dropped in training: leave the guidance scale at 1.",
    }),
    make("dl", { className: "facts" }, ...rows(card.sampling_defaults)),
  );
  const button = byId("about-open");
  button.disabled = false;
  button.addEventListener("click", () => byId("about").showModal());
  closeOnBackdrop(byId("about"));
}

function aboutComponent(component) {
  const facts = { Weights: component.parameters.toLocaleString("en") };
  for (const [name, value] of Object.entries(component.sizes)) facts[spaced(name)] = value;
  if (component.steps !== null) {
    const end = component.is_finished ? "" : ", stopped before its end";
    facts.Training = `${component.steps.toLocaleString("en")} steps, ${component.minutes} minutes${end}`;
    facts.Finished = component.finished_at.replace("T", " ").replace("+00:00", " UTC");
  }
  for (const [channel, pairs] of Object.entries(component.pairs)) {
    facts[`Pairs, ${channel}`] = pairs.toLocaleString("en");
  }
  for (const [name, value] of Object.entries(component.metrics)) {
    facts[spaced(name)] = Number(value.toPrecision(4));
  }
  return make(
    "section",
    {},
    make("h3", { textContent: spaced(component.description) }),
    make("dl", { className: "facts" }, ...rows(facts)),
  );
}

const spaced = (name) => name.replaceAll("_", " ").replace(/^./, (each) => each.toUpperCase());

function rows(facts) {
  return Object.entries(facts).map(([name, value]) =>
    make("div", {}, make("dt", { textContent: spaced(name) }), make("dd", { textContent: value ?? "off" })),
  );
}

function closeOnBackdrop(dialog) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
}
