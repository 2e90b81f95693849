// Conversations kept in the browser, and as files in the form that `gptjax sft` reads: {"messages": [...]} a line.

const PREFIX = "gptjax.chat.", SETTINGS = "gptjax.settings";
const ROLES = {human: "user", gpt: "assistant", user: "user", assistant: "assistant", system: "system", tool: "tool"};

export function newConversation(system = "") {
  const now = Date.now();
  return {id: `${now.toString(36)}${Math.random().toString(36).slice(2, 8)}`, changed: now, system, messages: []};
}
export const titleOf = (conversation) => {
  const first = conversation.messages.find((m) => m.role === "user")?.content.trim().replace(/\s+/g, " ") ?? "";
  return [...first].slice(0, 60).join("") || "New conversation";
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
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch { return false; }
}
export const remove = (id) => localStorage.removeItem(PREFIX + id);
export const isConversation = (key) => key?.startsWith(PREFIX) ? key.slice(PREFIX.length) : null;

export function settings() {
  try { return JSON.parse(localStorage.getItem(SETTINGS)) ?? {}; } catch { return {}; }
}
export function keepSettings(values) { try { localStorage.setItem(SETTINGS, JSON.stringify(values)); } catch { /* said when a conversation is kept */ } }

// What the model is sent, and files hold: the system message before the others, nothing of this page's own.
export function messagesOf(conversation) {
  const system = conversation.system.trim() ? [{role: "system", content: conversation.system}] : [];
  const kept = conversation.messages.map((m) => {
    const message = {role: m.role, content: m.content};
    for (const name of ["tool_calls", "tool_call_id", "name"]) if (m[name] !== undefined) message[name] = m[name];
    return message;
  });
  return [...system, ...kept];
}
export const toFile = (conversations) => conversations.filter((c) => c.messages.length).map((c) => JSON.stringify({messages: messagesOf(c)}) + "\n").join("");

// The conversations of a file; throws an Error that names the line.
export function fromFile(text) {
  const found = [];
  text.split(/\r?\n/).forEach((line, i) => {
    if (!line.trim()) return;
    let record;
    try { record = JSON.parse(line); } catch { throw new Error(`line ${i + 1} is no JSON`); }
    const turns = record?.messages ?? record?.conversations?.map?.((t) => ({role: t.from, content: t.value})) ??
      (typeof record?.prompt === "string" ? [{role: "user", content: record.prompt}, {role: "assistant", content: record.completion}] : null);
    const right = Array.isArray(turns) && turns.every((t) => t && ROLES[t.role] && (typeof t.content === "string" || (t.content === null && t.tool_calls)));
    if (!right) throw new Error(`line ${i + 1} has no messages with roles and texts`);
    const conversation = newConversation();
    conversation.messages = turns.map((t) => ({...t, role: ROLES[t.role], content: t.content ?? ""}));
    if (conversation.messages[0]?.role === "system") conversation.system = conversation.messages.shift().content;
    found.push(conversation);
  });
  if (!found.length) throw new Error("it holds no conversation");
  return found;
}
