// The chat: what is typed goes to /v1/chat/completions, and the answer is drawn as it comes.
import {ask, pageFacts, ServerError, showLabelling, stream} from "/web/api.js";
import {$, make} from "/web/dom.js";
import {copy, draw} from "/web/markdown.js";
import {pasteInto, pictureList, takePictures, Tray} from "/web/pictures.js";
import {onSettings, openSettings, sampling} from "/web/settings.js";
import {speaker, tell} from "/web/speaker.js";
import * as store from "/web/store.js";

const SAVE_EVERY = 500;  // ms, while an answer comes
let facts = {tools: [], max_calls: 0, images: false, max_images: 0};  // what the server says of its pages
const running = new Map();  // the answers that are coming, by conversation: {controller, conversation}
let current = null, model = "", editing = -1;
const refuse = (line) => { if (line) showError(new ServerError(line)); else if ($("again").hidden) hideError(); };
// Pictures that a conversation may still have behind its first messages.
const room = (messages) => facts.max_images - store.picturesOf({messages}).length;
const tray = new Tray({room: () => room(current.messages), refuse, tell, keep: store.keepPictures, leave: () => $("input").focus()});
const added = (to) => (files) => { if (files.length) { if (facts.images) to.add(files); else refuse(`${model || "This model"} reads text alone: it can't be sent a picture.`); } };

// ---- Conversations

function open(conversation, focus = true) {
  current = conversation;
  editing = -1;
  sessionStorage.setItem("gptjax.current", conversation.id);
  $("system").value = conversation.system;
  hideError();
  drawAll();
  fill(conversation);
  closeSide();
  scrollDown(true);
  if (focus) $("input").focus();
}
// Reads its pictures, which come from a database.
async function fill(conversation) {
  if (await store.fill(conversation) && current === conversation && editing < 0) { drawAll(); scrollDown(true); }
}
const find = (id) => running.get(id)?.conversation ?? store.load(id);
function keep(conversation) {
  if (!store.save(conversation)) showError(new ServerError("The browser has no room left for this conversation: export some, and remove them."));
}
function drawList() {
  const all = store.allConversations();
  if (!all.some((c) => c.id === current.id)) all.unshift(current);
  $("list").replaceChildren(...all.map((c) => {
    const item = make("li", c.id === current.id ? "current" : ""), title = store.titleOf(c);
    const button = make("button", "open", title), bin = make("button", "remove", "×");
    button.type = bin.type = "button";
    button.title = title;
    if (c.id === current.id) button.setAttribute("aria-current", "true");
    button.onclick = () => open(c.id === current.id ? current : find(c.id) ?? c);
    bin.setAttribute("aria-label", `Remove ${title}`);
    bin.onclick = () => {
      if (!confirm(`Remove “${title}”? It can't be brought back.`)) return;
      running.get(c.id)?.controller.abort();
      running.delete(c.id);
      store.remove(c.id);
      if (c.id === current.id) open(find(store.allConversations()[0]?.id) ?? store.newConversation(c.system)); else drawList();
    };
    item.append(button, bin);
    return item;
  }));
}

// ---- Messages

