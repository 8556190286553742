// The candidates of one run: places that fill, pictures that sharpen, then the ranked order.

import { toBytes } from "./api.js";
import { byId, calm, isSmall, make, wholeSide, withMinus } from "./dom.js";

const MOVE_MILLISECONDS = 700;
const GAP = 11; // pixels between pictures, at least

export class Grid {
  /** card: the model's, with the sizes of pictures. onOpen: called with a finished picture. */
  constructor(card, onOpen) {
    this.card = card;
    this.onOpen = onOpen;
    this.list = byId("grid");
    this.tiles = [];
    new ResizeObserver(() => this.fit()).observe(this.list);
  }

  /** Choose how large pictures are, by whole factors. */
  fit() {
    const size = this.card.image_size;
    const width = this.list.clientWidth;
    const columns = Math.max(isSmall(size) ? 3 : 2, Math.floor(width / (isSmall(size) ? 140 : 270)));
    const side = Math.min(wholeSide(size, (width - GAP * (columns - 1)) / columns), width);
    this.list.style.setProperty("--side", `${side}px`);
    this.list.classList.toggle("pixelated", isSmall(size));
  }

  /** Show a place for each candidate. */
  begin(number, caption) {
    this.caption = caption;
    for (const tile of this.tiles) URL.revokeObjectURL(tile.image.src);
    this.tiles = Array.from({ length: number }, (_, candidate) => makeTile(candidate));
    this.list.replaceChildren(...this.tiles.map((tile) => tile.item));
    this.list.classList.remove("ranked");
    this.fit();
  }

  /** Show an unfinished picture. */
  preview({ candidate, rows, image }) {
    const tile = this.tiles[candidate];
    setPicture(tile, image);
    tile.image.alt = `Candidate ${candidate}, unfinished`;
    tile.item.classList.add("unfinished");
    tile.share = rows / this.card.grid_size;
    tile.rows.style.width = `${100 * tile.share}%`;
  }

  /** Show a finished picture; return it. */
  finish(line) {
    const tile = this.tiles[line.candidate];
    const { candidate, clip_score, log_likelihood } = line;
    const blob = setPicture(tile, line.image);
    const picture = { candidate, clip_score, log_likelihood, rank: null, file: line.image, blob };
    tile.picture = picture;
    tile.share = 1;
    tile.image.alt = `Candidate ${candidate} for “${this.caption}”`;
    tile.item.classList.remove("unfinished");
    tile.item.classList.add("finished");
    tile.rows.style.width = "";
    tile.score.textContent = scoreOf(picture);
    tile.button.disabled = false;
    tile.button.onclick = () => this.onOpen(picture);
    return picture;
  }

  /** Return how much of all pictures there is, 0 to 1. */
  share() {
    return this.tiles.reduce((sum, tile) => sum + tile.share, 0) / this.tiles.length;
  }

  /** Put the finished pictures in order; places that nothing came to are removed. */
  rank(ranking, { moving }) {
    const before = new Map(this.tiles.map((tile) => [tile, tile.item.getBoundingClientRect()]));
    const focused = document.activeElement;
    const ordered = ranking.map(({ candidate, rank }) => {
      const tile = this.tiles[candidate];
      tile.picture.rank = rank;
      tile.badge.textContent = rank;
      tile.image.alt = `Rank ${rank} for “${this.caption}”, ${scoreOf(tile.picture)}`;
      tile.item.classList.toggle("best", rank === 1);
      return tile;
    });
    this.list.classList.add("ranked");
    this.list.replaceChildren(...ordered.map((tile) => tile.item));
    if (this.list.contains(focused)) focused.focus({ preventScroll: true });
    if (!moving || calm.matches) return;
    for (const tile of ordered) {
      const from = before.get(tile);
      const to = tile.item.getBoundingClientRect();
      const scale = from.width / to.width;
      const start = `translate(${from.left - to.left}px, ${from.top - to.top}px) scale(${scale})`;
      tile.item.animate([{ transform: start, transformOrigin: "0 0" }, { transform: "none", transformOrigin: "0 0" }], {
        duration: MOVE_MILLISECONDS,
        easing: "cubic-bezier(0.2, 0.8, 0.2, 1)",
      });
    }
  }

  /** Keep the finished pictures only, of a run that ended early. */
  keepFinished() {
    for (const tile of this.tiles) if (!tile.picture) tile.item.remove();
  }
}

function makeTile(candidate) {
  const image = make("img", { alt: "", hidden: true });
  const rows = make("span", { className: "rows" });
  const button = make("button", { type: "button", className: "picture", disabled: true }, image, rows);
  const badge = make("span", { className: "badge", textContent: "" });
  const score = make("span", { className: "score", textContent: "" });
  const words = make("div", { className: "meta" }, badge, score);
  const item = make("li", { className: "tile" }, button, words);
  item.dataset.candidate = candidate;
  return { item, button, image, rows, badge, score, picture: null, share: 0 };
}

function setPicture(tile, base64) {
  URL.revokeObjectURL(tile.image.src);
  const blob = new Blob([toBytes(base64)], { type: "image/png" });
  tile.image.src = URL.createObjectURL(blob);
  tile.image.hidden = false;
  return blob;
}

/** Return a picture's score, as text. */
export function scoreOf({ clip_score, log_likelihood }) {
  if (clip_score === null) return `log p ${withMinus(log_likelihood.toFixed(1))}`;
  return `CLIP ${withMinus(clip_score.toFixed(3))}`;
}
