"use strict";
/* The data: insides[0] is the whole graph. An inside has
     of      the box that opens into it            first  the number of its first box
     size    [width, height]                       at     x, y of each of its boxes
     ports   [text, x, y, width, box or -1]        edges  [from, to, flags, points, label, x, y]
   Edges count the boxes of their inside from 0 on, and then its ports. Flags: 1 to the next copy of a
   repetition, 2 cut, 4 dashed. Points are the start, then two control points and an end for each
   curve. Nothing of the data is ever read as markup: all of it is set as text. */
const data = JSON.parse(document.getElementById("data").textContent);
const {insides, boxes, params} = data;
const $ = id => document.getElementById(id);
const view = $("view"), world = $("world"), card = $("card"), search = $("search"), found = $("found");
const HEAD = 30, PAD = 14, MOST_OPEN = 600, MOST_FOUND = 60;
const SVG = "http://www.w3.org/2000/svg";
const opened = new Set(data.open);
const at = {x: 0, y: 0, k: 1};
let selected = -1, overlay = "", elements = new Map(), extent = [0, 0], fresh = -1;

function make(tag, name, text, parent) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text != null) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}
function draw(tag, attributes, parent) {
  const element = document.createElementNS(SVG, tag);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  parent.append(element);
  return element;
}
const place = (element, x, y, w, h) => Object.assign(element.style,
  {left: x + "px", top: y + "px", width: w + "px", height: h == null ? "" : h + "px"});

// -- which inside a box lies in

const insideOf = new Int32Array(boxes.length);
insides.forEach((inside, i) => insideOf.fill(i, inside.first, inside.first + inside.at.length / 2));
const parentOf = box => insides[insideOf[box]].of;
const opens = box => boxes[box].inside !== undefined;
const isOpen = box => opens(box) && opened.has(box);
const name = box => boxes[box].name || boxes[box].title.join(" ");
const isShown = box => { for (let b = parentOf(box); b >= 0; b = parentOf(b)) if (!isOpen(b)) return false; return true; };

// -- how large everything is with what is opened

/* An axis on which each span is stretched by its factor, the greatest where several overlap. */
function stretched(spans) {
  const cuts = [...new Set(spans.flatMap(s => [s.from, s.to]))].sort((a, b) => a - b), images = [cuts[0]];
  const factors = cuts.map(cut => Math.max(1, ...spans.filter(s => s.from <= cut && s.to > cut).map(s => s.factor)));
  for (let i = 0; i + 1 < cuts.length; i++) images.push(images[i] + factors[i] * (cuts[i + 1] - cuts[i]));
  const map = v => {
    let i = cuts.length - 1;
    while (i >= 0 && cuts[i] > v) i--;
    return i < 0 ? v : images[i] + factors[i] * (v - cuts[i]);
  };
  map.cuts = cuts;
  return map;
}

function measure(number) {
  const inside = insides[number], nodes = [], wide = [], high = [];
  for (let i = 0; i < inside.at.length / 2; i++) {
    const box = inside.first + i, [w, h] = boxes[box].size;
    const node = {box, x0: inside.at[2 * i], y0: inside.at[2 * i + 1], w0: w, h0: h, w, h};
    if (isOpen(box)) {
      node.inner = measure(boxes[box].inside);
      node.w = Math.max(node.inner.w + 2 * PAD, boxes[box].head);
      node.h = node.inner.h + HEAD + PAD;
      wide.push({from: node.x0, to: node.x0 + w, factor: node.w / w});
      high.push({from: node.y0, to: node.y0 + h, factor: node.h / h});
    }
    nodes.push(node);
  }
  for (const [text, x, y, w, box] of inside.ports) nodes.push({port: text, goes: box, x0: x, y0: y, w0: w, h0: 18, w, h: 18});
  const isPlain = !wide.length, mapX = isPlain ? v => v : stretched(wide), mapY = isPlain ? v => v : stretched(high);
  for (const node of nodes) {
    node.x = (mapX(node.x0) + mapX(node.x0 + node.w0) - node.w) / 2;
    node.y = mapY(node.y0);
  }
  return {inside, nodes, isPlain, mapX, mapY, w: mapX(inside.size[0]), h: mapY(inside.size[1])};
}

