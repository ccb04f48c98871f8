// First panel: describe a lesion, watch it being drawn, repeat or vary it.

import { ApiError, generate } from "./api.js";
import { byId, element } from "./dom.js";
import { buildAttributes, buildSizes, readLesion, tieSlider } from "./form.js";

// Field names of the API that differ from the ids of the form.
const FIELDS = { width: "side", height: "side", "lesion.diagnosis": "diagnosis" };

let running = null;
let shown = null;

// `assess` takes a picture to the second panel; null where there is no classifier.
export function startDrawing(card, assess) {
  const form = byId("draw-form");
  buildAttributes(byId("attributes"), card);
  buildSizes(byId("side"), card);
  setUpNumbers(card);
  byId("assess").hidden = assess === null;

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    draw(read(form, card));
  });
  for (const mode of form.elements.mode) mode.addEventListener("change", () => showMode(form));
  showMode(form);
  byId("draw-cancel").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", ({ key }) => { if (key === "Escape") running?.abort(); });
  byId("repeat").addEventListener("click", () => {
    byId("seed").value = shown.seed;
    draw(shown.wanted);
  });
  byId("new-seed").addEventListener("click", () => {
    byId("seed").value = "";
    draw({ ...shown.wanted, seed: null });
  });
  byId("assess").addEventListener("click", () => assess(shown.picture));
}

function setUpNumbers({ limits, defaults }) {
  for (const name of ["steps", "guidance"]) tieSlider(byId(`${name}-range`), byId(name));
  for (const input of [byId("steps"), byId("steps-range")]) {
    input.max = limits.max_steps;
    input.value = defaults.steps;
  }
  byId("guidance-field").hidden = defaults.guidance === null;
  for (const input of [byId("guidance"), byId("guidance-range")]) input.value = defaults.guidance ?? 0;
}

function showMode(form) {
  const text = form.elements.mode.value === "text";
  byId("attributes").hidden = text;
  byId("free-text").hidden = !text;
}

// What the form asks for. Numbers that are missing or wrong go out as they are: the service says
// what is wrong with them, in one place for all its callers.
function read(form, card) {
  const number = (id) => (byId(id).value.trim() === "" ? null : Number(byId(id).value));
  const side = Number(byId("side").value);
  return {
    ...(form.elements.mode.value === "text" ? { prompt: byId("prompt").value.trim().replace(/\s+/g, " ") } : { lesion: readLesion(form) }),
    seed: number("seed"),
    steps: number("steps"),
    guidance: card.defaults.guidance === null ? null : number("guidance"),
    width: side,
    height: side,
  };
}

async function draw(wanted) {
  if (running) return;
  running = new AbortController();
  showError(null);
  showRunning(true, "Waiting for the service");
  try {
    const image = await generate(wanted, running.signal, {
      queued: ({ ahead }) => showProgress(0, 1, ahead ? `Waiting: ${ahead} before this one` : "Starting"),
      progress: ({ step, steps }) => showProgress(step, steps, `Step ${step} of ${steps}`),
    });
    showImage(image, wanted);
    byId("draw-status").textContent = `The image is there. Seed ${image.seed}.`;
  } catch (error) {
    if (error.name === "AbortError") byId("draw-status").textContent = "Cancelled.";
    else showError(error);
  } finally {
    running = null;
    showRunning(false, "");
  }
}

function showRunning(on, text) {
  const stage = byId("drawing");
  stage.dataset.state = on ? "running" : shown ? "done" : "empty";
  stage.setAttribute("aria-busy", String(on));
  const cancelHadFocus = document.activeElement === byId("draw-cancel");
  // Not disabled: that would take the focus away from the button just pressed.
  for (const id of ["draw-start", "repeat", "new-seed"]) byId(id).setAttribute("aria-disabled", String(on));
  byId("progress").hidden = !on;
  if (cancelHadFocus && !on) byId("draw-start").focus();
  if (on) {
    showProgress(0, 1, text);
    byId("draw-status").textContent = "Generating.";
    byId("progress").scrollIntoView({ block: "nearest" });
  }
}

function showProgress(step, steps, text) {
  byId("progress-bar").max = steps;
  byId("progress-bar").value = step;
  byId("progress-text").textContent = text;
}

function showImage(image, wanted) {
  const bytes = Uint8Array.from(atob(image.file), (letter) => letter.charCodeAt(0));
  const picture = new Blob([bytes], { type: "image/png" });
  if (shown) URL.revokeObjectURL(shown.address);
  const address = URL.createObjectURL(picture);
  shown = { picture, address, seed: image.seed, wanted: { ...wanted, seed: image.seed } };

  const drawn = byId("drawn");
  drawn.src = address;
  drawn.alt = `Synthetic image: ${image.prompt}`;
  byId("download").href = address;
  byId("download").download = `dermaflux-${image.seed}.png`;
  byId("drawn-prompt").textContent = image.prompt;
  const cut = byId("drawn-cut");
  cut.hidden = image.prompt_tokens <= image.text_length;
  cut.textContent = `The description has ${image.prompt_tokens} tokens; the model read the first ${image.text_length}.`;
  const facts = {
    Seed: image.seed,
    Steps: image.steps,
    ...(image.guidance === null ? {} : { Guidance: image.guidance }),
    Size: `${image.width} × ${image.height}`,
    Engine: `${image.engine}, ${image.precision}`,
    Bundle: image.bundle,
  };
  byId("drawn-facts").replaceChildren(...Object.entries(facts).map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
  for (const id of ["drawn", "synthetic", "drawn-caption"]) byId(id).hidden = false;
}

function showError(error) {
  for (const marked of document.querySelectorAll("#draw-form [aria-invalid]")) marked.removeAttribute("aria-invalid");
  const place = byId("draw-error");
  place.hidden = !error;
  if (!error) return;
  place.textContent = error instanceof ApiError ? error.message : "The service cannot be reached. Is it running?";
  const input = byId(FIELDS[error.field] ?? error.field ?? "");
  if (input) {
    input.setAttribute("aria-invalid", "true");
    input.focus();
  }
}
