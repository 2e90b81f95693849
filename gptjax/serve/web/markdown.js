// Markdown drawn as nodes: headings, lists, quotes, code, tables, emphasis and links. Text never becomes HTML.

const make = (tag, cls, text) => { const e = document.createElement(tag); if (cls) e.className = cls; if (text !== undefined) e.textContent = text; return e; };
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/, HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/, RULE = /^ {0,3}([-*_])\s*(?:\1\s*){2,}$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/, QUOTE = /^ {0,3}>\s?(.*)$/, DASHES = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

// The text in blocks: {kind, raw, ...}. What a block is follows from its lines and the one before it alone.
export function blocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n"), found = [];
  let i = 0;
  const add = (kind, start, more) => found.push({kind, raw: lines.slice(start, i).join("\n"), ...more});
  const begins = (line, next) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line) || isTable(line, next);
  while (i < lines.length) {
    const start = i, line = lines[i];
    let match;
    if (!line.trim()) { i++; continue; }
    if ((match = FENCE.exec(line))) {
      const [, mark, language] = match, close = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}\\s*$`);
      i++;
      while (i < lines.length && !close.test(lines[i])) i++;
      const code = lines.slice(start + 1, i).join("\n");
      i = Math.min(i + 1, lines.length);
      add("code", start, {code, language: language.trim().split(/\s/)[0]});
    } else if ((match = HEADING.exec(line))) { i++; add("heading", start, {level: match[1].length, text: match[2]}); }
    else if (RULE.test(line)) { i++; add("rule", start); }
    else if (QUOTE.test(line)) {
      const inside = [];
      while (i < lines.length && (match = QUOTE.exec(lines[i]))) { inside.push(match[1]); i++; }
      add("quote", start, {text: inside.join("\n")});
    } else if (isTable(line, lines[i + 1])) {
      i += 2;
      while (i < lines.length && lines[i].includes("|") && lines[i].trim()) i++;
      add("table", start, {rows: [line, ...lines.slice(start + 2, i)].map(cells)});
    } else if ((match = ITEM.exec(line))) {
      const [, indent, mark] = match;
      const other = (at) => { const m = ITEM.exec(at); return m && m[1].length <= indent.length + 1 && /\d/.test(m[2]) !== /\d/.test(mark); };
      while (i < lines.length && !other(lines[i]) && (lines[i].trim() ? ITEM.test(lines[i]) || /^\s{2,}/.test(lines[i]) || (lines[i - 1].trim() && !begins(lines[i], lines[i + 1])) : /^\s{2,}\S|^\s*([-*+]|\d{1,9}[.)])\s/.test(lines[i + 1] ?? ""))) i++;
      add("list", start, {lines: lines.slice(start, i)});
    } else {
      i++;
      while (i < lines.length && lines[i].trim() && !begins(lines[i], lines[i + 1])) i++;
      add("paragraph", start, {text: lines.slice(start, i).join("\n")});
    }
  }
  return found;
}
const isTable = (line, next) => line.includes("|") && next !== undefined && next.includes("-") && DASHES.test(next) && cells(line).length === cells(next).length;
const cells = (line) => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replace(/\\\|/g, "|"));

// Draws the text into a container, whose blocks that did not change stay as they are: a stream redraws its end alone.
export function draw(container, text) {
  const wanted = blocks(text), there = container.children;
  wanted.forEach((block, i) => {
    const old = there[i];
    if (old && old.raw === block.raw && old.kind === block.kind) return;
    if (old && old.kind === "code" && block.kind === "code" && old.language === block.language) old.querySelector("code").textContent = block.code;
    else { const node = drawn(block, 0); node.kind = block.kind; node.language = block.language; if (old) old.replaceWith(node); else container.append(node); }
    there[i].raw = block.raw;
  });
  while (there.length > wanted.length) container.lastChild.remove();
}

function drawn(block, depth) {
  if (block.kind === "code") return codeBlock(block);
  if (block.kind === "rule") return make("hr");
  if (block.kind === "heading") return inline(make(`h${Math.min(6, block.level + 2)}`), block.text);  // the page's own stand above
  if (block.kind === "table") return table(block.rows);
  if (block.kind === "list") return list(block.lines, depth);
  if (block.kind === "quote") { const node = make("blockquote"); nested(node, block.text, depth); return node; }
  return inline(make("p"), block.text);
}
function nested(node, text, depth) {
  if (depth < 8) for (const block of blocks(text)) node.append(drawn(block, depth + 1));
  else node.append(make("p", "", text));
}
function codeBlock({code, language}) {
  const node = make("div", "code"), head = make("div", "code-head"), pre = make("pre"), button = make("button", "plain", "Copy code");
  button.type = "button";
  button.addEventListener("click", () => copy(pre.textContent, button));
  head.append(make("span", "", language || "text"), button);
  pre.tabIndex = 0;
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", `Code${language ? `, ${language}` : ""}`);
  pre.append(make("code", "", code));
  node.append(head, pre);
  return node;
}
function table([head, ...rows]) {
  const around = make("div", "table"), node = make("table"), top = make("thead"), body = make("tbody");
  const row = (texts, tag) => { const tr = make("tr"); head.forEach((_, i) => { const cell = inline(make(tag), texts[i] ?? ""); if (tag === "th") cell.scope = "col"; tr.append(cell); }); return tr; };
  top.append(row(head, "th"));
  rows.forEach((texts) => body.append(row(texts, "td")));
  node.append(top, body);
  around.append(node);
  around.tabIndex = 0;
  around.setAttribute("role", "group");
  around.setAttribute("aria-label", "Table");
  return around;
}
function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]), ordered = /\d/.test(mark), node = make(ordered ? "ol" : "ul");
  if (ordered) node.start = parseInt(mark, 10);
  let item = null;
  const close = () => {
    if (!item) return;
    const li = make("li"), [first, ...rest] = item;
    const more = rest.map((line) => line.replace(/^\s{1,4}/, (s) => s.slice(0, Math.min(s.length, indent.length + mark.length + 1)))).join("\n");
    inline(li, first);
    if (more.trim()) nested(li, more, depth);
    node.append(li);
  };
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && match[1].length <= indent.length + 1) { close(); item = [match[3]]; }
    else item.push(line);
  }
  close();
  return node;
}

const PUNCTUATION = /[!-/:-@[-`{-~]/, WORD = /[\p{L}\p{N}_]/u;

// Adds a text with its emphasis, code and links to a node.
export function inline(node, text, depth = 0) {
  let i = 0, plain = "";
  const never = new Set();  // marks that have no partner in the rest of the text
  const flush = () => { if (plain) node.append(plain); plain = ""; };
  const wrap = (tag, inside, next) => { flush(); node.append(inline(make(tag), inside, depth + 1)); i = next; };
  while (i < text.length) {
    const c = text[i];
    if (c === "\\" && PUNCTUATION.test(text[i + 1] ?? "")) { plain += text[i + 1]; i += 2; continue; }
    if (c === "\n") { flush(); node.append(make("br")); i++; continue; }
    if (c === "`") {
      const mark = /^`+/.exec(text.slice(i, i + 64))[0], close = never.has(mark) ? -1 : closing(text, mark, i + mark.length);
      if (close > 0) { flush(); node.append(make("code", "", text.slice(i + mark.length, close).replace(/^ (.*\S.*) $/s, "$1"))); i = close + mark.length; continue; }
      never.add(mark);
      plain += mark; i += mark.length; continue;
    }
    if ((c === "*" || c === "_" || c === "~") && depth < 8) {
      const mark = text[i + 1] === c ? c + c : c;
      const opens = mark !== "~" && !never.has(mark) && /\S/.test(text[i + mark.length] ?? " ") && !(c === "_" && WORD.test(text[i - 1] ?? " "));
      const close = opens ? partner(text, mark, i + mark.length) : -1;
      if (close > 0) { wrap(mark.length === 1 ? "em" : c === "~" ? "del" : "strong", text.slice(i + mark.length, close), close + mark.length); continue; }
      if (opens) never.add(mark);
      plain += mark; i += mark.length; continue;
    }
    if (c === "[" || (c === "!" && text[i + 1] === "[")) {
      const match = /^!?\[([^\[\]]{0,500})\]\(\s*<?([^\s()<>]{1,2000}(?:\([^\s()<>]{0,200}\)[^\s()<>]{0,2000})?)>?(?:\s+"[^"]{0,300}")?\s*\)/.exec(text.slice(i, i + 5000));
      if (match) { flush(); node.append(link(match[2], match[1] || match[2], depth)); i += match[0].length; continue; }
    }
    if (c === "h" && text.startsWith("http", i) && !WORD.test(text[i - 1] ?? " ")) {
      const match = /^https?:\/\/[^\s<>"'`*\u3000-\u303f\uff00-\uffef]{1,2000}/.exec(text.slice(i, i + 2010));
      if (match) {
        let url = match[0].replace(/[.,;:!?]+$/, "");
        if (url.endsWith(")") && !url.includes("(")) url = url.slice(0, -1);
        flush(); node.append(link(url, url, 9)); i += url.length; continue;
      }
    }
    plain += c; i++;
  }
  flush();
  return node;
}
function closing(text, mark, from) {
  for (let at = text.indexOf(mark, from); at >= 0; at = text.indexOf(mark, at)) {
    let end = at;
    while (text[end] === "`") end++;
    if (end - at === mark.length) return at;
    at = end;
  }
  return -1;
}
function partner(text, mark, from) {
  for (let at = text.indexOf(mark, from + 1); at >= 0; at = text.indexOf(mark, at + 1)) {
    const doubled = mark.length === 1 && (text[at + 1] === mark || text[at - 1] === mark);
    if (doubled) { while (text[at + 1] === mark) at++; continue; }
    if (text[at - 1] === "\\" || /\s/.test(text[at - 1])) continue;
    if (mark[0] === "_" && WORD.test(text[at + mark.length] ?? " ")) continue;
    return mark.length === 2 && text[at + 2] === mark[0] ? at + 1 : at;
  }
  return -1;
}
// Only to the web, and to a page that learns nothing of this one; everything else stays text.
function link(target, label, depth) {
  let url = null;
  try { url = new URL(target); } catch { /* no address */ }
  if (!url || !["http:", "https:"].includes(url.protocol)) return inline(make("span"), label, depth + 1);
  const a = make("a");
  a.href = url.href;
  a.rel = "noopener noreferrer nofollow";
  a.target = "_blank";
  return depth > 8 ? (a.textContent = label, a) : inline(a, label, 9);
}

export async function copy(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "The browser does not allow it";
  }
  setTimeout(() => { button.textContent = before; }, 1500);
}