function drawAll() {
  $("messages").replaceChildren(...current.messages.map((_, i) => messageNode(i)));
  $("empty").hidden = current.messages.length > 0;
  drawButtons();
  drawList();
}
function drawButtons() {
  const busy = running.has(current.id);
  $("stop").hidden = !busy;
  $("send").hidden = busy;
}
function messageNode(i) {
  const message = current.messages[i], node = make("li", `message ${message.role}`), busy = running.has(current.id);
  node.append(make("span", "sr", {user: "You:", assistant: "The model:", tool: "A tool's result:", system: "System:"}[message.role]));
  if (editing === i) { node.classList.add("editing"); node.append(editor(i)); return node; }
  const text = make("div", "text"), tools = make("div", "tools");
  text.dir = "auto";
  if (message.role === "assistant") drawAnswer(text, message, busy && i === current.messages.length - 1);
  else if (message.role === "tool") { const box = make("details"); box.append(make("summary", "", `Result of ${message.name ?? "the tool"}`), make("pre", "", message.content)); text.append(box); }
  else { text.textContent = message.content; text.hidden = !message.content; }
  const button = (label, run) => { const b = make("button", "plain", label); b.type = "button"; b.onclick = () => run(b); tools.append(b); };
  if (message.content) button("Copy", (b) => copy(message.content, b));
  if (message.role === "user") button("Edit", () => { if (!running.has(current.id)) { editing = i; drawAll(); $("edit").focus(); } });
  if (message.role === "assistant") button("Retry", () => retry(i));
  tools.append(make("span", "note", busy && i === current.messages.length - 1 ? "" : message.note ?? ""));
  if (message.images?.length) node.append(pictureList(message.images));
  node.append(text, tools);
  return node;
}
function drawAnswer(box, message, waits) {
  box.classList.toggle("waiting", waits && !message.content && !message.tool_calls);
  for (const call of box.querySelectorAll(":scope > details")) call.remove();
  draw(box, message.content);
  for (const call of message.tool_calls ?? []) {
    const around = make("details");
    around.append(make("summary", "", `Calls ${call.function.name}`), make("pre", "", call.function.arguments));
    box.append(around);
  }
}
function editor(i) {
  const around = make("div", "edit"), area = make("textarea"), row = make("div"), done = make("button", "main", "Send"), cancel = make("button", "", "Cancel");
  const kept = new Tray({room: () => room(current.messages.slice(0, i)), refuse, tell, keep: store.keepPictures, leave: () => area.focus()});
  kept.set(current.messages[i].images ?? []);
  pasteInto(area, added(kept));
  area.id = "edit";
  area.value = current.messages[i].content;
  area.rows = Math.min(12, area.value.split("\n").length + 1);
  area.setAttribute("aria-label", "Edit the message; what follows it is cut");
  const close = () => { editing = -1; drawAll(); $("input").focus(); };
  const send = async () => {
    if (kept.ready) await kept.ready;
    if (editing !== i || !(area.value.trim() || kept.pictures.length)) return;
    editing = -1;
    const cut = current.messages.splice(i);
    say(area.value, kept.pictures, cut.length > 1 ? cut : []);
    $("input").focus();
  };
  area.onkeydown = (e) => {
    if (e.key === "Escape") { e.stopPropagation(); close(); }
    if (sends(e)) { e.preventDefault(); send(); }
  };
  done.type = cancel.type = "button";
  done.onclick = send;
  cancel.onclick = close;
  row.append(cancel, done);
  around.append(kept.node, area, row);
  return around;
}
// Enter sends; not while an input method composes, nor on a touch screen, whose keyboards have no Shift+Enter.
const sends = (e) => e.key === "Enter" && !e.shiftKey && !e.isComposing && e.keyCode !== 229 && !matchMedia("(pointer: coarse)").matches;
const nearEnd = () => { const box = $("scroll"); return box.scrollHeight - box.scrollTop - box.clientHeight < 60; };
function scrollDown(always) { if (always) $("scroll").scrollTop = $("scroll").scrollHeight; }

// ---- Answers

