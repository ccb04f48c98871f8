// First panel: describe a lesion, watch it being drawn, repeat or vary it.

import { ApiError, bytes, generate } from "./api.js";
import { byId } from "./dom.js";
import { buildAttributes, buildCount, buildSizes, readLesion, tieSlider } from "./form.js";
import { Gallery } from "./gallery.js";

// Field names of the API that differ from the ids of the form.
const FIELDS = { width: "side", height: "side", n: "count", "lesion.diagnosis": "diagnosis" };
// Unfinished pictures on the way: enough to see it come, few enough not to hold it up.
const PREVIEWS = 4;

let running = null;
let shown = null;
let gallery = null;

// `assess` takes a picture to the second panel; null where there is no classifier.
export function startDrawing(card, assess) {
  const form = byId("draw-form");
  gallery = new Gallery();
  buildAttributes(byId("attributes"), card);
  buildSizes(byId("side"), card);
  buildCount(byId("count"), card);
  setUpNumbers(card);
  byId("assess").hidden = assess === null;
  byId("mode").hidden = !card.roles.includes("free-text");

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    draw(read(form, card));
  });
  for (const mode of form.elements.mode) mode.addEventListener("change", () => showMode(form));
  showMode(form);
  byId("draw-stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", ({ key }) => { if (key === "Escape") running?.abort(); });
  byId("repeat").addEventListener("click", () => {
    byId("seed").value = gallery.chosen.seed;
    byId("count").value = 1;
    draw({ ...shown, seed: gallery.chosen.seed, n: 1 });
  });
  byId("new-seed").addEventListener("click", () => {
    byId("seed").value = "";
    draw({ ...shown, seed: null });
  });
  byId("assess").addEventListener("click", () => assess(gallery.chosen.picture));
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
    n: Number(byId("count").value),
    previews: Math.min(PREVIEWS, card.limits.max_previews),
  };
}

async function draw(wanted) {
  if (running) return;
  running = new AbortController();
  showError(null);
  showRunning(true, "Waiting for the service");
  gallery.begin(wanted.n);
  const steps = Array(wanted.n).fill(0);
  const place = ({ ahead }) => showProgress(0, 1, ahead ? `Waiting: ${ahead} before ${wanted.n > 1 ? "these" : "this one"}` : "Starting");
  const images = [];
  try {
    await generate(wanted, running.signal, {
      queued: place,
      position: (data) => { if (!steps.some(Boolean)) place(data); },
      progress: ({ image, step, steps: all, preview }) => {
        steps[image] = step;
        const done = steps.reduce((sum, one) => sum + one, 0);
        showProgress(done, all * wanted.n, `Step ${done} of ${all * wanted.n}`);
        if (preview) gallery.preview(image, new Blob([bytes(preview)], { type: "image/jpeg" }));
      },
      image: (image) => {
        images.push({ ...image, picture: new Blob([bytes(image.file)], { type: `image/${image.format}` }) });
      },
    });
    shown = wanted;
    // Each came as soon as it was done.
    images.sort((one, other) => one.image - other.image);
    gallery.show(images);
    const seeds = images.map(({ seed }) => seed);
    byId("draw-status").textContent = images.length === 1
      ? `The image is there. Seed ${seeds[0]}.`
      : `${images.length} images are there. Seeds ${seeds.join(", ")}.`;
  } catch (error) {
    if (error.name === "AbortError") byId("draw-status").textContent = "Stopped.";
    else showError(error);
  } finally {
    gallery.end();
    running = null;
    showRunning(false, "");
  }
}

function showRunning(on, text) {
  const stage = byId("drawing");
  stage.dataset.state = on ? "running" : shown ? "done" : "empty";
  stage.setAttribute("aria-busy", String(on));
  const stopHadFocus = document.activeElement === byId("draw-stop");
  // Not disabled: that would take the focus away from the button just pressed.
  for (const id of ["draw-start", "repeat", "new-seed"]) byId(id).setAttribute("aria-disabled", String(on));
  byId("progress").hidden = !on;
  if (stopHadFocus && !on) byId("draw-start").focus();
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
