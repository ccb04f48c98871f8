// The form: attributes built from the vocabulary of the model card, and what they say as JSON.

import { element } from "./dom.js";

const TITLES = {
  label: "Label",
  diagnosis: "Diagnosis",
  asymmetry: "Asymmetry",
  border: "Border",
  colors: "Colours",
  size: "Size",
  structures: "Structures",
};
const MANY = new Set(["colors", "structures"]);
// What the form says at first: a label alone leaves most of a lesion open, and shows little.
const EXAMPLE = { label: "benign", diagnosis: "nevus", colors: ["light brown", "dark brown"], size: "medium" };

export function buildAttributes(place, { vocabulary, diagnoses }) {
  for (const [name, words] of Object.entries(vocabulary)) {
    place.append(name === "diagnosis" ? diagnosisField(words, diagnoses) : chips(name, words));
  }
  const label = (word) => place.querySelector(`input[name="label"][value="${word}"]`);
  for (const [name, words] of Object.entries(EXAMPLE)) {
    for (const word of [words].flat()) choose(place, name, word);
  }
  // A diagnosis implies its label; choosing the other label takes the diagnosis back.
  const diagnosis = place.querySelector("#diagnosis");
  diagnosis.addEventListener("change", () => {
    const implied = diagnoses[diagnosis.value];
    if (implied) label(implied).checked = true;
  });
  for (const input of place.querySelectorAll('input[name="label"]')) {
    input.addEventListener("change", () => {
      const implied = diagnoses[diagnosis.value];
      if (implied && implied !== input.value) diagnosis.value = "";
    });
  }
}

function choose(place, name, word) {
  const input = place.querySelector(`input[name="${name}"][value="${word}"]`);
  if (input) input.checked = true;
  const option = place.querySelector(`select[name="${name}"] option[value="${word}"]`);
  if (option) option.selected = true;
}

export function readLesion(form) {
  const data = new FormData(form);
  const lesion = {};
  for (const name of Object.keys(TITLES)) {
    const values = data.getAll(name).filter(Boolean);
    if (values.length) lesion[name] = MANY.has(name) ? values : values[0];
  }
  return lesion;
}

export function buildSizes(select, { limits, defaults }) {
  const sides = new Set([defaults.width]);
  for (let side = limits.min_size; side <= limits.max_size; side += limits.size_multiple) sides.add(side);
  // A bundle of a large model would list hundreds; every so many is enough to choose from.
  let list = [...sides].sort((a, b) => a - b);
  const every = Math.ceil(list.length / 12);
  list = list.filter((side, index) => index % every === 0 || side === defaults.width || side === limits.max_size);
  for (const side of list) {
    select.append(element("option", { value: side, selected: side === defaults.width }, `${side} × ${side} px`));
  }
}

export function buildCount(select, { limits }) {
  for (let count = 1; count <= limits.max_images; count += 1) {
    select.append(element("option", { value: count }, String(count)));
  }
}

export function tieSlider(range, number) {
  range.addEventListener("input", () => { number.value = range.value; });
  number.addEventListener("input", () => { range.value = number.value; });
}

function diagnosisField(words, diagnoses) {
  const groups = new Map([["benign", []], ["malignant", []], [null, []]]);
  for (const word of words) groups.get(diagnoses[word] ?? null).push(word);
  const select = element("select", { id: "diagnosis", name: "diagnosis" }, element("option", { value: "" }, "not said"));
  for (const [label, members] of groups) {
    const options = members.map((word) => element("option", { value: word }, word));
    select.append(element("optgroup", { label: label ?? "benign or malignant" }, ...options));
  }
  return element("div", { className: "row" }, element("label", { htmlFor: "diagnosis", className: "row-name" }, TITLES.diagnosis), select);
}

function chips(name, words) {
  const many = MANY.has(name);
  const chip = (value, text, checked) => element("label", {},
    element("input", { type: many ? "checkbox" : "radio", name, value, checked }),
    ...(name === "colors" ? [swatch(value)] : []), text);
  const list = element("div", { className: "chips" }, ...words.map((word) => chip(word, word, false)));
  if (!many && name !== "label") list.prepend(chip("", "any", true));
  const title = element("span", { id: `${name}-name`, className: "row-name" }, TITLES[name]);
  const group = element("div", { className: "row", id: name }, title, list);
  group.setAttribute("role", many ? "group" : "radiogroup");
  group.setAttribute("aria-labelledby", title.id);
  return group;
}

function swatch(word) {
  const dot = element("i", { className: "swatch" });
  dot.dataset.word = word;
  return dot;
}