// -- arrows

const round = v => Math.round(v * 10) / 10;

/* Points along the curves of an edge as it was laid out, a few pixels apart. */
function along(points, {mapX, mapY}) {
  const samples = [[points[0], points[1]]];
  const add = q => { // with a corner wherever an axis begins to be stretched differently
    const p = samples[samples.length - 1], at = [];
    [mapX, mapY].forEach((map, k) => { for (const cut of map.cuts) if ((cut - p[k]) * (cut - q[k]) < 0) at.push((cut - p[k]) / (q[k] - p[k])); });
    for (const t of at.sort((a, b) => a - b)) samples.push([p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])]);
    samples.push(q);
  };
  for (let i = 2; i + 5 < points.length; i += 6) {
    const p = points.slice(i - 2, i + 6), n = Math.max(4, Math.ceil(Math.hypot(p[6] - p[0], p[7] - p[1]) / 10));
    for (let s = 1; s <= n; s++) {
      const t = s / n, u = 1 - t, c = [u * u * u, 3 * u * u * t, 3 * u * t * t, t * t * t];
      add([0, 1].map(k => c[0] * p[k] + c[1] * p[2 + k] + c[2] * p[4 + k] + c[3] * p[6 + k]));
    }
  }
  return samples;
}
/* Where these points are now. A box does not always fill the place that is kept for it: the ends follow it, in the
   gap before the next box. */
function moved(samples, a, b, layout) {
  const placed = (v, from, length, now, size) => // just outside of the box it stays as far from it
    v < from ? now + v - from : v > from + length ? now + size + v - from - length : now + (v - from) * size / length;
  const shift = (node, [x, y]) => [placed(x, node.x0, node.w0, node.x, node.w) - layout.mapX(x), placed(y, node.y0, node.h0, node.y, node.h) - layout.mapY(y)];
  const first = samples[0], last = samples[samples.length - 1], da = shift(a, first), db = shift(b, last);
  const nearness = (p, end) => Math.max(0, 1 - Math.hypot(p[0] - end[0], p[1] - end[1]) / 14);
  return samples.map(p => {
    const wa = nearness(p, first), wb = p === last ? 1 : nearness(p, last) * (1 - wa);
    return [layout.mapX(p[0]) + wa * da[0] + wb * db[0], layout.mapY(p[1]) + wa * da[1] + wb * db[1]];
  });
}
/* A curve through points; its handles are as long as there is room for, so that it never loops. */
function smooth(points) {
  const way = points.map((p, i) => {
    const before = points[i - 1] || p, after = points[i + 1] || p, x = after[0] - before[0], y = after[1] - before[1];
    const length = Math.hypot(x, y) || 1;
    return [x / length, y / length];
  });
  let path = "M" + points[0].map(round);
  for (let i = 0; i + 1 < points.length; i++) {
    const a = points[i], b = points[i + 1], reach = Math.hypot(b[0] - a[0], b[1] - a[1]) / 3;
    path += "C" + [a[0] + reach * way[i][0], a[1] + reach * way[i][1], b[0] - reach * way[i + 1][0], b[1] - reach * way[i + 1][1], ...b].map(round);
  }
  return path;
}
function drawEdge(layout, [from, to, flags, points, label, lx, ly], svg, labels) {
  const a = layout.nodes[from], b = layout.nodes[to];
  let path, middle = [lx, ly];
  if (layout.isPlain) path = "M" + points.slice(0, 2) + "C" + points.slice(2);
  else {
    const samples = along(points, layout), places = moved(samples, a, b, layout);
    const [start, end] = [places[0], places[places.length - 1]], drop = end[1] - start[1];
    const isShort = points.length === 8 && drop > 0;
    path = isShort ? `M${start.map(round)}C${[start[0], start[1] + drop / 2.5, end[0], end[1] - drop / 2.5, ...end].map(round)}` : smooth(places);
    if (label) { // it stays as far beside the arrow as it was
      const i = samples.reduce((best, s, i) => Math.abs(s[1] - ly) < Math.abs(samples[best][1] - ly) ? i : best, 0);
      const [x, y] = isShort ? [0, 1].map(k => (start[k] + end[k]) / 2) : places[i];
      middle = [x + lx - samples[i][0], y];
    }
  }
  const kind = flags & 2 ? " cut" : flags ? " dashed" : "";
  const edge = draw("path", {d: path, class: "e" + kind}, svg);
  edge.ends = [a.box ?? -1, b.box ?? -1, a.goes ?? -1, b.goes ?? -1];
  if (label) labels.push([label, middle, kind]);
}

