// The runs of this session, and the address of each: a link that gives the same pictures again.

import { byId, make } from "./dom.js";

const KEPT = "runs"; // in the session's storage: addresses, captions and small pictures
const MOST = 24;

/** Return what of a request decides its pictures. */
export const withoutPreviews = ({ preview_rows, ...request }) => request;

/** Return the fragment of a run's address. It stays in the browser: a server never sees it. */
export function toFragment({ request, prime }) {
  const fields = new URLSearchParams();
  for (const [name, value] of Object.entries(withoutPreviews(request))) fields.set(name, value ?? "");
  if (prime) fields.set("prime", JSON.stringify(prime));
  return `#${fields}`;
}

/** Return the request and the prime of an address; null for one that names no pictures. */
export function fromFragment(fragment) {
  const { caption, prime, ...numbers } = Object.fromEntries(new URLSearchParams(fragment.slice(1)));
  if (!caption || numbers.seed === undefined) return null;
  const request = { caption };
  for (const [name, text] of Object.entries(numbers)) request[name] = text === "" ? null : Number(text);
  try {
    return { request, prime: prime ? JSON.parse(prime) : null };
  } catch {
    return null;
  }
}

export class History {
  constructor() {
    this.pictures = new Map(); // fragment -> run, with its pictures
    this.kept = read();
    this.render();
  }

  /** Add a finished run. */
  add(run) {
    const fragment = toFragment(run);
    const { file } = run.pictures[0];
    this.pictures.delete(fragment);
    this.pictures.set(fragment, run);
    if (this.pictures.size > MOST) this.pictures.delete(this.pictures.keys().next().value);
    const { caption, seed } = run.request;
    const others = this.kept.filter((each) => each.fragment !== fragment);
    this.kept = [{ fragment, caption, seed, file }, ...others].slice(0, MOST);
    try {
      sessionStorage.setItem(KEPT, JSON.stringify(this.kept));
    } catch {
      // The storage is full: this page still has them.
    }
    this.render();
  }

  /** Return a run of this page by its address; undefined for others. */
  find(fragment) {
    return this.pictures.get(fragment);
  }

  render() {
    byId("history").hidden = this.kept.length === 0;
    byId("runs").replaceChildren(
      ...this.kept.map(({ fragment, caption, seed, file }) =>
        make(
          "li",
          {},
          make(
            "a",
            { href: fragment },
            make("img", { src: `data:image/png;base64,${file}`, alt: "" }),
            make("span", { className: "name", textContent: caption }),
            make("span", { className: "hint", textContent: `seed ${seed}` }),
          ),
        ),
      ),
    );
  }
}

function read() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT)) ?? [];
  } catch {
    return [];
  }
}
