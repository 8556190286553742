// Files for the user: one picture as PNG, or all of a run as a ZIP archive without compression.

import { toBytes } from "./api.js";
import { make } from "./dom.js";
import { withoutPreviews } from "./history.js";

const encoder = new TextEncoder();

/** Offer a file for download. */
export function save(name, blob) {
  const address = URL.createObjectURL(blob);
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** Return a file name for a picture of a run. */
export function nameOf({ request }, { candidate, rank }) {
  const words = request.caption.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "_").slice(0, 60);
  const place = rank === null ? "" : `.rank${rank}`;
  return `${words}.seed${request.seed}${place}.candidate${candidate}.png`;
}

/** Offer all pictures of a run, with the request and the scores. */
export function saveAll(run) {
  const files = run.pictures.map((picture) => [nameOf(run, picture), toBytes(picture.file)]);
  const facts = {
    request: withoutPreviews(run.request),
    prime: run.prime,
    pictures: run.pictures.map(({ candidate, rank, clip_score, log_likelihood }) => ({
      file: nameOf(run, { candidate, rank }), candidate, rank, clip_score, log_likelihood,
    })),
  };
  files.push(["pictures.json", encoder.encode(JSON.stringify(facts, null, 1))]);
  save(nameOf(run, { candidate: "s", rank: null }).replace(".candidates.png", ".zip"), zip(files));
}

const CRC = Uint32Array.from({ length: 256 }, (_, value) => {
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

function crc32(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) value = CRC[(value ^ byte) & 255] ^ (value >>> 8);
  return ~value >>> 0;
}

/** Return a ZIP archive of [name, bytes] pairs, stored as they are (APPNOTE 4.3). */
export function zip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const [name, bytes] of files) {
    const title = encoder.encode(name);
    // version, flags (names are UTF-8), method 0, time, date (1 January 1980), crc, sizes, lengths
    const common = [[20, 2], [0x800, 2], [0, 2], [0, 2], [0x21, 2], [crc32(bytes), 4],
      [bytes.length, 4], [bytes.length, 4], [title.length, 2], [0, 2]];
    const header = pack([[0x04034b50, 4], ...common]);
    parts.push(header, title, bytes);
    directory.push(
      pack([[0x02014b50, 4], [20, 2], ...common, [0, 2], [0, 2], [0, 2], [0, 4], [offset, 4]]),
      title,
    );
    offset += header.length + title.length + bytes.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const count = [[files.length, 2], [files.length, 2]];
  const end = pack([[0x06054b50, 4], [0, 2], [0, 2], ...count, [size, 4], [offset, 4], [0, 2]]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

/** Return numbers of so many bytes each, the lowest byte first. */
function pack(fields) {
  return Uint8Array.from(
    fields.flatMap(([value, bytes]) =>
      Array.from({ length: bytes }, (_, place) => (value >>> (8 * place)) & 255),
    ),
  );
}