// -- boxes

const colour = ([share]) => share < 0 ? "var(--alarm)" : `color-mix(in srgb, var(--high) ${Math.round(share * 100)}%, var(--low))`;

function mark(box, element, small) {
  const found = overlay && (boxes[box].marks || {})[overlay];
  if (!found) return;
  element.style.setProperty("--colour", colour(found));
  if (!small) element.classList.add("marked");
  make("span", "mark", found[1], element);
}
function spoken(box) {
  const b = boxes[box], parts = [name(box), b.kind, ...(b.small || [])];
  if (b.root) parts.push("backward starts here");
  if (b.count) parts.push(`repeated ${b.count} times, the first is shown`);
  if (overlay && b.marks && b.marks[overlay]) parts.push(b.marks[overlay][1]);
  return parts.filter(Boolean).join(", ");
}
function button(element, box) {
  element.tabIndex = 0;
  element.box = box;
  element.setAttribute("role", "button");
  element.setAttribute("aria-label", spoken(box));
  if (opens(box)) element.setAttribute("aria-expanded", isOpen(box));
  elements.set(box, element);
}
function closedBox(node, parent) {
  const b = boxes[node.box];
  const element = make("div", `box ${b.root ? "root" : b.look}`, null, parent);
  if (opens(node.box)) element.classList.add("opens");
  if (b.count) element.classList.add("many");
  place(element, node.x, node.y, node.w, node.h);
  b.title.forEach((line, i) => {
    const title = make("div", "t", line, element);
    if (b.kind && i === b.title.length - 1) make("small", "", b.kind, title);
  });
  for (const line of b.small || []) make("small", "", line, element);
  if (b.root) make("small", "", "▲ backward starts here", element);
  button(element, node.box);
  mark(node.box, element);
}
function openBox(node, parent, depth) {
  const b = boxes[node.box], frame = make("div", "frame", null, parent);
  frame.classList.toggle("odd", depth % 2 === 1);
  frame.classList.toggle("many", !!b.count);
  frame.classList.toggle("new", node.box === fresh);
  frame.box = node.box;
  place(frame, node.x, node.y, node.w, node.h);
  const head = make("div", "head", null, frame);
  head.title = name(node.box);
  make("span", "t", b.title.join(" "), head);
  const kind = b.count ? `${b.look === "sequence" || !b.kind ? "" : b.kind + " · "}the first is shown` : b.kind;
  if (kind) make("small", "", kind, head);
  mark(node.box, head, true);
  button(head, node.box);
  const inner = build(node.inner, depth + 1);
  place(inner, (node.w - node.inner.w) / 2 - 1, HEAD, node.inner.w, node.inner.h);
  frame.append(inner);
}
function build(layout, depth) {
  const element = make("div", "inside");
  const svg = draw("svg", {width: 1, height: 1, "aria-hidden": "true"}, element), labels = [];
  for (const edge of layout.inside.edges) drawEdge(layout, edge, svg, labels);
  for (const [text, [x, y], kind] of labels) draw("text", {x: round(x), y: round(y), class: "el" + kind}, svg).textContent = text;
  for (const node of layout.nodes) {
    if (node.inner) openBox(node, element, depth);
    else if (node.port === undefined) closedBox(node, element);
    else {
      const port = make(node.goes < 0 ? "div" : "button", "port", node.port, element);
      place(port, node.x, node.y, node.w, 18);
      if (node.goes >= 0) { port.type = "button"; port.onclick = () => show(node.goes); port.title = name(node.goes); }
    }
  }
  return element;
}
function redraw() {
  const focused = document.activeElement && document.activeElement.box;
  const layout = measure(0);
  elements = new Map();
  extent = [layout.w, layout.h];
  world.replaceChildren(build(layout, 0));
  world.classList.toggle("overlaid", !!overlay);
  fresh = -1;
  emphasise();
  if (focused !== undefined && elements.has(focused)) elements.get(focused).focus({preventScroll: true});
}
function emphasise() {
  for (const element of world.querySelectorAll(".on")) element.classList.remove("on");
  for (const edge of world.querySelectorAll(".e")) edge.classList.toggle("near", selected >= 0 && edge.ends.includes(selected));
  const element = elements.get(selected);
  if (element) (isOpen(selected) ? element.parentNode : element).classList.add("on");
}

