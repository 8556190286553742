// The server's routes: requests, streams of JSON lines, and errors with the field that they name.
//
// A run has a request, and where its pictures continue another a prime: {candidate, rows, of}, with
// the run that it is of. That picture's file is primeFile.

/** An error of the server. field: of the request, or null. */
export class Refusal extends Error {
  constructor({ code, message, field }, status = 0) {
    super(message);
    Object.assign(this, { code, field, status });
  }
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function refusalOf(response) {
  try {
    return new Refusal((await response.json()).error, response.status);
  } catch {
    const message = `the server answered ${response.status} ${response.statusText}`;
    return new Refusal({ code: "unreadable", message, field: null }, response.status);
  }
}

async function send(address, options) {
  try {
    return await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const message = "the server cannot be reached; is it still running?";
    throw new Refusal({ code: "unreachable", message, field: null });
  }
}

async function post(body, accept, signal) {
  const headers = { "Content-Type": "application/json", Accept: accept };
  const request = { method: "POST", headers, body: JSON.stringify(body), signal };
  const response = await send("/invocations", request);
  if (!response.ok) throw await refusalOf(response);
  return response;
}

/** Return the JSON of a route. While the model is loading, wait and ask again. */
export async function get(address, onLoading = () => {}) {
  for (;;) {
    const response = await send(address);
    if (response.ok) return response.json();
    const refusal = await refusalOf(response);
    if (refusal.code !== "engine_loading") throw refusal;
    onLoading();
    await pause(1000);
  }
}

/** Return the reply to a request. */
export async function ask(body, signal) {
  return (await post(body, "application/json", signal)).json();
}

/** Yield the lines of a streamed reply; closing it early, or the signal, cancels the request. */
export async function* stream(body, signal) {
  const response = await post(body, "application/jsonlines", signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const event = JSON.parse(line);
        if (event.event === "error") throw new Refusal(event.error);
        yield event;
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/** Return the body of a run's request. */
export function bodyOf({ request, prime, primeFile }) {
  return prime ? { ...request, prime_image: primeFile, prime_rows: prime.rows } : request;
}

/** Return the file of a picture that another begins with: candidate k of a seed is always the same. */
export async function pictureOf({ candidate, of }, signal) {
  const primeFile = of.prime ? await pictureOf(of.prime, signal) : null;
  const request = { ...of.request, num_candidates: candidate + 1 };
  for await (const line of stream(bodyOf({ ...of, request, primeFile }), signal)) {
    if (line.event === "candidate" && line.candidate === candidate) return line.image;
  }
  throw new Error("the picture to begin with was not finished before the deadline");
}

export const toBytes = (base64) => Uint8Array.from(atob(base64), (each) => each.charCodeAt(0));

/** Return the base64 form of a file. */
export async function toBase64(blob) {
  const address = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
  return address.slice(address.indexOf(",") + 1);
}
