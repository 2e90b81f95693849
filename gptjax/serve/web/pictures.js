// Pictures of a message: files become data: URLs, thumbnails show them, and each can be taken away again.
import {make} from "/web/dom.js";
import {newId} from "/web/store.js";

export const ACCEPTED = "image/png,image/jpeg,image/webp,image/gif";
const LARGEST = 20_000_000;  // bytes of a file
const LARGE = 1_000_000;  // bytes from which a picture is drawn again, smaller, before it is sent
const SIDE = 2048;  // pixels that are left of its longer side then: more than models look at

class Refusal extends Error {}

// The media type that the first bytes say: a file's name proves nothing.
function kindOf(bytes) {
  const text = String.fromCharCode(...bytes.subarray(0, 12));
  if (text.startsWith("\x89PNG\r\n\x1a\n")) return "image/png";
  if (text.startsWith("\xff\xd8\xff")) return "image/jpeg";
  if (text.startsWith("GIF8")) return "image/gif";
  return text.startsWith("RIFF") && text.slice(8) === "WEBP" ? "image/webp" : "";
}
const asUrl = (blob) => new Promise((done, failed) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result);
  reader.onerror = () => failed(reader.error);
  reader.readAsDataURL(blob);
});
async function readPicture(file) {
  const name = file.name || "picture", size = (file.size / 1e6).toFixed(1);
  if (file.size > LARGEST) throw new Refusal(`${name} has ${size} MB; a picture may have ${LARGEST / 1e6} MB.`);
  const bytes = new Uint8Array(await file.arrayBuffer()), kind = kindOf(bytes);
  if (!kind) throw new Refusal(`${name} is no picture that can be read here: PNG, JPEG, WebP and GIF can.`);
  const image = new Image();
  image.src = await asUrl(new Blob([bytes], {type: kind}));
  try { await image.decode(); } catch { throw new Refusal(`${name} is broken: it can't be drawn.`); }
  const large = file.size > LARGE;
  return {id: newId(), name, url: large ? smaller(image) : image.src, ...(large && {note: "made smaller"})};
}
function smaller(image) {
  const {naturalWidth: width, naturalHeight: height} = image, scale = Math.min(1, SIDE / Math.max(width, height));
  const canvas = make("canvas"), context = canvas.getContext("2d");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  context.fillStyle = "#fff";  // under what is transparent, as the server has it
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.9);
}

export function pictureNode(picture) {
  if (!picture.url) return make("span", "lost", `${picture.name} is no longer kept in this browser`);
  const image = make("img");
  image.src = picture.url;
  image.alt = image.title = picture.note ? `${picture.name} (${picture.note})` : picture.name;
  return image;
}
export function pictureList(pictures) {
  const list = make("ul", "pictures");
  list.setAttribute("aria-label", "Pictures");
  list.append(...pictures.map((picture) => { const item = make("li"); item.append(pictureNode(picture)); return item; }));
  return list;
}

// The pictures of a message that is being written. `room` is how many more there may be, `refuse` shows a line, `tell`
// says one to a screen reader, `leave` takes the focus when the last picture goes, `keep` is given new ones, and `changed`
// is called with how many there are.
export class Tray {
  constructor({room, refuse, tell, leave, keep, changed}) {
    Object.assign(this, {room, refuse, tell, leave, keep, changed, pictures: [], ready: null, node: make("ul", "tray")});
    this.node.setAttribute("aria-label", "Pictures of this message");
    this.draw();
  }
  draw() {
    this.changed?.(this.pictures.length);
    this.node.hidden = !this.pictures.length;
    this.node.replaceChildren(...this.pictures.map((picture, i) => {
      const item = make("li"), remove = make("button", "", "×");
      remove.type = "button";
      remove.setAttribute("aria-label", `Remove ${picture.name}`);
      remove.onclick = () => {
        this.set(this.pictures.filter((other) => other !== picture));
        this.tell(`${picture.name} removed.`);
        (this.node.querySelectorAll("button")[Math.min(i, this.pictures.length - 1)] ?? {focus: this.leave}).focus();
      };
      item.append(pictureNode(picture), remove);
      return item;
    }));
  }
  set(pictures) { this.pictures = [...pictures]; this.draw(); }
  take() { const pictures = this.pictures; this.set([]); return pictures; }
  // Reads files, one batch after the other; `ready` is when the last one has been read, null where nothing is.
  add(files) {
    const some = [...files];  // now: a field's list is emptied
    const reading = (this.ready ?? Promise.resolve()).then(() => this.read(some)).finally(() => { if (this.ready === reading) this.ready = null; });
    this.ready = reading;
  }
  async read(files) {
    const room = Math.max(0, this.room() - this.pictures.length), wrong = [], read = [];
    if (files.length > room) wrong.push(`The server takes no more pictures in a conversation: ${files.length - room} left out.`);
    for (const file of files.slice(0, room)) {
      try { read.push(await readPicture(file)); } catch (error) { wrong.push(error instanceof Refusal ? error.message : `${file.name} can't be read.`); }
    }
    await this.keep?.(read);
    if (read.length) { this.set([...this.pictures, ...read]); this.tell(`${read.map((p) => p.name).join(", ")} added.`); }
    this.refuse(wrong.join(" "));
  }
}

const hasFiles = (transfer) => transfer?.types.includes("Files");
// Pictures that are dropped anywhere on the page, pasted into `field`, or chosen with `button`, go to `add`.
export function takePictures({field, button, input, add}) {
  const mark = (on) => document.body.classList.toggle("dropping", on);
  addEventListener("dragover", (e) => { if (hasFiles(e.dataTransfer)) { e.preventDefault(); mark(true); } });
  addEventListener("dragleave", (e) => { if (!e.relatedTarget) mark(false); });
  addEventListener("drop", (e) => {
    mark(false);
    if (!hasFiles(e.dataTransfer)) return;
    e.preventDefault();  // a browser would leave the page for the file
    add(e.dataTransfer.files);
  });
  pasteInto(field, add);
  input.accept = ACCEPTED;
  button.onclick = () => input.click();
  input.onchange = () => { add(input.files); input.value = ""; };
}
// Where a text is copied with a picture of itself, as from a table, the text is meant.
export function pasteInto(field, add) {
  field.addEventListener("paste", (e) => {
    const {files, types} = e.clipboardData;
    if (files.length && !types.includes("text/plain")) { e.preventDefault(); add(files); }
  });
}