// -- moving about

function apply() { world.style.transform = `translate(${round(at.x)}px,${round(at.y)}px) scale(${at.k.toFixed(4)})`; }
function zoom(factor, x = view.clientWidth / 2, y = view.clientHeight / 2) {
  const k = Math.min(4, Math.max(.02, at.k * factor));
  at.x = x - (x - at.x) * k / at.k; at.y = y - (y - at.y) * k / at.k; at.k = k;
  apply();
}
function pan(dx, dy) { at.x += dx; at.y += dy; apply(); }
/* Show everything, or only as much of its height as is readable. */
function fit(readable = 0) {
  const {w, h} = free(), margin = Math.min(24, w / 30);
  const wide = (w - 2 * margin) / extent[0], high = (h - 2 * margin) / extent[1];
  at.k = Math.max(.02, Math.min(1.3, wide, Math.max(high, readable)));
  at.x = (w - extent[0] * at.k) / 2;
  at.y = Math.max(margin, (h - extent[1] * at.k) / 2);
  apply();
}
function rectangle(box) {
  const element = elements.get(box), seen = view.getBoundingClientRect();
  const r = (isOpen(box) ? element.parentNode : element).getBoundingClientRect();
  return {x: r.left - seen.left, y: r.top - seen.top, w: r.width, h: r.height};
}
/* How much of the view is free of the card, which lies on top of it on small screens. */
function free() {
  const covered = !card.hidden && getComputedStyle(card).position === "absolute" ? card.offsetHeight : 0;
  return {w: view.clientWidth, h: view.clientHeight - covered};
}
function center(box) {
  if (at.k < .5) zoom(.8 / at.k);
  const r = rectangle(box), {w, h} = free();
  pan(w / 2 - r.x - r.w / 2, r.h > h - 40 ? 20 - r.y : h / 2 - r.y - r.h / 2);
}
function bringIn(box) {
  const r = rectangle(box), {w, h} = free();
  if (r.x < 0 || r.y < 0 || r.x + Math.min(r.w, 80) > w || r.y + Math.min(r.h, 30) > h) center(box);
}

// -- opening and closing

function toggle(box) {
  const before = rectangle(box);
  if (isOpen(box)) opened.delete(box); else { opened.add(box); fresh = box; }
  redraw();
  const after = rectangle(box);
  // What was clicked stays under the pointer.
  pan(before.x - after.x, before.y - after.y);
}
function activate(box) {
  if (opens(box)) toggle(box);
  select(box);
  if (free().h < view.clientHeight) bringIn(box);
}
function show(box) {
  for (let b = parentOf(box); b >= 0; b = parentOf(b)) opened.add(b);
  select(box);
  redraw();
  center(box);
}
function say(text) {
  $("told").textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { $("told").textContent = ""; }, 4000);
}
function openAll() {
  let count = 0, all = true;
  opened.clear();
  for (const inside of insides) { // outer ones come first
    if (inside.of >= 0 && !(isShown(inside.of) && count + inside.at.length / 2 <= MOST_OPEN)) { all = false; continue; }
    count += inside.at.length / 2;
    if (inside.of >= 0) opened.add(inside.of);
  }
  redraw(); fit(.6);
  if (!all) say(`The outer ones are open: ${MOST_OPEN} boxes at most at a time.`);
}

// -- the card

