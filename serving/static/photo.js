// Second panel: a photograph in; probability, threshold, abstention band and decision out.

import { ApiError, classify } from "./api.js";
import { byId, element } from "./dom.js";

const WORDS = { benign: "Benign", malignant: "Malignant", abstain: "No decision" };

let asked = null;
let address = null;
let largest = Infinity;

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
    show(await classify(picture, signal));
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
  const p = probability > 0.9995 ? "above 0.999" : probability < 0.0005 ? "below 0.001" : probability.toFixed(3);
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
  for (const [name, value] of Object.entries({ probability, threshold, low, high })) {
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

function clear() {
  asked?.abort();
  if (address) URL.revokeObjectURL(address);
  address = null;
  for (const id of ["preview", "preview-synthetic", "clear", "answer-full", "classify-error"]) byId(id).hidden = true;
  byId("preview").removeAttribute("src");
  byId("drop-text").hidden = byId("answer-empty").hidden = false;
  byId("drop").dataset.full = "false";
  byId("answer").dataset.state = "empty";
  delete byId("answer").dataset.decision;
  byId("answer-empty").textContent = "The probability, the threshold and the decision appear here.";
  byId("classify-status").textContent = "";
}
