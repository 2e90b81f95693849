// Conversations kept in the browser, and as files in the form that `gptjax sft` reads: {"messages": [...]} a line.
import {ServerError} from "/web/api.js";

const PREFIX = "gptjax.chat.", SETTINGS = "gptjax.settings";
const ROLES = {human: "user", gpt: "assistant", user: "user", assistant: "assistant", system: "system", tool: "tool"};
const PICTURE = /^data:image\/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+=*$/;

export const newId = () => `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8).padEnd(6, "0")}`;
export const newConversation = (system = "") => ({id: newId(), changed: Date.now(), system, messages: []});
export const titleOf = (conversation) => {
  const first = conversation.messages.find((m) => m.role === "user"), text = first?.content.trim().replace(/\s+/g, " ");
  return [...(text || first?.images?.[0]?.name || "")].slice(0, 60).join("") || "New conversation";
};
export function allConversations() {
  const found = [];
  for (let i = 0; i < localStorage.length; i++) {
    const key = localStorage.key(i);
    if (key.startsWith(PREFIX)) { const one = load(key.slice(PREFIX.length)); if (one) found.push(one); }
  }
  return found.sort((a, b) => b.changed - a.changed);
}
export function load(id) {
  try {
    const one = JSON.parse(localStorage.getItem(PREFIX + id));
    return one && Array.isArray(one.messages) ? one : null;
  } catch { return null; }
}
// False where the browser has no room for it.
export function save(conversation) {
  conversation.changed = Date.now();
  try {
    // A picture that lies in the database is named alone.
    const text = JSON.stringify(conversation, (_, value) => value?.stored ? {...value, url: undefined} : value);
    localStorage.setItem(PREFIX + conversation.id, text);
    return true;
  } catch { return false; }
}
export function remove(id) {
  const gone = load(id);
  localStorage.removeItem(PREFIX + id);
  if (gone) inDatabase("readwrite", (box) => picturesOf(gone).forEach((picture) => box.delete(picture.id))).catch(() => {});
}
export const isConversation = (key) => key?.startsWith(PREFIX) ? key.slice(PREFIX.length) : null;

export function settings() {
  try { return JSON.parse(localStorage.getItem(SETTINGS)) ?? {}; } catch { return {}; }
}
export function keepSettings(values) { try { localStorage.setItem(SETTINGS, JSON.stringify(values)); } catch { /* said when a conversation is kept */ } }

// ---- Pictures lie in a database of the browser, each under its id: localStorage has room for two or three.

let opened;
const database = () => opened ??= new Promise((done, failed) => {
  const request = indexedDB.open("gptjax", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("pictures");
  request.onsuccess = () => done(request.result);
  request.onerror = () => failed(request.error);
});
// What `work` returns, once its transaction has ended.
async function inDatabase(mode, work) {
  const transaction = (await database()).transaction("pictures", mode), result = work(transaction.objectStore("pictures"));
  await new Promise((done, failed) => { transaction.oncomplete = done; transaction.onerror = transaction.onabort = () => failed(transaction.error); });
  return result;
}
export const picturesOf = (conversation) => conversation.messages.flatMap((m) => m.images ?? []);
// A picture for which the database has no room stays in its conversation.
export async function keepPictures(pictures) {
  if (!pictures.length) return;
  try {
    await inDatabase("readwrite", (box) => pictures.forEach((picture) => box.put(picture.url, picture.id)));
    for (const picture of pictures) picture.stored = true;
  } catch { /* said when the conversation is kept */ }
}
// Reads the pictures of a conversation; true where one was read. One that is no longer there keeps no url.
export async function fill(conversation) {
  const missing = picturesOf(conversation).filter((picture) => !picture.url);
  if (!missing.length) return false;
  try {
    const found = await inDatabase("readonly", (box) => missing.map((picture) => box.get(picture.id)));
    found.forEach((request, i) => { if (request.result) missing[i].url = request.result; });
  } catch { /* shown as lost */ }
  return true;
}
// Pictures that no conversation has: of messages that were never sent, a day ago.
export async function sweep() {
  const kept = new Set(allConversations().flatMap(picturesOf).map((picture) => picture.id));
  const old = (id) => parseInt(id.slice(0, -6), 36) < Date.now() - 86_400_000;
  try {
    const {result: ids} = await inDatabase("readonly", (box) => box.getAllKeys());
    await inDatabase("readwrite", (box) => ids.filter((id) => !kept.has(id) && old(id)).forEach((id) => box.delete(id)));
  } catch { /* no database, no pictures */ }
}

// ---- What the model is sent, and files hold

function contentOf({content, images}) {
  if (!images?.length) return content;
  const lost = images.find((picture) => !picture.url);
  if (lost) throw new ServerError(`${lost.name} is no longer kept in this browser: edit its message, and remove it there.`);
  const parts = images.map(({url}) => ({type: "image_url", image_url: {url}}));
  return content ? [...parts, {type: "text", text: content}] : parts;
}
// What the model is sent, and files hold: the system message before the others, nothing of this page's own.
export function messagesOf(conversation) {
  const system = conversation.system.trim() ? [{role: "system", content: conversation.system}] : [];
  const kept = conversation.messages.map((m) => {
    const message = {role: m.role, content: contentOf(m)};
    for (const name of ["tool_calls", "tool_call_id", "name"]) if (m[name] !== undefined) message[name] = m[name];
    return message;
  });
  return [...system, ...kept];
}
export const toFile = (conversations) => conversations.filter((c) => c.messages.length).map((c) => JSON.stringify({messages: messagesOf(c)}) + "\n").join("");

// The text and the pictures of a message's content in a file.
function parted(content, line) {
  if (typeof content === "string") return {content};
  const images = [], texts = [];
  for (const part of content) {
    const url = part?.image_url?.url ?? part?.image;
    if (part?.type === "text" && typeof part.text === "string") texts.push(part.text);
    else if (PICTURE.test(url)) images.push({id: newId(), name: `Picture ${images.length + 1}`, url});
    else throw new Error(typeof url === "string" ? `line ${line} names a picture that is not in it: only data: URLs of PNG, JPEG, WebP and GIF can be read` : `line ${line} has a part that is neither text nor a picture`);
  }
  return {content: texts.join(""), ...(images.length && {images})};
}
// The conversations of a file; throws an Error that names the line.
export function fromFile(text) {
  const found = [];
  text.split(/\r?\n/).forEach((line, i) => {
    if (!line.trim()) return;
    let record;
    try { record = JSON.parse(line); } catch { throw new Error(`line ${i + 1} is no JSON`); }
    const turns = record?.messages ?? record?.conversations?.map?.((t) => ({role: t.from, content: t.value})) ??
      (typeof record?.prompt === "string" ? [{role: "user", content: record.prompt}, {role: "assistant", content: record.completion}] : null);
    const right = Array.isArray(turns) && turns.every((t) => t && ROLES[t.role] && (typeof t.content === "string" || Array.isArray(t.content) || (t.content === null && t.tool_calls)));
    if (!right) throw new Error(`line ${i + 1} has no messages with roles and texts`);
    const conversation = newConversation();
    conversation.messages = turns.map((t) => ({...t, role: ROLES[t.role], ...parted(t.content ?? "", i + 1)}));
    if (conversation.messages[0]?.role === "system") conversation.system = conversation.messages.shift().content;
    found.push(conversation);
  });
  if (!found.length) throw new Error("it holds no conversation");
  return found;
}