function select(box) {
  selected = box;
  card.hidden = box < 0;
  if (box >= 0) fillCard(box);
  emphasise();
}
function neighbours(box) {
  const inside = insides[insideOf[box]], own = box - inside.first, n = inside.at.length / 2, ends = [new Set(), new Set()];
  for (const [from, to] of inside.edges) {
    const other = to === own ? from : from === own ? to : -1;
    if (other < 0) continue;
    const met = other < n ? inside.first + other : inside.ports[other - n][4];
    if (met >= 0 && met !== box) ends[to === own ? 0 : 1].add(met);
  }
  return ends;
}
const COLUMNS = ["parameter", "shape", "|grad|", "status", "not finite", "update / weight", "findings"];
function table(box, parent) {
  const rows = boxes[box].params.map(i => params[i]);
  const used = COLUMNS.map((_, c) => c < 2 || rows.some(row => row[c] !== undefined && row[c] !== ""));
  const holder = make("div", "params", null, parent), body = make("table", "", null, holder);
  const head = make("tr", "", null, body);
  COLUMNS.forEach((title, c) => { if (used[c]) make("th", "", title, head).scope = "col"; });
  for (const row of rows) {
    const line = make("tr", "", null, body);
    COLUMNS.forEach((_, c) => {
      if (!used[c]) return;
      const text = c ? row[c] ?? "" : row[0].join(" = ") || "leaf tensor";
      const isBad = c === 6 ? text : c === 4 ? text && text !== "0" : c === 3 ? text && !/^(fresh|accumulated)$/.test(text) : /nan|inf/.test(c > 1 ? text : "");
      make("td", isBad ? "bad" : "", text, line);
    });
  }
  if (boxes[box].more) make("p", "", `… ${boxes[box].more.toLocaleString("en")} more`, holder);
}
function press(text, parent, act) {
  const element = make("button", "", text, parent);
  element.type = "button";
  element.onclick = act;
}
function fillCard(box) {
  const b = boxes[box], text = $("card-text");
  text.replaceChildren();
  make("h2", "", name(box), text);
  make("p", "sub", b.path || b.kind || "", text);
  const acts = make("div", "acts", null, text);
  if (opens(box)) press(isOpen(box) ? "Close" : "Open", acts, () => activate(box));
  press("Show", acts, () => show(box));
  const list = make("dl", "", null, text);
  const row = (label, bad) => { make("dt", "", label, list); return make("dd", bad ? "bad" : "", null, list); };
  if (b.root) row("root").textContent = "backward starts here";
  for (const [label, value] of b.rows) {
    const cell = row(label, label === "why");
    for (const line of [].concat(value)) make("div", "", line, cell);
  }
  if (b.full) row("not opened").textContent = "this page has no room for what is inside";
  if (overlay && b.marks && b.marks[overlay]) row(data.overlays.find(o => o[0] === overlay)[1]).textContent = b.marks[overlay][1];
  neighbours(box).forEach((met, way) => {
    if (!met.size) return;
    const cell = row(way ? "goes to" : "comes from");
    cell.className = "links";
    for (const other of [...met].slice(0, 20)) press(name(other), cell, () => show(other));
    if (met.size > 20) make("span", "", `… ${met.size - 20} more`, cell);
  });
  if (b.params) table(box, row(opens(box) ? "parameters inside" : "parameters"));
  card.scrollTop = 0;
  card.classList.toggle("peek", opens(box)); // on small screens what opens is more than what is said of it
}

// -- search

const words = boxes.map((b, i) => [name(i), b.kind, b.path, ...(b.small || []), b.find, b.rows[0] && b.rows[0][0] === "autograd node" && b.rows[0][1],
  opens(i) ? "" : (b.params || []).map(p => params[p][0].join(" ")).join(" ")].filter(Boolean).join(" ").toLowerCase());
let hits = [], current = 0;

