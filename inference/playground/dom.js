// Short names for what every module does with the document, and numbers as people read them.

export const byId = (id) => document.getElementById(id);

/** Return an element. properties: of the element, or attributes where it has no such property. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export const calm = matchMedia("(prefers-reduced-motion: reduce)");

/** Show an error at its field, or clear it with an empty message. */
export function showFieldError(input, message) {
  const place = byId(`${input.id}-error`);
  place.textContent = message;
  if (message) input.setAttribute("aria-invalid", "true");
  else input.removeAttribute("aria-invalid");
}

/** Return the side in CSS pixels at which `size` pixels are a whole number of screen pixels each.
 *  About `target`, at least once their own size. */
export function wholeSide(size, target) {
  const ratio = devicePixelRatio || 1;
  return (Math.max(1, Math.floor((target * ratio) / size)) * size) / ratio;
}

/** Scale small pictures without smoothing. */
export const isSmall = (size) => size <= 128;

export const seconds = (value) => `${value < 10 ? value.toFixed(2) : value.toFixed(1)} s`;

export const counted = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/** Return the text of a number with a minus sign, and none before a zero. */
export const withMinus = (text) => (Number(text) === 0 ? text.replace("-", "") : text.replace("-", "\u2212"));