// `cut` is what an edit takes away: it comes back where no answer does.
function say(text, images, cut = []) {
  current.messages.push({role: "user", content: text, ...(images.length && {images})});
  if (!cut.length) keep(current);
  answer(current, cut, 1);
}
function retry(i) {
  if (running.has(current.id)) return;
  const cut = current.messages.splice(i);
  current.retries = (current.retries ?? 0) + 1;
  answer(current, cut);
  $("input").focus();
}
function requestOf(conversation, tools) {
  const body = {...(model && {model}), messages: store.messagesOf(conversation), stream_options: {include_usage: true}};
  if (tools.length) body.tools = tools;
  return {...body, ...sampling(conversation.retries ?? 0)};
}
// Adds an answer; where none comes, `cut` takes its place again, and of the last messages the `said` that it was for.
async function answer(conversation, cut = [], said = 0) {
  const {tools, max_calls: mostCalls} = facts, asked = {...conversation, messages: [...conversation.messages]};
  const controller = new AbortController(), reader = speaker();
  const message = {role: "assistant", content: "", note: "broke off"};  // where the page is left before its end
  const here = () => current === conversation;
  conversation.messages.push(message);
  running.set(conversation.id, {controller, conversation});
  hideError();
  if (here()) { drawAll(); scrollDown(true); }
  let saved = 0, drawing = false, reason = "", usage = null, failed = null;
  const started = performance.now();
  const redraw = () => {
    drawing = false;
    const node = here() && $("messages").lastElementChild?.querySelector(".text");
    if (!node || !running.has(conversation.id)) return;
    const follow = nearEnd();
    drawAnswer(node, message, true);
    scrollDown(follow);
  };
  try {
    await store.fill(conversation);
    for await (const chunk of stream("/v1/chat/completions", requestOf(asked, tools), controller.signal)) {
      if (chunk.usage) usage = chunk.usage;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      if (choice.delta?.content) { message.content += choice.delta.content; if (here()) reader.add(choice.delta.content); }
      for (const part of choice.delta?.tool_calls ?? []) addCall(message, part);
      if (choice.finish_reason) reason = choice.finish_reason;
      if (!drawing) { drawing = true; requestAnimationFrame(redraw); }
      if (performance.now() - saved > SAVE_EVERY) { saved = performance.now(); keep(conversation); }
    }
  } catch (error) {
    failed = error;
  }
  if (running.get(conversation.id)?.controller !== controller) return;  // the conversation was removed
  running.delete(conversation.id);
  const stopped = failed?.name === "AbortError", empty = !message.content && !message.tool_calls;
  if (empty && failed) {
    const at = conversation.messages.indexOf(message), back = cut.length ? said : 0;
    const [edited] = conversation.messages.splice(at - back, 1 + back, ...cut);
    if (back && here() && !$("input").value) { $("input").value = edited.content; tray.set(edited.images ?? []); }
  }
  const seconds = (performance.now() - started) / 1000, tokens = usage?.completion_tokens;
  const speed = tokens ? `${tokens} tokens, ${(tokens / seconds).toFixed(1)} a second` : "";
  const why = stopped ? "stopped" : failed ? "broke off" : reason === "length" ? "cut at the most tokens" : empty ? "the model said nothing" : "";
  message.note = [why, speed].filter(Boolean).join("; ");
  keep(conversation);
  if (!here()) { drawList(); return; }
  const follow = nearEnd(), node = $("messages").lastElementChild;
  if (empty || !node) drawAll();
  else { drawAnswer(node.querySelector(".text"), message, false); node.querySelector(".note").textContent = message.note; drawButtons(); drawList(); }
  scrollDown(follow);
  reader.end(why);
  if (failed && !stopped) showError(failed, cut.length ? undefined : conversation);
  if (!failed && message.tool_calls && tools.length) await runTools(conversation, message, mostCalls);
}
// Has the server make the calls of an answer, with the tools that it was started with, and lets the model go on.
async function runTools(conversation, message, most) {
  const since = conversation.messages.slice(conversation.messages.findLastIndex((m) => m.role === "user"));
  const made = since.reduce((sum, m) => sum + (m.tool_calls?.length ?? 0), 0);
  if (made > most) { message.note = `${message.note}; no further calls, of ${most}`; keep(conversation); if (current === conversation) drawAll(); return; }
  const controller = new AbortController();
  running.set(conversation.id, {controller, conversation});
  if (current === conversation) drawButtons();
  let failed = null;
  try {
    for (const call of message.tool_calls) {
      const {content} = await ask("/tool", {name: call.function.name, arguments: call.function.arguments}, controller.signal);
      conversation.messages.push({role: "tool", tool_call_id: call.id, name: call.function.name, content});
    }
  } catch (error) {
    failed = error;
  }
  if (running.get(conversation.id)?.controller !== controller) return;
  running.delete(conversation.id);
  keep(conversation);
  if (!failed) return answer(conversation);
  if (current !== conversation) return;
  drawAll();
  if (failed.name !== "AbortError") showError(failed);
}
function addCall(message, part) {
  const calls = message.tool_calls ??= [], at = part.index ?? calls.length;
  const call = calls[at] ??= {id: part.id, type: "function", function: {name: "", arguments: ""}};
  if (part.id) call.id = part.id;
  call.function.name += part.function?.name ?? "";
  call.function.arguments += part.function?.arguments ?? "";
}
const stop = () => running.get(current.id)?.controller.abort();

// ---- Errors

