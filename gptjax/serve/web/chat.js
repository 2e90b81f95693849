// The chat: what is typed goes to /v1/chat/completions, and the answer is drawn as it comes.
import {apiKey, ask, keepKey, pageFacts, ServerError, showLabelling, stream} from "/web/api.js";
import {copy, draw} from "/web/markdown.js";
import * as store from "/web/store.js";

const $ = (id) => document.getElementById(id);
const make = (tag, cls, text) => { const e = document.createElement(tag); if (cls) e.className = cls; if (text !== undefined) e.textContent = text; return e; };
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const SAVE_EVERY = 500;  // ms, while an answer comes
let facts = {tools: [], max_calls: 0};  // what the server says of its pages
const running = new Map();  // the answers that are coming, by conversation: {controller, conversation}
let current = null, model = "", editing = -1;

// ---- Conversations

function open(conversation, focus = true) {
  current = conversation;
  editing = -1;
  sessionStorage.setItem("gptjax.current", conversation.id);
  $("system").value = conversation.system;
  hideError();
  drawAll();
  closeSide();
  scrollDown(true);
  if (focus) $("input").focus();
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
  else text.textContent = message.content;
  const button = (label, run) => { const b = make("button", "plain", label); b.type = "button"; b.onclick = () => run(b); tools.append(b); };
  button("Copy", (b) => copy(message.content, b));
  if (message.role === "user") button("Edit", () => { if (!running.has(current.id)) { editing = i; drawAll(); $("edit").focus(); } });
  if (message.role === "assistant") button("Retry", () => retry(i));
  tools.append(make("span", "note", busy && i === current.messages.length - 1 ? "" : message.note ?? ""));
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
  area.id = "edit";
  area.value = current.messages[i].content;
  area.rows = Math.min(12, area.value.split("\n").length + 1);
  area.setAttribute("aria-label", "Edit the message; what follows it is cut");
  const close = () => { editing = -1; drawAll(); $("input").focus(); };
  const send = () => {
    if (!area.value.trim()) return;
    editing = -1;
    const cut = current.messages.splice(i);
    say(area.value, cut.length > 1 ? cut : []);
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
  around.append(area, row);
  return around;
}
// Enter sends; not while an input method composes, nor on a touch screen, whose keyboards have no Shift+Enter.
const sends = (e) => e.key === "Enter" && !e.shiftKey && !e.isComposing && e.keyCode !== 229 && !matchMedia("(pointer: coarse)").matches;
const nearEnd = () => { const box = $("scroll"); return box.scrollHeight - box.scrollTop - box.clientHeight < 60; };
function scrollDown(always) { if (always) $("scroll").scrollTop = $("scroll").scrollHeight; }

// ---- Answers

// `cut` is what an edit takes away: it comes back where no answer does.
function say(text, cut = []) {
  current.messages.push({role: "user", content: text});
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
  const chosen = store.settings();  // another answer is asked for with other random numbers
  for (const name of NUMBERS) if (typeof chosen[name] === "number") body[name] = chosen[name];
  if (chosen.stop?.length) body.stop = chosen.stop;
  if (body.seed !== undefined) body.seed = (body.seed + (conversation.retries ?? 0)) % 2 ** 32;
  return body;
}
// Adds an answer; where none comes, `cut` takes its place again, and of the last messages the `said` that it was for.
async function answer(conversation, cut = [], said = 0) {
  const {tools, max_calls: mostCalls} = facts, body = requestOf(conversation, tools);
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
    for await (const chunk of stream("/v1/chat/completions", body, controller.signal)) {
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
    if (back && here() && !$("input").value) $("input").value = edited.content;
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

// Tells a screen reader whole sentences, not every token.
function speaker() {
  let rest = "";
  const tell = (text) => {
    const plain = text.replace(/[*_`#|>~]+/g, " ").replace(/\s+/g, " ").trim();
    if (!plain) return;
    $("live").append(make("p", "", plain));
    while ($("live").children.length > 20) $("live").firstChild.remove();
  };
  return {
    add(text) {
      rest += text;
      const match = /^[\s\S]*(?:[.!?…](?=\s)|[。！？]|\n)/.exec(rest);
      if (match) { tell(match[0]); rest = rest.slice(match[0].length); }
    },
    end(why) { tell(rest); if (why) tell(why); },
  };
}

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
  if (known && error.needsKey) { openSettings(); $("key").focus(); }
}
function hideError() { clearInterval(timer); $("error").hidden = true; }

// ---- Settings

function openSettings() {
  const chosen = store.settings();
  for (const name of NUMBERS) $(`s-${name}`).value = chosen[name] ?? "";
  $("s-stop").value = (chosen.stop ?? []).join("\n");
  $("system").value = current.system;
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
function closeSettings(event) {
  const chosen = readSettings();
  if (typeof chosen === "string") {
    event.preventDefault();
    $("settings-error").textContent = chosen;
    $("settings-error").hidden = false;
    return;
  }
  store.keepSettings(chosen);
  keepKey($("key").value);
  current.system = $("system").value;
  if (current.messages.length) keep(current);
  if (!model) findModel();
}

// ---- Files

function download(conversations, name) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([store.toFile(conversations)], {type: "application/jsonl"}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
async function importFile(file) {
  try {
    const found = store.fromFile(await file.text());
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
$("composer").onsubmit = (e) => {
  e.preventDefault();
  const text = $("input").value;
  if (!text.trim() || running.has(current.id)) return;
  const unanswered = current.messages.at(-1)?.role === "user" ? [current.messages.pop().content] : [];
  $("input").value = "";
  grow();
  say([...unanswered, text].join("\n\n"));
};
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
$("open-settings").onclick = openSettings;
$("settings-done").onclick = closeSettings;
addEventListener("pagehide", () => { for (const {conversation} of running.values()) store.save(conversation); });
addEventListener("storage", (e) => {  // another tab wrote
  const id = store.isConversation(e.key);
  if (id === current.id && !running.has(id) && editing < 0) { const other = store.load(id); if (other) { current = other; drawAll(); } } else if (id) drawList();
});
open(store.load(sessionStorage.getItem("gptjax.current")) ?? store.newConversation());
findModel();
pageFacts().then((found) => { facts = found; });
showLabelling($("to-label"));
