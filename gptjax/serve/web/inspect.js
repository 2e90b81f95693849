// The inspector's numbers drawn: in the file that `gptjax inspect` writes, and on the server's page.
"use strict";
const $ = (id) => document.getElementById(id);
const shown = (text) => text === "" ? "∅" : text.trim() === "" ? text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") : text.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
const heat = (x) => `rgba(var(--heat), ${Math.max(0, Math.min(1, x)).toFixed(3)})`;
const percent = (p, digits = 2) => `${(100 * p).toFixed(digits)} %`;
const element = (tag, text, cls) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (cls) e.className = cls; return e; };
let D, W, L, N, H, at = 0, head = 0;
const weight = (n, h, l, m) => m > l ? 0 : W[(n * H + h) * (L * (L + 1) / 2) + l * (l + 1) / 2 + m] / 255;

function show(data) {
  D = data;
  W = Uint8Array.from(atob(D.weights), (c) => c.charCodeAt(0));
  L = D.ids.length; N = D.model.layers; H = D.model.heads;
  at = L - 1; head = 0;
  $("tokens").replaceChildren(); $("heads").replaceChildren();
  const known = D.loss.slice(1), mean = known.reduce((a, b) => a + b, 0) / known.length;
  $("facts").textContent = `${D.model.run.split("/").at(-1)}, step ${D.model.step.toLocaleString()}: ${D.model.parameters.toLocaleString()} parameters, ${N} layers with ${H} heads, vectors of ${D.model.width}.` +
    (known.length ? ` Mean loss of this text: ${mean.toFixed(3)} nats a token.` : "");
  $("layer").max = N; $("layer").value = N;
  $("found").hidden = false;
  draw();
}
function pick(i) { at = Math.max(0, Math.min(L - 1, i)); draw(); }
function drawTokens() {
  const box = $("tokens");
  if (!box.children.length) D.tokens.forEach((text, i) => {
    const b = element("button", shown(text)), loss = D.loss[i];
    b.type = "button";
    b.style.background = loss === null ? "transparent" : heat(0.6 * loss / 12);
    b.title = loss === null ? "the first token: nothing predicts it" : `loss ${loss.toFixed(2)} nats, ${D.rank[i].toLocaleString()} tokens were likelier`;
    b.setAttribute("aria-label", `${shown(text)}, ${b.title}`);
    b.onclick = () => pick(i);
    b.onkeydown = (e) => {
      const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: L - 1}[e.key];
      if (to !== undefined) { e.preventDefault(); pick(to); box.children[at].focus(); }
    };
    box.append(b);
  });
  [...box.children].forEach((b, i) => { b.setAttribute("aria-pressed", i === at); b.tabIndex = i === at ? 0 : -1; });
  const loss = D.loss[at];
  $("chosen").textContent = `Place ${at + 1} of ${L}: “${shown(D.tokens[at])}”, id ${D.ids[at]}. ` +
    (loss === null ? "Nothing comes before it." : `Its loss was ${loss.toFixed(3)} nats (probability ${(Math.exp(-loss) * 100).toPrecision(3)} %); ${D.rank[at].toLocaleString()} tokens were likelier.`);
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
  for (let l = 0; l < L; l++) for (let m = 0; m <= l; m++) {
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
  const share = D.tokens.map((_, m) => weight(n, head, at, m));
  const best = share.map((w, m) => [w, m]).sort((a, b) => b[0] - a[0]).slice(0, 3).filter(([w]) => w > 0);
  $("read").textContent = `From place ${at + 1}, head ${head + 1} of layer ${n + 1} reads: ` +
    best.map(([w, m]) => `“${shown(D.tokens[m])}” ${percent(w, 0)}`).join(", ");
  $("attended").replaceChildren(...D.tokens.slice(0, at + 1).map((text, m) => {
    const s = element("span", shown(text));
    s.style.background = heat(0.6 * share[m]);
    s.title = percent(share[m], 1);
    return s;
  }));
  drawFlow(n);
}
function drawFlow(n) {
  const first = Math.max(0, at - 10), places = [];
  for (let m = first; m <= at; m++) places.push(m);
  const step = 74, left = 84, width = left + step * places.length + 190, x = (i) => left + i * step + step / 2;
  const NS = "http://www.w3.org/2000/svg", svg = document.createElementNS(NS, "svg");
  svg.setAttribute("width", width); svg.setAttribute("height", 330); svg.setAttribute("role", "img");
  const add = (tag, attributes, text) => { const e = document.createElementNS(NS, tag); for (const k in attributes) e.setAttribute(k, attributes[k]); if (text !== undefined) e.textContent = text; svg.append(e); return e; };
  const mean = (m) => { let s = 0; for (let h = 0; h < H; h++) s += weight(n, h, at, m); return s / H; };
  const to = x(places.length - 1), guesses = D.lens[n + 1][at];
  svg.setAttribute("aria-label", `Layer ${n + 1}: place ${at + 1} reads ${places.map((m) => `${shown(D.tokens[m])} ${percent(mean(m), 0)}`).join(", ")}; then the MLP; then ${guesses.map(([id, p]) => `${shown(D.texts[id])} ${percent(p, 0)}`).join(", ")}`);
  [["tokens", 24], ["stream in", 62], ["attention", 130], ["MLP", 220], ["stream out", 292]].forEach(([t, y]) => add("text", {x: 4, y, class: "soft"}, t));
  places.forEach((m, i) => {
    add("text", {x: x(i), y: 24, "text-anchor": "middle"}, shown(D.tokens[m]).slice(0, 10));
    add("line", {x1: x(i), x2: x(i), y1: 66, y2: 280, class: "line", "stroke-width": 2});
    add("text", {x: x(i), y: 60, "text-anchor": "middle", class: "soft"}, D.rms[n][m].toFixed(2));
    add("rect", {x: x(i) - 30, y: 204, width: 60, height: 26, rx: 5, class: m === at ? "box accent" : "box line", "stroke-width": 2});
    add("text", {x: x(i), y: 221, "text-anchor": "middle"}, "MLP");
    add("text", {x: x(i), y: 294, "text-anchor": "middle", class: "soft"}, D.rms[n + 1][m].toFixed(2));
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
    for (let m = 0; m < first; m++) before += mean(m);
    add("text", {x: left - 20, y: 24, class: "soft"}, "…");
    add("text", {x: 0, y: 192, class: "soft"}, `before: ${percent(before, 0)}`);
  }
  $("flow").replaceChildren(svg);
  $("flow").scrollLeft = width;  // to the chosen place
}
function drawNear() {
  $("near").replaceChildren(...D.neighbours[D.ids[at]].map(([id, c]) => {
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
