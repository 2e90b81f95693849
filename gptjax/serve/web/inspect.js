// The inspector's numbers drawn: in the file that `gptjax inspect` writes, and on the server's page.
"use strict";
const $ = (id) => document.getElementById(id);
const shown = (text) => text === "" ? "∅" : text.trim() === "" ? text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") : text.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
const heat = (x) => `rgba(var(--heat), ${Math.max(0, Math.min(1, x)).toFixed(3)})`;
const percent = (p, digits = 2) => `${(100 * p).toFixed(digits)} %`;
const element = (tag, text, cls) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (cls) e.className = cls; return e; };
// `starts` are the offsets of the rows of a head's weights: row l has those of places 0 to D.last[l]. A part is what the
// page shows as one: a token of the text, or an image, `image` its number from 0.
let D, W, L, N, H, at = 0, head = 0, starts, parts;
const weight = (n, h, l, m) => m > D.last[l] ? 0 : W[(n * H + h) * starts[L] + starts[l] + m] / 255;
const partOf = (place) => parts.findIndex((part) => place < part.end);
const sum = (part, of) => { let s = 0; for (let m = part.start; m < part.end; m++) s += of(m); return s; };
const name = (place) => {
  const image = D.images[-1 - D.ids[place]];
  if (!image) return `“${shown(D.tokens[place])}”`;
  const i = place - image.start;
  return `image ${-D.ids[place]}, row ${Math.floor(i / image.side) + 1}, column ${i % image.side + 1}`;
};
function partsOf() {
  const found = [];
  for (let i = 0; i < L;) {
    const image = -1 - D.ids[i], end = image < 0 ? i + 1 : i + D.images[image].side ** 2;
    found.push({start: i, end, image});
    i = end;
  }
  return found;
}
function thumbnail(part) {
  const image = element("img");
  image.src = D.images[part.image].picture;
  image.alt = "";
  return image;
}

