// The settings: of sampling and the key, for all conversations, and the system prompt of the one that is open.
import {apiKey, keepKey} from "/web/api.js";
import {$} from "/web/dom.js";
import * as store from "/web/store.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

export function openSettings(system) {
  const chosen = store.settings();
  for (const name of NUMBERS) $(`s-${name}`).value = chosen[name] ?? "";
  $("s-stop").value = (chosen.stop ?? []).join("\n");
  $("system").value = system;
  $("key").value = apiKey();
  $("settings-error").hidden = true;
  $("settings").showModal();
}
// The settings as they stand, or what is wrong with them.
function readSettings() {
  const chosen = {};
  for (const name of NUMBERS) {
    const field = $(`s-${name}`);
    if (!field.checkValidity()) return `${field.labels[0].firstChild.textContent.trim()}: ${field.validationMessage}`;
    if (field.value !== "") chosen[name] = Number(field.value);
  }
  const stops = $("s-stop").value.split("\n").filter((line) => line !== "");
  if (stops.length > 4) return `Stop at: ${stops.length} texts; at most four`;
  if (stops.length) chosen.stop = stops;
  return chosen;
}
// Keeps what was chosen, and calls done with the system prompt; a wrong number leaves the dialog open.
export function onSettings(done) {
  $("settings-done").onclick = (event) => {
    const chosen = readSettings();
    if (typeof chosen === "string") {
      event.preventDefault();
      $("settings-error").textContent = chosen;
      $("settings-error").hidden = false;
      return;
    }
    store.keepSettings(chosen);
    keepKey($("key").value);
    done($("system").value);
  };
}
// The chosen ones as fields of a request; `retries` ask for other random numbers.
export function sampling(retries) {
  const chosen = store.settings(), fields = {};
  for (const name of NUMBERS) if (typeof chosen[name] === "number") fields[name] = chosen[name];
  if (chosen.stop?.length) fields.stop = chosen.stop;
  if (fields.seed !== undefined) fields.seed = (fields.seed + retries) % 2 ** 32;
  return fields;
}
