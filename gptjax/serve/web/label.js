// Labelling: answers are written, or ranked from best to worst with ties. Each is on the server's disk before the next
// prompt comes; what is being written stays in the browser until then.
import {apiKey, ask, keepKey} from "/web/api.js";

const $ = (id) => document.getElementById(id);
const make = (tag, cls, text) => { const e = document.createElement(tag); if (cls) e.className = cls; if (text !== undefined) e.textContent = text; return e; };
const letter = (i) => String.fromCharCode(65 + i);
let kind = "", task = null, ranks = [], busy = false;

const draftKey = () => `gptjax.label.${kind}.${$("name").value}.${task.id}`;
function keepDraft() {
  try { localStorage.setItem(draftKey(), JSON.stringify(kind === "rankings" ? ranks : $("answer").value)); } catch { /* the answer can still be saved */ }
}
function draft() { try { return JSON.parse(localStorage.getItem(draftKey())); } catch { return null; } }

async function send(path, more = {}) {
  if (busy) return;
  busy = true;
  $("error").hidden = true;
  const waits = setTimeout(() => { $("progress").textContent = kind === "rankings" ? "The model is writing its answers …" : "Saving …"; }, 400);
  for (const id of ["save", "skip", "back", "write", "rank", "back-done"]) $(id).disabled = true;
  try {
    const name = $("name").value.trim().normalize("NFC"), state = await ask(path, {kind, name, ...more});
    if (path === "/label/answer" && task && !more.take_back) localStorage.removeItem(draftKey());
    sessionStorage.setItem("gptjax.label", JSON.stringify({name, kind}));
    show(state);
  } catch (error) {
    $("error").textContent = error.message;
    $("error").hidden = false;
    $("progress").textContent = "";
    if (error.needsKey) { $("key-line").hidden = false; $("key").focus(); }
  } finally {
    clearTimeout(waits);
    busy = false;
    for (const id of ["skip", "back", "write", "rank", "back-done"]) $(id).disabled = false;
    ready();
  }
}
function show(state) {
  task = state.task;
  $("progress").textContent = `${state.done} of ${state.of} ${kind === "rankings" ? "ranked" : "written"}` + (state.skipped ? `, ${state.skipped} skipped` : "");
  $("task").hidden = !task;
  $("done").hidden = Boolean(task);
  if (!task) { $("back-done").focus(); return; }
  $("prompt").replaceChildren(...task.messages.map(({role, content}) => {
    const turn = make("p", "turn");
    turn.dir = "auto";
    turn.append(make("b", "", role), content);
    return turn;
  }));
  $("writing").hidden = kind === "rankings";
  $("ranking").hidden = kind !== "rankings";
  const kept = draft();
  if (kind === "rankings") {
    ranks = task.answers.map((_, i) => Array.isArray(kept) ? kept[i] ?? 0 : 0);
    $("how").textContent = task.answers.length < 2 ? "The model says only one thing here: there is nothing to rank. Skip this prompt." :
      `1 is the best, ${task.answers.length} the worst; equal ranks are a tie. Press 1 to ${task.answers.length} on an answer, or drag it to a rank.`;
    drawCards();
    $("answers").querySelector(".card")?.focus();
  } else {
    $("answer").value = typeof kept === "string" ? kept : "";
    $("answer").focus();
  }
}

// ---- Ranking

