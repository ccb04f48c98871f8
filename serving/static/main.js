// Reads the model card, then starts both panels and fills the third.

import { modelCard } from "./api.js";
import { byId, element } from "./dom.js";
import { startDrawing } from "./draw.js";
import { forgetKey, showKey } from "./key.js";
import { startPhoto } from "./photo.js";

const PARTS = {
  text_encoder: "Text encoder (CLIP)",
  text_encoder_2: "Text encoder (T5)",
  transformer: "Transformer",
  vae_decoder: "Image decoder",
  vae_encoder: "Image encoder",
  classifier: "Classifier",
};

function list(title, rows) {
  const items = rows.map(([head, ...lines]) =>
    element("li", {}, element("strong", {}, head), ...lines.filter(Boolean).map((line) => element("span", {}, line))));
  return element("div", {}, element("h2", {}, title), element("ul", {}, ...items));
}

function describe(card) {
  byId("about-line").textContent = `${card.name}, bundle ${card.bundle}, made ${card.created.slice(0, 10)} by ${card.made_by}`;
  const engines = card.engines.map(({ part, engine, precision, reason }) =>
    [PARTS[part] ?? part, `${engine}, ${precision}: ${reason}`]);
  const licences = card.licences.map(({ name, licence, attribution }) => [name, licence, attribution]);
  const parity = Object.entries(card.parity.images).flatMap(([precision, engines]) =>
    Object.entries(engines).map(([engine, found]) => [
      `${engine}, ${precision}`,
      `median ${found.psnr_median_db} dB, worst ${found.psnr_worst_db} dB PSNR over ${found.prompts} images`,
    ]));
  byId("about-content").append(list("What runs where", engines), list("Ingredients and licences", licences));
  if (parity.length) byId("about-content").append(list("How close to the original model", parity));
}

showKey();
byId("key-forget").addEventListener("click", () => {
  forgetKey();
  // What the page shows belongs to who had the key.
  location.reload();
});
try {
  const card = await modelCard();
  const assess = card.classifier === null ? null : startPhoto(card);
  for (const part of document.querySelectorAll("#classify, nav [href=\"#classify\"]")) part.hidden = assess === null;
  startDrawing(card, assess);
  describe(card);
  document.documentElement.dataset.ready = "true";
} catch (error) {
  byId("load-error").textContent = `The page cannot be set up: ${error.message}`;
  byId("load-error").hidden = false;
}
