// The API key, where the service wants one: asked for once, kept until the tab is closed.

import { byId } from "./dom.js";

const PLACE = "dermaflux-key";

let asking = null;

export function key() {
  return sessionStorage.getItem(PLACE);
}

export function forgetKey() {
  sessionStorage.removeItem(PLACE);
  showKey();
}

// Resolves to whether there is a key now. However many requests ask, there is one dialog.
export function askKey(why) {
  asking ??= ask(why).finally(() => { asking = null; });
  return asking;
}

export function showKey() {
  byId("key-forget").hidden = !key();
}

function ask(why) {
  const dialog = byId("key-dialog");
  const input = byId("key-input");
  byId("key-why").textContent = why;
  byId("key-why").hidden = !why;
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "use" ? input.value.trim() : "";
      input.value = "";
      // Else the headers of a request could not hold it.
      if (/^[\x21-\x7e]+$/.test(given)) sessionStorage.setItem(PLACE, given);
      showKey();
      resolve(Boolean(given && key()));
    }, { once: true });
  });
}
