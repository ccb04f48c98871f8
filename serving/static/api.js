// The service's API as this page uses it: relative addresses, so a prefix of a proxy is kept.

export class ApiError extends Error {
  constructor({ message, field, code }) {
    super(message);
    this.field = field;
    this.code = code;
  }
}

export async function modelCard() {
  return (await checked(await fetch("v1/model"))).json();
}

// Sends the picture; resolves to the classification.
export async function classify(picture, signal) {
  const headers = { "Content-Type": picture.type };
  const reply = await fetch("v1/classify", { method: "POST", headers, body: picture, signal });
  return (await checked(reply)).json();
}

// Draws one image. `on.queued` and `on.progress` are told on the way; resolves to the event
// `image`. Aborting the signal closes the connection, which stops the work in the service.
export async function generate(wanted, signal, on) {
  const headers = { "Content-Type": "application/json" };
  const body = JSON.stringify(wanted);
  const reply = await fetch("v1/generate/stream", { method: "POST", headers, body, signal });
  await checked(reply);
  for await (const { name, data } of events(reply.body)) {
    if (name === "image") return data;
    if (name === "error") throw new ApiError(data.error);
    on[name]?.(data);
  }
  throw new ApiError({ message: "The connection ended before the image was there. Try again." });
}

async function checked(reply) {
  if (reply.ok) return reply;
  let error = null;
  try {
    error = (await reply.json()).error;
  } catch {
    // Not one of our replies: a proxy answered.
  }
  throw new ApiError(error?.message ? error : { message: `The service answered with status ${reply.status}.` });
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
