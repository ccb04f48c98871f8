// The service's API as this page uses it: relative addresses, so a prefix of a proxy is kept.

import { askKey, forgetKey, key } from "./key.js";

export class ApiError extends Error {
  constructor({ message, field, code }) {
    super(message);
    this.field = field;
    this.code = code;
  }
}

export async function modelCard() {
  return (await asked("v1/model")).json();
}

// Sends the picture; resolves to the classification, with a map where `saliency` is set.
export async function classify(picture, saliency, signal) {
  const headers = { "Content-Type": picture.type };
  const reply = await asked(`v1/classify${saliency ? "?saliency=1" : ""}`, { method: "POST", headers, body: picture, signal });
  return reply.json();
}

// Draws images. `on` is told of the events on the way, `image` once for each. Aborting the signal
// closes the connection, which stops the work in the service.
export async function generate(wanted, signal, on) {
  const headers = { "Content-Type": "application/json" };
  const body = JSON.stringify(wanted);
  const reply = await asked("v1/generate/stream", { method: "POST", headers, body, signal });
  let left = wanted.n;
  for await (const { name, data } of events(reply.body)) {
    if (name === "error") throw new ApiError(data.error);
    on[name]?.(data);
    if (name === "image") left -= 1;
    if (left === 0) return;
  }
  throw new ApiError({ message: "The connection ended before all was drawn. Try again." });
}

// The bytes of a file that came as base64 in JSON.
export function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

// A reply that is no refusal. Where the service wants a key, the user is asked for one.
async function asked(address, options = {}) {
  for (;;) {
    const held = key();
    const headers = { ...options.headers, ...(held ? { Authorization: `Bearer ${held}` } : {}) };
    const reply = await fetch(address, { ...options, headers });
    if (reply.ok) return reply;
    const error = await refusal(reply);
    if (reply.status !== 401) throw error;
    forgetKey();
    // No key is given: what the service said of it is the answer.
    if (!(await askKey(held ? error.message : ""))) throw error;
  }
}

async function refusal(reply) {
  let error = null;
  try {
    error = (await reply.json()).error;
  } catch {
    // Not one of our replies: a proxy answered.
  }
  return new ApiError(error?.message ? error : { message: `The service answered with status ${reply.status}.` });
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n");
      const of = (key) => lines.filter((line) => line.startsWith(key)).map((line) => line.slice(key.length)).join("\n");
      const name = of("event: ");
      if (name) yield { name, data: JSON.parse(of("data: ")) };
    }
  }
}
