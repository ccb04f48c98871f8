// The drawn images: one large, with its facts; the others beside it as small ones to choose from.

import { byId, element } from "./dom.js";

export class Gallery {
  // The image that is shown large.
  chosen = null;
  #images = [];
  #unfinished = [];
  #watched = 0;

  // `count` images are being drawn now; the last ones stay behind until they are there.
  begin(count) {
    this.#forgetUnfinished();
    this.#unfinished = Array(count).fill(null);
    this.#watched = 0;
    this.#fillStrip(count);
  }

  // How image `number` looks so far.
  preview(number, picture) {
    if (this.#unfinished[number]) URL.revokeObjectURL(this.#unfinished[number]);
    this.#unfinished[number] = URL.createObjectURL(picture);
    this.#strip[number].replaceChildren(element("img", { src: this.#unfinished[number], alt: "" }));
    if (number === this.#watched) this.#watch(number);
  }

  // The finished images, in order.
  show(images) {
    for (const { address } of this.#images) URL.revokeObjectURL(address);
    this.#images = images.map((image) => ({ ...image, address: URL.createObjectURL(image.picture) }));
    this.#choose(0);
  }

  // Nothing is being drawn any more, whether it came to an end or not.
  end() {
    this.#forgetUnfinished();
    byId("unfinished").hidden = byId("unfinished-note").hidden = true;
    byId("unfinished").removeAttribute("src");
    this.#fillStrip(this.#images.length);
    this.#images.forEach(({ address }, number) => {
      this.#strip[number]?.replaceChildren(element("img", { src: address, alt: "" }));
    });
    if (this.chosen) this.#choose(this.#images.indexOf(this.chosen));
  }

  get #strip() {
    return byId("strip").children;
  }

  #forgetUnfinished() {
    for (const address of this.#unfinished) if (address) URL.revokeObjectURL(address);
    this.#unfinished = [];
  }

  #fillStrip(count) {
    byId("strip").hidden = count < 2;
    byId("strip").replaceChildren(...Array.from({ length: count < 2 ? 1 : count }, (_, number) => {
      const button = element("button", { type: "button" });
      button.setAttribute("aria-label", `Image ${number + 1} of ${count}`);
      button.addEventListener("click", () => {
        if (this.#unfinished.length) this.#watch(number);
        else this.#choose(number);
      });
      return button;
    }));
    this.#mark(0);
  }

  #mark(number) {
    [...this.#strip].forEach((button, place) => button.setAttribute("aria-pressed", String(place === number)));
  }

  #watch(number) {
    this.#watched = number;
    this.#mark(number);
    const address = this.#unfinished[number];
    byId("unfinished").hidden = byId("unfinished-note").hidden = !address;
    if (address) byId("unfinished").src = address;
  }

  #choose(number) {
    const image = this.#images[number];
    this.chosen = image;
    this.#mark(number);
    const drawn = byId("drawn");
    drawn.src = image.address;
    drawn.alt = `Synthetic image: ${image.prompt}`;
    byId("download").href = image.address;
    byId("download").download = `dermaflux-${image.seed}.${image.format}`;
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
}