function lookUp() {
  const asked = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  hits = [];
  if (asked.length) {
    words.forEach((text, box) => { if (asked.every(word => text.includes(word))) hits.push(box); });
    const rank = box => { const title = name(box).toLowerCase(); return title === asked[0] ? 0 : title.includes(asked[0]) ? 1 : 2; };
    hits.sort((a, b) => rank(a) - rank(b) || a - b);
  }
  found.replaceChildren();
  hits.slice(0, MOST_FOUND).forEach((box, i) => {
    const item = make("li", "", name(box), found);
    item.setAttribute("role", "option"); item.id = "hit-" + i;
    const above = [];
    for (let b = parentOf(box); b >= 0; b = parentOf(b)) above.unshift(name(b).slice(0, 40));
    make("small", "", [boxes[box].kind, above.join(" › ")].filter(Boolean).join(" — "), item);
    item.onpointerdown = event => event.preventDefault();
    item.onclick = () => choose(i);
  });
  if (asked.length && hits.length > MOST_FOUND || asked.length && !hits.length)
    make("li", "", hits.length ? `… ${hits.length - MOST_FOUND} more` : "nothing found", found).setAttribute("aria-disabled", "true");
  found.hidden = !asked.length;
  search.setAttribute("aria-expanded", !found.hidden);
  pick(0);
}
function pick(i) {
  const items = [...found.querySelectorAll("[role=option]")];
  current = Math.max(0, Math.min(i, items.length - 1));
  items.forEach((item, n) => item.setAttribute("aria-selected", n === current));
  if (items.length) { search.setAttribute("aria-activedescendant", items[current].id); items[current].scrollIntoView({block: "nearest"}); }
  else search.removeAttribute("aria-activedescendant");
}
function choose(i) {
  if (hits[i] === undefined) return;
  found.hidden = true;
  search.setAttribute("aria-expanded", false);
  show(hits[i]);
}
search.oninput = lookUp;
search.onfocus = () => { if (search.value) lookUp(); };
search.onblur = () => { found.hidden = true; search.setAttribute("aria-expanded", false); };
search.onkeydown = event => {
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (step) { pick(current + step); event.preventDefault(); }
  else if (event.key === "Enter") { choose(current); event.preventDefault(); }
  else if (event.key === "Escape") { if (found.hidden) search.blur(); else found.hidden = true; event.preventDefault(); }
  event.stopPropagation();
};

// -- pointer and keys

const pointers = new Map();
let travelled = 0;
const spread = () => { const [a, b] = [...pointers.values()]; return b ? {d: Math.hypot(a.x - b.x, a.y - b.y) || 1, x: (a.x + b.x) / 2, y: (a.y + b.y) / 2} : {d: 1, x: a.x, y: a.y}; };
const local = event => { const seen = view.getBoundingClientRect(); return {x: event.clientX - seen.left, y: event.clientY - seen.top}; };
view.addEventListener("pointerdown", event => {
  if (event.button || event.target.closest("#legend")) return;
  if (!pointers.size) travelled = 0;
  pointers.set(event.pointerId, local(event));
});
addEventListener("pointermove", event => {
  if (!pointers.has(event.pointerId)) return;
  const before = spread();
  pointers.set(event.pointerId, local(event));
  const after = spread();
  travelled += Math.hypot(after.x - before.x, after.y - before.y) + Math.abs(after.d - before.d);
  if (travelled < 4) return;
  view.classList.add("drags");
  pan(after.x - before.x, after.y - before.y);
  if (pointers.size > 1) zoom(after.d / before.d, after.x, after.y);
});
for (const type of ["pointerup", "pointercancel"]) addEventListener(type, event => {
  pointers.delete(event.pointerId);
  if (!pointers.size) view.classList.remove("drags");
});
view.addEventListener("click", event => { // a drag is no click
  if (travelled >= 4) { event.stopPropagation(); event.preventDefault(); travelled = 0; }
}, true);
world.addEventListener("click", event => {
  if (event.target.closest(".port")) return;
  const element = event.target.closest(".box, .head, .frame");
  if (!element) return;
  if (element.classList.contains("frame")) select(element.box); else activate(element.box);
});
view.addEventListener("wheel", event => {
  if (event.target.closest("#legend")) return;
  event.preventDefault();
  const {x, y} = local(event), unit = [1, 16, 400][event.deltaMode];
  if (event.shiftKey) pan(-event.deltaX * unit || -event.deltaY * unit, 0);
  else zoom(Math.exp(-Math.max(-60, Math.min(60, event.deltaY * unit)) * (event.ctrlKey ? .01 : .004)), x, y);
}, {passive: false});
world.addEventListener("focusin", event => { if (event.target.box !== undefined && event.target.matches(":focus-visible")) bringIn(event.target.box); });
addEventListener("keydown", event => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select")) return;
  const box = event.target.box, moves = {ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60]};
  const inCard = event.target.closest("#card, #legend");
  if (box !== undefined && (event.key === "Enter" || event.key === " ")) activate(box);
  else if (event.key === "Escape" && !card.hidden) { const back = elements.get(selected); select(-1); if (back) back.focus({preventScroll: true}); }
  else if (event.key === "+" || event.key === "=") zoom(1.25);
  else if (event.key === "-") zoom(.8);
  else if (event.key === "0") fit();
  else if (event.key === "/") search.focus();
  else if (moves[event.key] && !inCard) pan(...moves[event.key]);
  else return;
  event.preventDefault();
});