let timer = 0;
function showError(error, conversation) {
  clearInterval(timer);
  const known = error instanceof ServerError;
  $("error-text").textContent = known ? error.message : `Something on this page failed: ${error.message}`;
  $("again").hidden = !conversation;
  $("again").onclick = () => {
    const last = conversation.messages.at(-1);
    if (last?.role === "assistant") conversation.messages.pop();
    $("input").focus();
    answer(conversation);
  };
  $("error").hidden = false;
  let seconds = known ? error.seconds : null;
  $("again").textContent = "Try again";
  if (seconds && conversation) {
    $("again").disabled = true;
    const count = () => {
      $("again").textContent = seconds > 0 ? `Try again in ${seconds} s` : "Try again";
      $("again").disabled = seconds > 0;
      if (seconds-- <= 0) clearInterval(timer);
    };
    count();
    timer = setInterval(count, 1000);
  } else $("again").disabled = false;
  if (known && error.needsKey) { openSettings(current.system); $("key").focus(); }
}
function hideError() { clearInterval(timer); $("error").hidden = true; }

// ---- Files

async function download(conversations, name) {
  for (const one of conversations) await store.fill(one);
  let text;
  try { text = store.toFile(conversations); } catch (error) { showError(error); return; }
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/jsonl"}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
async function importFile(file) {
  try {
    const found = store.fromFile(await file.text());
    for (const one of found) await store.keepPictures(store.picturesOf(one));
    open(found[0]);
    for (const one of found.reverse()) keep(one);
    drawList();
  } catch (error) {
    showError(new ServerError(`${file.name} can't be imported: ${error.message}.`));
  }
}

// ---- The page

function closeSide() { $("side").classList.remove("open"); $("menu").setAttribute("aria-expanded", "false"); }
function grow() { const box = $("input"); box.style.height = "auto"; box.style.height = `${box.scrollHeight + 2}px`; }
async function findModel() {
  try {
    model = (await ask("/v1/models")).data[0]?.id ?? "";
    $("model").textContent = model;
    document.title = `${model} · gptjax chat`;
  } catch (error) { showError(error); }
}
$("composer").onsubmit = async (e) => {
  e.preventDefault();
  if (tray.ready) await tray.ready;
  const text = $("input").value;
  if (!(text.trim() || tray.pictures.length) || running.has(current.id)) return;
  const unanswered = current.messages.at(-1)?.role === "user" ? [current.messages.pop()] : [];
  $("input").value = "";
  grow();
  say([...unanswered.map((m) => m.content), text].filter(Boolean).join("\n\n"), [...unanswered.flatMap((m) => m.images ?? []), ...tray.take()]);
};
$("composer").prepend(tray.node);
takePictures({field: $("input"), button: $("attach"), input: $("picture"), add: added(tray)});
$("input").oninput = grow;
$("input").onkeydown = (e) => {
  if (sends(e)) { e.preventDefault(); $("composer").requestSubmit(); }
  if (e.key === "ArrowUp" && !$("input").value && !running.has(current.id)) {
    const last = current.messages.findLastIndex((m) => m.role === "user");
    if (last >= 0) { e.preventDefault(); editing = last; drawAll(); $("edit").focus(); }
  }
};
$("stop").onclick = () => { stop(); $("input").focus(); };
document.addEventListener("keydown", (e) => {
  if (e.key !== "Escape" || e.isComposing || $("settings").open) return;
  if ($("side").classList.contains("open")) { closeSide(); $("menu").focus(); } else stop();
});
$("menu").onclick = () => {
  const opened = $("side").classList.toggle("open");
  $("menu").setAttribute("aria-expanded", opened);
  if (opened) $("new").focus();
};
$("new").onclick = () => open(current.messages.length ? store.newConversation(current.system) : current);
$("export").onclick = () => download([current], "conversation.jsonl");
$("export-all").onclick = () => download(store.allConversations(), "conversations.jsonl");
$("import").onclick = () => $("file").click();
$("file").onchange = () => { if ($("file").files[0]) importFile($("file").files[0]); $("file").value = ""; };
$("open-settings").onclick = () => openSettings(current.system);
onSettings((system) => {
  current.system = system;
  if (current.messages.length) keep(current);
  if (!model) findModel();
});
addEventListener("pagehide", () => { for (const {conversation} of running.values()) store.save(conversation); });
addEventListener("storage", (e) => {  // another tab wrote
  const id = store.isConversation(e.key);
  if (id === current.id && !running.has(id) && editing < 0) { const other = store.load(id); if (other) { current = other; drawAll(); fill(other); } } else if (id) drawList();
});
open(store.load(sessionStorage.getItem("gptjax.current")) ?? store.newConversation());
findModel();
pageFacts().then((found) => { facts = found; $("attach").hidden = !facts.images; });
store.sweep();
showLabelling($("to-label"));