function show(data) {
  D = data;
  W = Uint8Array.from(atob(D.weights), (c) => c.charCodeAt(0));
  L = D.ids.length; N = D.model.layers; H = D.model.heads;
  at = L - 1; head = 0;
  starts = [0];
  for (const last of D.last) starts.push(starts.at(-1) + last + 1);
  parts = partsOf();
  $("tokens").replaceChildren(); $("sights").replaceChildren(); $("heads").replaceChildren();
  const known = D.loss.filter((x) => x !== null), mean = known.reduce((a, b) => a + b, 0) / known.length;
  $("facts").textContent = `${D.model.run.split("/").at(-1)}, step ${D.model.step.toLocaleString()}: ${D.model.parameters.toLocaleString()} parameters, ${N} layers with ${H} heads, vectors of ${D.model.width}.` +
    (known.length ? ` Mean loss of this text: ${mean.toFixed(3)} nats a token.` : "");
  $("layer").max = N; $("layer").value = N;
  $("found").hidden = false;
  draw();
}
function pick(i) { at = Math.max(0, Math.min(L - 1, i)); draw(); }
function drawTokens() {
  const box = $("tokens"), current = partOf(at);
  if (!box.children.length) parts.forEach((part, p) => {
    const i = part.start, loss = D.loss[i], b = element("button", part.image < 0 ? shown(D.tokens[i]) : undefined);
    b.type = "button";
    b.style.background = loss === null ? "transparent" : heat(0.6 * loss / 12);
    if (part.image >= 0) { b.className = "image"; b.append(thumbnail(part)); b.title = `image ${part.image + 1}: ${part.end - i} tokens, which nothing predicts`; }
    else b.title = loss === null ? "the first token: nothing predicts it" : `loss ${loss.toFixed(2)} nats, ${D.rank[i].toLocaleString()} tokens were likelier`;
    b.setAttribute("aria-label", part.image < 0 ? `${shown(D.tokens[i])}, ${b.title}` : b.title);
    b.onclick = () => pick(part.end - 1);
    b.onkeydown = (e) => {
      const to = {ArrowRight: p + 1, ArrowLeft: p - 1, Home: 0, End: parts.length - 1}[e.key];
      if (to !== undefined && parts[to]) { e.preventDefault(); pick(parts[to].end - 1); box.children[to].focus(); }
    };
    box.append(b);
  });
  [...box.children].forEach((b, p) => { b.setAttribute("aria-pressed", p === current); b.tabIndex = p === current ? 0 : -1; });
  const loss = D.loss[at];
  $("chosen").textContent = `Place ${at + 1} of ${L}: ${name(at)}${D.ids[at] < 0 ? "" : `, id ${D.ids[at]}`}. ` +
    (loss === null ? D.ids[at] < 0 ? "Nothing predicts the tokens of an image." : "Nothing comes before it." : `Its loss was ${loss.toFixed(3)} nats (probability ${(Math.exp(-loss) * 100).toPrecision(3)} %); ${D.rank[at].toLocaleString()} tokens were likelier.`);
}
// What the filters of sampling leave: temperature, top-k, top-p, min-p in this order, each of what the one before left,
// and tokens as likely as the last one kept are kept. Exact while what is left stands among the likeliest in the data;
// beyond them its sum is between `least` and `most`.
function distribution(logP, logScale, T, k, topP, minP) {
  if (T === 0) return {p: logP.map((_, i) => i === 0 ? 1 : 0), count: 1, most: 1, least: 1};
  const row = Math.round(T * 20) - 1, p = logP.map((x) => Math.exp(x / T - logScale[row]));
  let count = k ? k : Infinity;
  const tied = (n) => { while (n < p.length && logP[n] === logP[n - 1]) n++; return n; };
  const sum = (n) => p.slice(0, n).reduce((a, b) => a + b, 0);
  if (k) count = tied(Math.min(k, p.length));
  let most = k ? sum(count) : 1, least = most;
  if (topP < 1) {
    const whole = most;
    let before = 0, n = 0;
    while (n < Math.min(count, p.length) && before < topP * whole) before += p[n++];
    if (before >= topP * whole || k) { count = tied(n); most = least = sum(count); }
    else { least = topP * whole; most = Math.min(whole, least + p[p.length - 1]); }
  }
  if (minP > 0) {
    const n = p.filter((x) => x >= minP * p[0]).length;
    if (n < p.length || count <= p.length) { count = Math.min(count, n); most = least = sum(count); }
    else least = Math.min(least, Math.max(sum(p.length), 0));
  }
  return {p: p.map((x, i) => i < count ? x / most : 0), count, most, least};
}
function drawNext() {
  for (const id of ["temperature", "topk", "topp", "minp"]) $(`o-${id}`).textContent = $(id).value;
  const d = distribution(D.next_log_p[at], D.log_scale[at], ...["temperature", "topk", "topp", "minp"].map((id) => +$(id).value));
  const all = d.count === Infinity && d.most === 1 && d.least === 1;
  $("left").textContent = all ? "Every token is left to draw from." : d.count <= D.next_ids[at].length ? `Left to draw from: ${d.count} ${d.count === 1 ? "token" : "tokens"}.` :
    `More than ${D.next_ids[at].length} tokens are left to draw from; the probabilities are right to ${percent(d.most / d.least - 1, 1)} of their size.`;
  $("next").replaceChildren(...D.next_ids[at].slice(0, 12).map((id, i) => {
    const row = element("tr"), bar = element("span", "", "bar"), cell = element("td");
    bar.style.width = `${Math.round(120 * d.p[i])}px`;
    cell.append(bar);
    row.append(element("td", shown(D.texts[id]), "token"), element("td", percent(d.p[i]), "number"), cell);
    return row;
  }));
}
function drawLens() {
  $("lens").replaceChildren(...D.lens.map((layer, n) => {
    const row = element("tr"), name = element("th", n === 0 ? "embedding" : `${n}`);
    name.scope = "row";
    row.append(name);
    for (const [id, p] of layer[at]) {
      const cell = element("td", `${shown(D.texts[id]).slice(0, 12)} ${percent(p, 0)}`, "token");
      cell.style.background = heat(p * 0.6);
      row.append(cell);
    }
    row.append(element("td", D.rms[n][at].toFixed(2), "number"));
    return row;
  }));
}
function drawHead(canvas, n, h, size) {
  const cell = Math.max(1, Math.floor(size / L)), style = getComputedStyle(document.documentElement);
  canvas.width = canvas.height = cell * L;
  const g = canvas.getContext("2d");
  const [r, b, c] = style.getPropertyValue("--heat").split(",").map(Number);
  for (let l = 0; l < L; l++) for (let m = 0; m <= D.last[l]; m++) {
    g.fillStyle = `rgba(${r}, ${b}, ${c}, ${Math.sqrt(weight(n, h, l, m))})`;
    g.fillRect(m * cell, l * cell, cell, cell);
  }
  g.strokeStyle = style.getPropertyValue("--mark");
  g.strokeRect(0.5, at * cell + 0.5, cell * L - 1, Math.max(1, cell - 1));
}
function drawAttention() {
  const n = +$("layer").value - 1, box = $("heads");
  $("o-layer").textContent = `${n + 1} of ${N}`;
  if (!box.children.length) for (let h = 0; h < H; h++) {
    const b = element("button");
    b.type = "button";
    b.append(document.createElement("canvas"), element("span", `head ${h + 1}`));
    b.onclick = () => { head = h; drawAttention(); };
    box.append(b);
  }
  [...box.children].forEach((b, h) => { b.setAttribute("aria-pressed", h === head); drawHead(b.firstChild, n, h, 96); });
  const share = D.tokens.map((_, m) => weight(n, head, at, m)), read = parts.slice(0, partOf(at) + 1);
  const shares = read.map((part) => sum(part, (m) => share[m])), called = (part) => part.image < 0 ? `“${shown(D.tokens[part.start])}”` : `image ${part.image + 1}`;
  const best = read.map((part, p) => [shares[p], part]).sort((a, b) => b[0] - a[0]).slice(0, 3).filter(([w]) => w > 0);
  $("read").textContent = `From place ${at + 1}, head ${head + 1} of layer ${n + 1} reads: ` +
    best.map(([w, part]) => `${called(part)} ${percent(w, 0)}`).join(", ");
  $("attended").replaceChildren(...read.map((part, p) => {
    const s = element("span", part.image < 0 ? shown(D.tokens[part.start]) : undefined, part.image < 0 ? undefined : "image small");
    if (part.image >= 0) s.append(thumbnail(part), called(part));
    s.style.background = heat(0.6 * shares[p]);
    s.title = percent(shares[p], 1);
    return s;
  }));
  drawSights(share);
  drawFlow(n);
}
// Where the chosen head looks in each image, over the image as the model has it; a cell is a token.
function drawSights(share) {
  const box = $("sights");
  if (!box.children.length) for (const part of parts.filter((p) => p.image >= 0)) {
    const figure = element("figure"), sight = element("div", undefined, "sight"), cells = element("div", undefined, "cells"), {side} = D.images[part.image];
    cells.style.gridTemplate = `repeat(${side}, 1fr) / repeat(${side}, 1fr)`;
    cells.setAttribute("role", "group");
    for (let i = 0; i < side * side; i++) {
      const b = element("button");
      b.type = "button";
      b.onclick = () => pick(part.start + i);
      b.onkeydown = (e) => {
        const to = {ArrowRight: i + 1, ArrowLeft: i - 1, ArrowDown: i + side, ArrowUp: i - side}[e.key];
        if (to !== undefined && cells.children[to]) { e.preventDefault(); pick(part.start + to); cells.children[to].focus(); }
      };
      cells.append(b);
    }
    sight.append(thumbnail(part), cells);
    figure.append(sight, element("figcaption"));
    box.append(figure);
  }
  parts.filter((p) => p.image >= 0).forEach((part, number) => {
    const figure = box.children[number], cells = figure.querySelector(".cells"), own = share.slice(part.start, part.end), most = Math.max(...own);
    const inside = at >= part.start && at < part.end, unseen = D.last[at] < part.start;
    [...cells.children].forEach((b, i) => {
      b.style.backgroundColor = `rgba(213, 0, 50, ${(most ? 0.85 * own[i] / most : 0).toFixed(3)})`;
      b.title = `row ${Math.floor(i / D.images[part.image].side) + 1}, column ${i % D.images[part.image].side + 1}: ${percent(own[i], 1)}`;
      b.setAttribute("aria-label", b.title);
      b.setAttribute("aria-pressed", part.start + i === at);
      b.tabIndex = part.start + i === at || (!inside && i === own.indexOf(most)) ? 0 : -1;
    });
    const total = own.reduce((a, b) => a + b, 0), text = unseen ? `image ${part.image + 1} stands behind the chosen place` : `image ${part.image + 1}: ${percent(total, 0)} of what this head reads; its reddest cell ${percent(most, 1)}`;
    cells.setAttribute("aria-label", text);
    figure.lastChild.textContent = text;
  });
}
function drawFlow(n) {
  const until = partOf(at), first = Math.max(0, until - 10), places = parts.slice(first, until + 1);
  const step = 74, left = 84, width = left + step * places.length + 190, x = (i) => left + i * step + step / 2;
  const NS = "http://www.w3.org/2000/svg", svg = document.createElementNS(NS, "svg");
  svg.setAttribute("width", width); svg.setAttribute("height", 330); svg.setAttribute("role", "img");
  const add = (tag, attributes, text) => { const e = document.createElementNS(NS, tag); for (const k in attributes) e.setAttribute(k, attributes[k]); if (text !== undefined) e.textContent = text; svg.append(e); return e; };
  const mean = (part) => sum(part, (m) => { let s = 0; for (let h = 0; h < H; h++) s += weight(n, h, at, m); return s / H; });
  const rms = (layer, part) => (sum(part, (m) => D.rms[layer][m]) / (part.end - part.start)).toFixed(2), token = (part) => shown(D.tokens[part.start]);
  const to = x(places.length - 1), guesses = D.lens[n + 1][at];
  svg.setAttribute("aria-label", `Layer ${n + 1}: place ${at + 1} reads ${places.map((m) => `${token(m)} ${percent(mean(m), 0)}`).join(", ")}; then the MLP; then ${guesses.map(([id, p]) => `${shown(D.texts[id])} ${percent(p, 0)}`).join(", ")}`);
  [["tokens", 24], ["stream in", 62], ["attention", 130], ["MLP", 220], ["stream out", 292]].forEach(([t, y]) => add("text", {x: 4, y, class: "soft"}, t));
  places.forEach((m, i) => {
    add("text", {x: x(i), y: 24, "text-anchor": "middle"}, token(m).slice(0, 10));
    add("line", {x1: x(i), x2: x(i), y1: 66, y2: 280, class: "line", "stroke-width": 2});
    add("text", {x: x(i), y: 60, "text-anchor": "middle", class: "soft"}, rms(n, m));
    add("rect", {x: x(i) - 30, y: 204, width: 60, height: 26, rx: 5, class: first + i === until ? "box accent" : "box line", "stroke-width": 2});
    add("text", {x: x(i), y: 221, "text-anchor": "middle"}, "MLP");
    add("text", {x: x(i), y: 294, "text-anchor": "middle", class: "soft"}, rms(n + 1, m));
  });
  places.forEach((m, i) => {
    const w = mean(m);
    add("path", {d: `M ${x(i)} 76 C ${x(i)} 150, ${to} 100, ${to} 170`, fill: "none", class: "accent", "stroke-width": 1 + 9 * w, opacity: 0.15 + 0.85 * w});
    add("text", {x: x(i), y: 192, "text-anchor": "middle"}, percent(w, 0));
  });
  // The last vector becomes probabilities.
  add("path", {d: `M ${to + 24} 289 L ${to + 60} 289 L ${to + 60} 250 L ${to + 76} 250`, fill: "none", class: "accent", "stroke-width": 2});
  add("text", {x: to + 80, y: 232, class: "soft"}, n === N - 1 ? "probabilities" : "by the logit lens");
  guesses.forEach(([id, p], i) => {
    add("rect", {x: to + 80, y: 241 + 22 * i, width: Math.max(1, 70 * p), height: 12, class: "fill"});
    add("text", {x: to + 84 + 70 * p, y: 252 + 22 * i}, `${shown(D.texts[id]).slice(0, 12)} ${percent(p, 0)}`);
  });
  if (first > 0) {
    let before = 0;
    for (const part of parts.slice(0, first)) before += mean(part);
    add("text", {x: left - 20, y: 24, class: "soft"}, "…");
    add("text", {x: 0, y: 192, class: "soft"}, `before: ${percent(before, 0)}`);
  }
  $("flow").replaceChildren(svg);
  $("flow").scrollLeft = width;  // to the chosen place
}
function drawNear() {
  $("near").replaceChildren(...(D.neighbours[D.ids[at]] ?? []).map(([id, c]) => {
    const row = element("tr"), bar = element("span", "", "bar"), cell = element("td");
    bar.style.width = `${Math.round(120 * Math.max(0, c))}px`;
    cell.append(bar);
    row.append(element("td", shown(D.texts[id]), "token"), element("td", c.toFixed(3), "number"), cell);
    return row;
  }));
}
function draw() { drawTokens(); drawNext(); drawLens(); drawAttention(); drawNear(); }
["temperature", "topk", "topp", "minp"].forEach((id) => $(id).addEventListener("input", drawNext));
$("layer").addEventListener("input", drawAttention);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => D && drawAttention());
if (!$("data").textContent.startsWith("__")) show(JSON.parse($("data").textContent));