function drawCards() {
  const K = task.answers.length;
  $("answers").replaceChildren(...task.answers.map((text, i) => {
    const card = make("li", "card"), head = make("h3"), choice = make("span", "ranks"), body = make("div", "text", text || "(an empty answer)");
    card.tabIndex = 0;
    card.draggable = true;
    card.setAttribute("aria-label", `Answer ${letter(i)}`);
    choice.setAttribute("role", "group");
    choice.setAttribute("aria-label", `Rank of answer ${letter(i)}`);
    for (let r = 1; r <= K; r++) {
      const b = make("button", "", `${r}`);
      b.type = "button";
      b.onclick = () => place(i, r);
      choice.append(b);
    }
    head.append(make("span", "", `Answer ${letter(i)}`), choice);
    body.dir = "auto";
    body.tabIndex = 0;
    body.setAttribute("role", "group");
    body.setAttribute("aria-label", `Text of answer ${letter(i)}`);
    card.append(head, body);
    card.onkeydown = (e) => {
      const r = Number(e.key), to = {ArrowDown: i + 1, ArrowUp: i - 1}[e.key];
      if (Number.isInteger(r) && r >= 1 && r <= K && !e.ctrlKey && !e.metaKey && !e.altKey) { e.preventDefault(); place(i, r); }
      if (to !== undefined && e.target === card) { e.preventDefault(); $("answers").children[to]?.focus(); }
    };
    dragged(card, i);
    return card;
  }));
  drawRanks();
}
function dragged(node, i) {
  node.ondragstart = (e) => { e.dataTransfer.setData("text/plain", `${i}`); e.dataTransfer.effectAllowed = "move"; node.classList.add("held"); };
  node.ondragend = () => node.classList.remove("held");
}
function place(i, rank) { ranks[i] = rank; keepDraft(); drawRanks(); }
function drawRanks() {
  const K = task.answers.length;
  [...$("answers").children].forEach((card, i) => [...card.querySelectorAll(".ranks button")].forEach((b, r) => b.setAttribute("aria-pressed", ranks[i] === r + 1)));
  $("places").replaceChildren(...Array.from({length: K}, (_, n) => {
    const box = make("div", "place"), name = `Rank ${n + 1}${n === 0 ? ", best" : n === K - 1 ? ", worst" : ""}`;
    box.append(make("b", "", name));
    ranks.forEach((rank, i) => {
      if (rank !== n + 1) return;
      const chip = make("span", "chip", letter(i));
      chip.draggable = true;
      dragged(chip, i);
      box.append(chip);
    });
    box.ondragover = (e) => { e.preventDefault(); box.classList.add("over"); };
    box.ondragleave = () => box.classList.remove("over");
    box.ondrop = (e) => {
      e.preventDefault();
      box.classList.remove("over");
      const i = Number(e.dataTransfer.getData("text/plain"));
      if (Number.isInteger(i) && i >= 0 && i < K) place(i, n + 1);
    };
    return box;
  }));
  ready();
}
// An answer can be saved once it says something: a text, or ranks for all of which two differ.
function ready() {
  const ranked = task?.answers && ranks.length > 1 && ranks.every((r) => r > 0) && new Set(ranks).size > 1;
  $("save").disabled = busy || !task || (kind === "rankings" ? !ranked : !$("answer").value.trim());
}

// ---- The page

function begin(which) {
  if (!$("name").reportValidity()) return;
  kind = which;
  task = null;
  send("/label/next");
}
function save() {
  if ($("save").disabled) return;
  send("/label/answer", kind === "rankings" ? {id: task.id, answers: task.answers, ranks} : {id: task.id, answer: $("answer").value});
}
$("who").onsubmit = (e) => { e.preventDefault(); begin("demonstrations"); };
$("rank").onclick = () => begin("rankings");
$("save").onclick = save;
$("skip").onclick = () => send("/label/answer", {id: task.id, skip: true});
$("back").onclick = $("back-done").onclick = () => send("/label/answer", {take_back: true});
$("answer").oninput = () => { keepDraft(); ready(); };
$("writing").onsubmit = (e) => e.preventDefault();
document.addEventListener("keydown", (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey) && !e.isComposing && task) { e.preventDefault(); save(); } });
$("key").value = apiKey();
$("key").onchange = () => keepKey($("key").value);
try {
  const last = JSON.parse(sessionStorage.getItem("gptjax.label"));
  if (last) { $("name").value = last.name; begin(last.kind); }
} catch { /* a new labeller */ }
