// The page: a caption and settings become a run, whose candidates stream into the grid.

import { bodyOf, get, pictureOf, stream } from "./api.js";
import { Caption } from "./caption.js";
import { Classify } from "./classify.js";
import { PictureDialog, describeModel } from "./dialogs.js";
import { byId, counted, isSmall, make, seconds, showFieldError, wholeSide } from "./dom.js";
import { saveAll } from "./download.js";
import { Grid } from "./grid.js";
import { History, fromFragment, toFragment, withoutPreviews } from "./history.js";
import { Settings } from "./settings.js";

const STAGES = ["queue", "sample", "decode", "rank", "encode"];

class Page {
  constructor(card, schema) {
    this.card = card;
    this.run = null; // whose pictures are shown
    this.prime = null; // what the next run begins with: {candidate, rows, of}, and its file
    this.controller = null; // of the run that is on its way
    const preview_rows = Math.max(1, Math.round(card.grid_size / 4));
    this.settings = new Settings(schema, { preview_rows });
    this.caption = new Caption(card.captions, {
      mayAsk: () => this.controller === null,
      onExample: () => this.submit(),
    });
    this.history = new History();
    this.grid = new Grid(card, (picture) => this.dialog.open(this.run, picture));
    const names = card.components.map((each) => each.name);
    this.classify = names.includes("clip") ? new Classify(card.captions, (error) => this.refuse(error)) : null;
    this.dialog = new PictureDialog(card.image_size, {
      prime: (run, picture) => this.beginWith(run, picture),
      classify: this.classify && ((run, picture) => this.classifyPicture(run, picture)),
    });
    this.listen();
    byId("generate").disabled = false;
    byId("empty").textContent = "Type a caption, or take one of the examples.";
    this.follow();
  }