// -- the bar and the legend

$("in").onclick = () => zoom(1.25);
$("out").onclick = () => zoom(.8);
$("fit").onclick = () => fit();
$("open-all").onclick = openAll;
$("close-all").onclick = () => { opened.clear(); redraw(); fit(); };
card.onclick = event => { if (!event.target.closest("button")) card.classList.remove("peek"); };
$("shut").onclick = () => select(-1);
$("theme").onclick = () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
};
$("overlay").onchange = event => { overlay = event.target.value; redraw(); if (selected >= 0) fillCard(selected); legend(); };

const LOOKS = {parameter: "parameter", leaf: "other leaf that requires grad", operation: "operation", module: "module", sequence: "repetition",
  stretch: "many operations in a row", root: "loss (root)", frozen: "frozen", missing: "does not lead to the loss"};
function legend() {
  const text = $("legend-text"), looks = new Set(boxes.map(b => b.look));
  text.replaceChildren();
  const swatch = (kind, meaning, parent) => { const key = make("span", "key", null, parent); make("span", "swatch " + kind, null, key); key.append(meaning); };
  if (overlay) {
    const [, title, meaning] = data.overlays.find(o => o[0] === overlay), line = make("p", "", null, text);
    make("b", "", title, line);
    line.append(`: ${meaning}. `);
    const isScale = /norm|ratio|bytes/.test(overlay);
    if (isScale) { line.append("small"); make("span", "scale", null, line); line.append("large (logarithmic) "); }
    if (overlay !== "saved_bytes") swatch("alarm", isScale ? "not finite" : "marked", line);
  } else for (const look in LOOKS) if (looks.has(look)) swatch(look, LOOKS[look], text);
  if (!boxes.length) make("p", "", "Nothing that requires grad leads to the root: it has no graph.", text);
  make("p", "", "Arrows follow the data through the forward; gradients flow back against them.", text);
  if (boxes.some(b => b.count)) make("p", "", "×N: done N times, the first is shown; dashed arrows lead to the next copy.", text);
  make("p", "", "Click a box to open or close it. Drag to move, turn the wheel to zoom, / to search.", text);
  if (data.note) make("p", "", data.note, text);
}

for (const kind of ["tip", "tip-cut", "tip-near"]) {
  const marker = draw("marker", {id: kind, viewBox: "0 0 8 8", refX: 7.5, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto", markerUnits: "userSpaceOnUse"}, document.querySelector(".markers defs"));
  draw("path", {d: "M0,0.8L8,4L0,7.2z", class: kind}, marker);
}
if (data.overlays.length) {
  const menu = $("overlay");
  menu.hidden = false;
  for (const [value, title] of [["", "no overlay"], ...data.overlays]) make("option", "", title, menu).value = value;
}
legend();
redraw();
fit(.85);
// The legend stands open where it hides nothing.
$("legend").open = true;
$("legend").open = view.clientWidth > 700 && (at.x > $("legend").offsetWidth + 20 || at.y + extent[1] * at.k < $("legend").offsetTop);
