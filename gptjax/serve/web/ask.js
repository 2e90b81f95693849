// The inspector's page of the server: sends a text and shows what comes back.
import {ask, apiKey, keepKey, pageFacts, showLabelling} from "/web/api.js";
import {takePictures, Tray} from "/web/pictures.js";

const get = (id) => document.getElementById(id);
let asked = 0, facts = {images: false, max_images: 0};
const refuse = (line) => { get("error").textContent = line; get("error").hidden = !line; };
const tray = new Tray({room: () => facts.max_images, refuse, tell: (line) => { get("status").textContent = line; }, leave: () => get("text").focus(), changed: (count) => {
  get("chat").disabled = count > 0;  // a model reads pictures in what a user says
  get("chat").checked ||= count > 0;
}});

async function look() {
  const number = ++asked;
  get("error").hidden = true;
  get("status").textContent = "Looking inside …";
  get("look").disabled = true;
  try {
    if (tray.ready) await tray.ready;
    const images = tray.pictures.map((picture) => picture.url), chat = get("chat").checked;
    const found = await ask("/inspection", {text: get("text").value, ...(chat && {chat}), ...(images.length && {images})});
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
get("ask").prepend(tray.node);
takePictures({
  field: get("text"), button: get("attach"), input: get("picture"),
  add: (files) => { if (facts.images) tray.add(files); else if (files.length) refuse("This model reads text alone: it can't be given a picture."); },
});
pageFacts().then((found) => {
  facts = found;
  get("attach").hidden = !facts.images;
  get("chat").parentElement.hidden = !facts.chat;
});
if (location.hash.length > 1) {
  try { get("text").value = decodeURIComponent(location.hash.slice(1)); look(); } catch { /* no text of ours */ }
}