  listen() {
    byId("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    byId("cancel").addEventListener("click", () => this.cancel());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.cancel();
    });
    addEventListener("popstate", () => this.follow());
    byId("zip").addEventListener("click", () => saveAll(this.run));
    byId("copy").addEventListener("click", () => this.copyLink());
    byId("prime-remove").addEventListener("click", () => this.setPrime(null));
    byId("prime_rows").addEventListener("input", () => this.showPrimeRows());
  }

  /** Generate what the form says. */
  submit() {
    this.caption.close();
    const values = this.settings.read();
    if (values === null) return;
    const request = { caption: this.caption.value, ...values };
    const prime = this.prime && { ...this.prime.origin, rows: Number(byId("prime_rows").value) };
    const run = { request, prime, pictures: [], ranking: null };
    const fragment = toFragment(run);
    if (fragment !== location.hash) history.pushState(null, "", fragment);
    this.start(run, this.prime?.file);
  }

  /** Show the pictures that the address names: from this session, or generated again. */
  follow() {
    const named = fromFragment(location.hash);
    if (named === null) return;
    this.caption.value = named.request.caption;
    this.settings.fill(named.request);
    const known = this.history.find(location.hash);
    if (known) {
      this.cancel();
      this.setPrime(known.prime && { origin: known.prime, file: known.primeFile });
      this.show(known);
      return;
    }
    if (!named.prime) this.setPrime(null);
    const preview_rows = this.settings.read()?.preview_rows;
    const request = preview_rows ? { ...named.request, preview_rows } : named.request;
    this.start({ ...named, request, pictures: [], ranking: null });
  }

  /** Run a request to its end. primeFile: base64; generated first where it is not at hand. */
  async start(run, primeFile) {
    this.cancel();
    const controller = (this.controller = new AbortController());
    const isNewest = () => this.controller === controller;
    this.refuse(null);
    this.setBusy(true);
    const began = performance.now();
    const { caption, num_candidates } = run.request;
    try {
      run.primeFile = run.prime ? (primeFile ?? (await pictureOf(run.prime, controller.signal))) : null;
      if (run.prime && isNewest()) this.setPrime({ origin: run.prime, file: run.primeFile });
      for await (const line of stream(bodyOf(run), controller.signal)) {
        if (!isNewest()) return;
        if (this.run !== run) {
          this.run = run;
          this.clear(num_candidates, caption);
        }
        if (line.event === "ranking") run.ranking = line;
        else if (line.event === "candidate") {
          run.firstSeconds ??= (performance.now() - began) / 1000;
          run.pictures.push(this.grid.finish(line));
        } else this.grid.preview(line);
        this.showProgress(run.pictures.length, num_candidates);
      }
      run.seconds = (performance.now() - began) / 1000;
      this.finish(run, { moving: true });
      this.history.add(run);
    } catch (error) {
      if (!isNewest()) return;
      if (this.run === run) this.grid.keepFinished();
      if (error.name === "AbortError") this.say(`Cancelled after ${run.pictures.length} of ${num_candidates}`);
      else this.refuse(error);
    } finally {
      if (isNewest()) {
        this.controller = null;
        this.setBusy(false);
      }
    }
  }

  cancel() {
    this.controller?.abort();
  }

  /** Show a run that has its pictures. */
  show(run) {
    this.run = run;
    this.refuse(null);
    this.clear(run.request.num_candidates, run.request.caption);
    for (const picture of [...run.pictures]) {
      Object.assign(picture, this.grid.finish({ ...picture, image: picture.file }));
      this.grid.tiles[picture.candidate].button.onclick = () => this.dialog.open(run, picture);
      this.grid.tiles[picture.candidate].picture = picture;
    }
    this.finish(run, { moving: false });
  }

  clear(number, caption) {
    byId("empty").hidden = true;
    byId("grid").classList.remove("waiting");
    byId("actions").hidden = true;
    byId("timings").hidden = true;
    byId("warnings").hidden = true;
    this.grid.begin(number, caption);
    this.showProgress(0, number);
  }

  finish(run, { moving }) {
    const { ranking, ranked_by, completed_candidates, timings, warnings } = run.ranking;
    this.grid.rank(ranking, { moving });
    run.pictures.sort((one, other) => one.rank - other.rank);
    const by = { clip: "CLIP", log_likelihood: "log-likelihood" }[ranked_by] ?? "CLIP and log-likelihood";
    const late = completed_candidates < run.request.num_candidates ? ", as many as the deadline allowed" : "";
    this.say(`${counted(completed_candidates, "picture")}${late}, the best first by ${by}`);
    byId("actions").hidden = false;
    showTimings(timings, run);
    showWarnings(warnings);
  }

  showProgress(done, all) {
    byId("progress").value = this.grid.share();
    byId("count").textContent = `${done} of ${all}`;
  }

  say(words) {
    byId("count").textContent = words;
    byId("status").textContent = words;
  }

  setBusy(isBusy) {
    const [from, to] = isBusy ? ["generate", "cancel"] : ["cancel", "generate"];
    const hadFocus = document.activeElement === byId(from);
    byId(from).hidden = true;
    byId(to).hidden = false;
    if (hadFocus) byId(to).focus();
    byId("progress").hidden = !isBusy;
    byId("progress").value = 0;
    byId("grid").classList.toggle("waiting", isBusy);
    if (isBusy) this.say("Generating …");
  }

  /** Show an error at the field that it names, or above the pictures; null clears all. */
  refuse(error) {
    const place = byId("alert");
    place.hidden = true;
    if (error === null) return;
    this.say("");
    if (error.field === "caption") {
      this.caption.refuse(error.message);
      byId("caption").focus();
    } else if (error.field?.startsWith("prime") && this.prime) {
      showFieldError(byId("prime_rows"), error.message);
    } else if (!this.settings.refuse(error.field, error.message)) {
      place.textContent = error.message;
      place.hidden = false;
    }
  }

  /** Let the next run keep the top rows of a picture. */
  beginWith(run, picture) {
    const of = { request: withoutPreviews(run.request), prime: run.prime };
    this.setPrime({ origin: { candidate: picture.candidate, rows: this.card.grid_size >> 1, of }, file: picture.file });
    this.settings.newSeed.checked = true;
    byId("prime").scrollIntoView({ block: "nearest" });
    this.submit();
  }

  /** prime: its origin ({candidate, rows, of}) and its file, or null. */
  setPrime(prime) {
    this.prime = prime;
    byId("prime").hidden = prime === null;
    if (prime === null) return;
    const slider = byId("prime_rows");
    showFieldError(slider, "");
    slider.max = this.card.grid_size - 1;
    slider.value = prime.origin.rows;
    const image = byId("prime-picture");
    image.src = `data:image/png;base64,${prime.file}`;
    image.style.width = `${wholeSide(this.card.image_size, 96)}px`;
    image.classList.toggle("pixelated", isSmall(this.card.image_size));
    this.showPrimeRows();
  }

  showPrimeRows() {
    const rows = Number(byId("prime_rows").value);
    byId("prime-line").style.top = `${(100 * rows) / this.card.grid_size}%`;
    byId("prime-rows-words").textContent = `${rows} of ${this.card.grid_size}`;
  }

  classifyPicture(run, picture) {
    byId("classify").open = true;
    byId("classify").scrollIntoView({ block: "nearest" });
    byId("classes").focus();
    this.classify.take(picture.blob, run.request.caption);
  }

  async copyLink() {
    try {
      await navigator.clipboard.writeText(location.href);
      this.say("The link is copied: it gives the same pictures again");
    } catch {
      this.say("The link is this page's address: it gives the same pictures again");
    }
  }
}

/** Show what the model could not read of a caption. */
function showWarnings(warnings) {
  byId("warnings").replaceChildren(...warnings.map((textContent) => make("li", { textContent })));
  byId("warnings").hidden = warnings.length === 0;
}

function showTimings(timings, run) {
  const times = STAGES.map((stage) => [stage, timings[`${stage}_seconds`]]);
  const total = times.reduce((sum, [, time]) => sum + time, 0);
  const bar = make("div", { className: "stack", "aria-hidden": "true" });
  const list = make("dl", {});
  for (const [stage, time] of times) {
    const part = make("span", { className: stage });
    part.style.width = `${(100 * time) / total}%`;
    bar.append(part);
    list.append(make("div", { className: stage }, make("dt", { textContent: stage }), make("dd", { textContent: seconds(time) })));
  }
  const first = `first picture after ${seconds(run.firstSeconds)}, all after ${seconds(run.seconds)}`;
  byId("timings").replaceChildren(bar, list, make("p", { className: "hint", textContent: first }));
  byId("timings").hidden = false;
}

async function open() {
  byId("settings").open = matchMedia("(min-width: 56rem)").matches;
  try {
    const card = await get("/playground/model.json");
    describeModel(card);
    const document = await get("/openapi.json");
    if (card.image_size === null) {
      byId("empty").textContent = "This model generates no pictures: it has no dVAE or no transformer.";
      if (card.components.some((each) => each.name === "clip")) new Classify(card.captions, console.error);
      return;
    }
    new Page(card, document.components.schemas.GenerateRequest);
  } catch (error) {
    byId("empty").hidden = true;
    byId("alert").textContent = error.message;
    byId("alert").hidden = false;
  }
}

open();
