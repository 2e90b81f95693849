// The inspector's page of the server: sends a text and shows what comes back.
import {ask, apiKey, keepKey, showLabelling} from "/web/api.js";

const get = (id) => document.getElementById(id);
let asked = 0;

async function look() {
  const number = ++asked;
  get("error").hidden = true;
  get("status").textContent = "Looking inside …";
  get("look").disabled = true;
  try {
    const found = await ask("/inspection", {text: get("text").value});
    if (number !== asked) return;
    window.show(found);
    get("status").textContent = "";
    history.replaceState(null, "", "#" + encodeURIComponent(get("text").value));
  } catch (error) {
    if (number !== asked) return;
    get("status").textContent = "";
    get("error").textContent = error.message;
    get("error").hidden = false;
    if (error.needsKey) { get("key-line").hidden = false; get("key").focus(); }
  } finally {
    if (number === asked) get("look").disabled = false;
  }
}

get("ask").addEventListener("submit", (event) => { event.preventDefault(); look(); });
get("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) { event.preventDefault(); look(); }
});
get("key").value = apiKey();
get("key").addEventListener("change", () => keepKey(get("key").value));
showLabelling(get("to-label"));
if (location.hash.length > 1) {
  try { get("text").value = decodeURIComponent(location.hash.slice(1)); look(); } catch { /* no text of ours */ }
}
