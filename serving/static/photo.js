// Second panel: a photograph in; probability, threshold, abstention band and decision out.

import { ApiError, bytes, classify } from "./api.js";
import { byId, element } from "./dom.js";

const WORDS = { benign: "Benign", malignant: "Malignant", abstain: "No decision" };

let asked = null;
let address = null;
let largest = Infinity;
let current = null;

// Returns the function that classifies a picture which the page drew itself.
export function startPhoto(card) {
  largest = card.limits.max_upload_bytes;
  const drop = byId("drop");
  byId("photo").addEventListener("change", ({ target }) => {
    take(target.files[0]);
    // Else the same file chosen again would not be a change.
    target.value = "";
  });
  byId("clear").addEventListener("click", clear);
  byId("saliency").addEventListener("change", () => {
    if (current) take(current.picture, current.synthetic);
  });
  document.addEventListener("paste", (event) => {
    const picture = [...event.clipboardData.files].find((file) => file.type.startsWith("image/"));
    if (picture) take(picture);
  });
  for (const name of ["dragenter", "dragover"]) {
    drop.addEventListener(name, (event) => { event.preventDefault(); drop.dataset.over = "true"; });
  }
  drop.addEventListener("dragleave", () => { drop.dataset.over = "false"; });
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.dataset.over = "false";
    take(event.dataTransfer.files[0]);
  });
  return (picture) => {
    take(picture, true);
    byId("classify").scrollIntoView();
    byId("classify").focus({ preventScroll: true });
  };
}

async function take(picture, synthetic = false) {
  if (!picture) return;
  clear();
  current = { picture, synthetic };
  asked = new AbortController();
  const { signal } = asked;
  address = URL.createObjectURL(picture);
  byId("preview").src = address;
  byId("preview").hidden = false;
  byId("preview-synthetic").hidden = !synthetic;
  byId("drop-text").hidden = true;
  byId("drop").dataset.full = "true";
  byId("clear").hidden = false;
  byId("answer-empty").textContent = "Reading the picture";
  byId("classify-status").textContent = "Reading the picture.";
  try {
    if (picture.size > largest) {
      throw new ApiError({ message: `The file has ${picture.size} bytes; the service takes ${largest}.` });
    }
    const answer = await classify(picture, byId("saliency").checked, signal);
    show(answer);
    await showMap(answer.saliency);
  } catch (error) {
    if (error.name === "AbortError") return;
    byId("answer-empty").textContent = "There is no answer for this file.";
    byId("classify-status").textContent = "";
    byId("classify-error").textContent =
      error instanceof ApiError ? error.message : "The service cannot be reached. Is it running?";
    byId("classify-error").hidden = false;
  }
}

function show({ probability, threshold, abstain: [low, high], decision, accepted, reasons, bundle }) {
  const answer = byId("answer");
  answer.dataset.state = "full";
  answer.dataset.decision = decision;
  const p = probability === null ? "" : probability > 0.9995 ? "above 0.999" : probability < 0.0005 ? "below 0.001" : probability.toFixed(3);
  const because = {
    benign: `The calibrated probability of malignant is ${p}, below the threshold of ${threshold}.`,
    malignant: `The calibrated probability of malignant is ${p}, at or above the threshold of ${threshold}.`,
    abstain: `The calibrated probability of malignant is ${p}, too close to the threshold of ${threshold} to decide.`,
  }[decision];
  byId("decision").textContent = WORDS[decision];
  byId("because").textContent = accepted ? because : "This picture cannot be judged.";
  // A probability of what is no picture of a lesion would be read as one all the same.
  byId("scale").hidden = byId("legend").hidden = !accepted;
  byId("reasons").hidden = accepted;
  byId("reasons").replaceChildren(...reasons.map(({ text }) => element("li", { textContent: text })));
  const scale = byId("scale");
  for (const [name, value] of Object.entries({ probability: probability ?? 0, threshold, low, high })) {
    scale.style.setProperty(`--${name}`, value);
  }
  const banded = high > low;
  byId("band").hidden = byId("legend-band-item").hidden = !banded;
  byId("legend-probability").textContent = `Probability ${p}`;
  byId("legend-threshold").textContent = `Threshold ${threshold}`;
  byId("legend-band").textContent = `No decision from ${low} to ${high}`;
  scale.setAttribute("aria-label", `Scale from 0, benign, to 1, malignant. Probability ${p}. Threshold ${threshold}.`
    + (banded ? ` No decision from ${low} to ${high}.` : ""));
  byId("answer-bundle").textContent = bundle;
  byId("answer-empty").hidden = true;
  byId("answer-full").hidden = false;
  const spoken = accepted ? because : reasons.map(({ text }) => text).join(" ");
  byId("classify-status").textContent = `Decision: ${WORDS[decision]}. ${spoken}`;
}

// Where the model looked, as a layer over the picture: the map's grey becomes strength of colour,
// from the least looked at to the most, for attention leaves no part quite alone.
async function showMap(file) {
  const canvas = byId("saliency-map");
  canvas.hidden = !file;
  if (!file) return;
  const { signal } = asked;
  const map = await createImageBitmap(new Blob([bytes(file)], { type: "image/png" }));
  if (signal.aborted) return;
  canvas.width = map.width;
  canvas.height = map.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(map, 0, 0);
  const layer = context.getImageData(0, 0, map.width, map.height);
  let [least, most] = [255, 0];
  for (let place = 0; place < layer.data.length; place += 4) {
    if (!layer.data[place + 3]) continue;
    least = Math.min(least, layer.data[place]);
    most = Math.max(most, layer.data[place]);
  }
  for (let place = 0; place < layer.data.length; place += 4) {
    const strength = (layer.data[place] - least) / Math.max(1, most - least);
    // Blue: no skin and no lesion is.
    layer.data.set([0, 96, 255, 0.75 * strength * layer.data[place + 3]], place);
  }
  context.putImageData(layer, 0, 0);
}

function clear() {
  current = null;
  asked?.abort();
  if (address) URL.revokeObjectURL(address);
  address = null;
  for (const id of ["preview", "preview-synthetic", "saliency-map", "clear", "answer-full", "classify-error"]) byId(id).hidden = true;
  byId("preview").removeAttribute("src");
  byId("drop-text").hidden = byId("answer-empty").hidden = false;
  byId("drop").dataset.full = "false";
  byId("answer").dataset.state = "empty";
  delete byId("answer").dataset.decision;
  byId("answer-empty").textContent = "The probability, the threshold and the decision appear here.";
  byId("classify-status").textContent = "";
}
