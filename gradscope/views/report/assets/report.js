"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const $ = (selector, inside = document) => inside.querySelector(selector);
const $$ = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const make = (tag, text, name) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
};

// -- numbers -------------------------------------------------------------------------------

const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));

function unpacked(stored) {
  const raw = bytes(stored.codes), values = new Float64Array(raw.length / 2);
  const {low, high, log} = stored;
  for (let i = 0; i < values.length; i++) {
    const code = raw[2 * i] + 256 * raw[2 * i + 1];
    const plain = low + code / 65532 * (high - low);
    values[i] = code === 65535 ? NaN : code === 65534 ? Infinity
      : log ? (code === 65533 ? 0 : 10 ** plain) : plain;
  }
  return values;
}

const superscript = text => text.replace(/[-0-9]/g, c => c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]);

function written(value, digits = 6) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "-∞";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 1e-3) {
    const [mantissa, power] = value.toExponential(Math.min(digits, 4) - 1).split("e");
    return `${mantissa}·10${superscript(power.replace("+", ""))}`;
  }
  return String(Number(value.toPrecision(digits)));
}

function nearest(sorted, x) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= x) low = middle; else high = middle;
  }
  return sorted.length && Math.abs(sorted[high] - x) < Math.abs(sorted[low] - x) ? high : low;
}

// -- colours -------------------------------------------------------------------------------

const colour = name => getComputedStyle(root).getPropertyValue(name).trim();
const isDark = () => getComputedStyle(root).colorScheme === "dark";
// Viridis, without the end that does not show on such paper.
const RAMPS = {
  light: ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962"],
  dark: ["#6f6cc9", "#5b83c9", "#3d9bb5", "#2db39a", "#5ec962", "#addc30", "#fde725"],
};
function ramp(share) {
  const colours = RAMPS[isDark() ? "dark" : "light"];
  return colours[Math.min(colours.length - 1, Math.floor(share * colours.length))];
}

function paint() {
  for (const model of models) {
    const tag = model.tags?.[0];
    if (!tag || typeof tag !== "object") continue;
    const wanted = {};
    for (const [property, name] of tag instanceof Map ? tag : Object.entries(tag)) {
      const now = model[property];
      const isSpec = now !== null && typeof now === "object";
      wanted[property] = isSpec ? {value: colour(name)} : colour(name);
    }
    model.setv(wanted);
  }
}

for (const scale of $$(".scale[data-colours]")) {
  const colours = scale.dataset.colours.split(",");
  if (scale.classList.contains("none")) continue;
  scale.style.background = colours.length > 1 ? `linear-gradient(90deg, ${colours})` : colours[0];
}

// -- charts --------------------------------------------------------------------------------

const charts = [];
let book = null, models = [], xRange = null, wholeRange = null;
let param = 0;

class Chart {
  constructor(spec) {
    this.key = spec.key;
    this.lines = spec.lines.map(line => ({...line, model: book.get_model_by_id(line.source)}));
    this.figure = book.get_model_by_id(spec.figure);
    this.holder = $(`[data-chart="${spec.key}"]`);
    this.plot = $(".plot", this.holder);
    this.readout = $(".readout", this.holder);
    this.cross = make("div", undefined, "cross");
    this.cross.hidden = true;
    this.plot.append(this.cross);
    this.keys = this.lines.map(line => {
      const item = make("span", undefined, `key ${line.dash}`);
      item.style.setProperty("--of", `var(${line.colour})`);
      item.append(make("span", line.label), " ", make("b"));
      return item;
    });
    this.step = make("span");
    this.readout.replaceChildren(this.step, ...this.keys);
    for (const kind of ["pointerdown", "pointermove"]) {
      this.plot.addEventListener(kind, event => {
        this.point(event);
        // A finger scrolls, and reads; it would zoom whenever it is not quite upright.
        if (event.pointerType === "touch") event.stopPropagation();
      }, true);
    }
    this.plot.addEventListener("pointerleave", event => {
      if (event.pointerType === "mouse") tell(null);
    });
    this.plot.addEventListener("dblclick", showAll);
    this.plot.addEventListener("keydown", event => this.key_pressed(event));
    this.plot.addEventListener("focus", () => {
      // Only this one is read aloud, although all of them tell the step.
      this.readout.setAttribute("aria-live", "polite");
      if (cursor === null) tell(this.last());
    });
    this.plot.addEventListener("blur", () => {
      this.readout.removeAttribute("aria-live");
      tell(null);
    });
  }

  get frame() { return this.view.frame; }

  point(event) {
    if (!this.view) return;
    const box = this.plot.getBoundingClientRect();
    const {left, right} = this.frame.bbox;
    const x = Math.min(Math.max(event.clientX - box.left, left), right);
    this.at(event.clientY - box.top);
    tell(this.frame.x_scale.invert(x));
  }

  at(_y) {}

  steps() {
    return this.lines.reduce((most, line) => {
      const x = line.model.data.x;
      return x.length > most.length ? x : most;
    }, []);
  }

  last() { const steps = this.steps(); return steps.length ? steps[steps.length - 1] : null; }

  key_pressed(event) {
    const steps = this.steps();
    if (!steps.length) return;
    const now = nearest(steps, cursor ?? this.last()), end = steps.length - 1;
    const to = {ArrowLeft: now - 1, ArrowRight: now + 1, PageUp: now - 10, PageDown: now + 10,
      Home: 0, End: end}[event.key];
    if (event.key === "Escape") { showAll(); return; }
    if (to === undefined) return;
    event.preventDefault();
    tell(steps[Math.max(0, Math.min(end, to))]);
  }

  show(step) {
    if (!this.view) return;
    const {left, right, top, height} = this.frame.bbox;
    const shown = step ?? this.last();
    const steps = this.steps();
    const at = steps.length && shown !== null ? steps[nearest(steps, shown)] : null;
    this.step.replaceChildren(make("b", at === null ? "" : `step ${at.toLocaleString("en")}`));
    this.lines.forEach((line, place) => {
      const {x, y} = line.model.data;
      const value = x.length && shown !== null ? y[nearest(x, shown)] : NaN;
      this.keys[place].lastChild.textContent = written(value);
    });
    const x = step === null || at === null ? NaN : this.frame.x_scale.compute(at);
    this.cross.hidden = !(x >= left && x <= right);
    Object.assign(this.cross.style, {left: `${x}px`, top: `${top}px`, height: `${height}px`});
  }
}

// The heat map, whose rows have their names beside it.
class Flow extends Chart {
  constructor(spec) {
    super(spec);
    this.flow = data.flow;
    this.norm = unpacked(this.flow.norm);
    this.status = bytes(this.flow.status);
    this.row = 0;
    this.across = make("div", undefined, "across");
    this.across.hidden = true;
    this.plot.append(this.across);
    this.names = $(".names", this.holder);
  }

  placed() {
    const {top} = this.frame.bbox, high = this.flow.row_height;
    // The end of a name tells more than its beginning.
    const most = Math.max(8, Math.floor(this.names.clientWidth / 6));
    this.names.replaceChildren(...this.flow.labels.map(({row, rows, text}) => {
      const short = text.length > most ? `…${text.slice(text.length - most + 1)}` : text;
      const name = make("span", short, rows > 1 ? "many" : "");
      const tall = Math.max(14, rows * high);
      Object.assign(name.style, {top: `${top + (row + rows / 2) * high - tall / 2}px`,
        height: `${tall}px`, lineHeight: `${tall}px`});
      name.title = text;
      name.row = row;
      name.rows = rows;
      return name;
    }));
  }

  at(y) {
    const {top, bottom} = this.frame.bbox;
    this.row = Math.round(this.frame.y_scale.invert(Math.min(Math.max(y, top), bottom - 1)));
  }

  steps() { return this.flow.edges.slice(0, -1); }

  key_pressed(event) {
    const move = {ArrowUp: -1, ArrowDown: 1}[event.key];
    if (move === undefined) { super.key_pressed(event); return; }
    event.preventDefault();
    this.row = Math.max(0, Math.min(this.flow.rows.length - 1, this.row + move));
    tell(cursor ?? this.last());
  }

  show(step) {
    super.show(step);
    const {edges, rows, row_height: high} = this.flow;
    const row = Math.max(0, Math.min(rows.length - 1, this.row));
    if (step === null) {
      this.step.textContent = "Point at a cell to read it.";
      this.across.hidden = true;
      for (const name of this.names.children) name.classList.remove("on");
      return;
    }
    let column = edges.length - 2;
    while (column > 0 && edges[column] > Math.round(step)) column--;
    const cell = row * (edges.length - 1) + column, status = this.status[cell];
    const [first, last] = [edges[column], edges[column + 1] - 1];
    this.step.replaceChildren(
      make("b", rows[row]),
      ` · ${first === last ? `step ${first}` : `steps ${first}–${last}`} · gradient norm `,
      make("b", written(this.norm[cell], 4)),
      ` · ${status === 255 ? "not read by a step" : this.flow.statuses[status]}`,
    );
    const {left, width, top} = this.frame.bbox;
    this.across.hidden = false;
    Object.assign(this.across.style, {left: `${left}px`, width: `${width}px`,
      top: `${top + (row + .5) * high}px`});
    for (const name of this.names.children) {
      name.classList.toggle("on", row >= name.row && row < name.row + name.rows);
    }
  }
}

// Ratios of all parameters: the line under the pointer stands out, or that of the chosen one.
class Ratios extends Chart {
  constructor(spec) {
    super(spec);
    this.told = data.ratios;
    this.values = unpacked(this.told.ratios);
    this.all = book.get_model_by_name("ratio-lines");
    this.one = book.get_model_by_name("ratio-one");
    this.y = null;
    this.shown = -1;
    this.fill();
    this.pick(0);
  }

  row(at) {
    const n = this.told.steps.length, x = [], y = [];
    for (let i = 0; i < n; i++) {
      const value = this.values[at * n + i];
      if (value > 0 && Number.isFinite(value)) { x.push(this.told.steps[i]); y.push(value); }
    }
    return {x, y};
  }

  fill() {
    const xs = [], ys = [], colours = [], n = this.told.names.length;
    for (let at = 0; at < n; at++) {
      const {x, y} = this.row(at);
      xs.push(x); ys.push(y); colours.push(ramp(at / n));
    }
    this.all.data = {xs, ys, colour: colours};
    const stops = Array.from({length: 12}, (_, at) => ramp(at / 12));
    $(".ramp").style.background = `linear-gradient(90deg, ${stops})`;
  }

  pick(at) {
    if (this.shown === at) return;
    this.shown = at;
    this.one.data = this.row(at);
  }

  steps() { return this.told.steps; }

  at(y) { this.y = y; }

  show(step) {
    super.show(step);
    const {names, steps} = this.told, n = steps.length;
    const at = nearest(steps, step ?? steps[n - 1]);
    let chosen = param;
    if (step === null) this.y = null;
    if (this.y !== null) {
      const level = Math.log(this.frame.y_scale.invert(this.y));
      let least = Infinity;
      for (let row = 0; row < names.length; row++) {
        const value = this.values[row * n + at];
        const off = value > 0 ? Math.abs(Math.log(value) - level) : Infinity;
        if (off < least) { least = off; chosen = row; }
      }
    }
    this.pick(chosen);
    this.step.replaceChildren(make("b", names[chosen]), ` · step ${steps[at]} · `,
      make("b", written(this.values[chosen * n + at], 4)));
  }

  key_pressed(event) {
    this.y = null;
    super.key_pressed(event);
  }
}

// One quantity of the anatomy.
class Part extends Chart {
  // Where parameters take turns, norms of updates are there at more steps than their parts.
  steps() {
    const known = this.lines.map(line => line.model.data.x).filter(x => x.length);
    return known.reduce((least, x) => x.length < least.length ? x : least, known[0] ?? []);
  }

  pick(at) {
    const {steps, params, values} = anatomy, n = steps.length, keys = params[at].keys;
    let low = Infinity, high = 0;
    this.lines.forEach((line, place) => {
      const x = [], y = [], all = values[line.quantity];
      for (let i = 0; i < n; i++) {
        const value = all[at * n + i];
        if (Number.isNaN(value) || !Number.isFinite(value)) continue;
        x.push(steps[i]);
        y.push(value);
        if (value > 0) { low = Math.min(low, value); high = Math.max(high, value); }
      }
      line.model.data = {x, y};
      const state = /^state(\d)_(before|after)$/.exec(line.quantity);
      if (state) {
        this.keys[place].firstChild.textContent = `${keys[state[1]] ?? ""}, ${state[2]}`;
      }
      this.keys[place].hidden = !x.length;
    });
    this.holder.classList.toggle("empty", this.keys.every(key => key.hidden));
    if (this.key === "anatomy-cosine") return;
    if (!high) { low = .1; high = 1; }
    low = Math.max(low, high * 1e-12);
    // Two powers of ten at least, or their marks would have to be crooked numbers.
    const room = Math.max((high / low) ** .06, Math.sqrt(100 * low / high));
    this.figure.y_range.setv({start: low / room, end: high * room});
  }
}

let cursor = null;
let waiting = false;
function tell(step) {
  cursor = step;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    for (const chart of charts) chart.show(cursor);
    facts();
  });
}

function showAll() {
  if (xRange) xRange.setv(wholeRange);
}

// -- the anatomy ---------------------------------------------------------------------------

const anatomy = data.anatomy && {
  ...data.anatomy,
  values: Object.fromEntries(
    Object.entries(data.anatomy.values).map(([name, stored]) => [name, unpacked(stored)])),
};

function pick(at) {
  param = at;
  for (const select of $$("select.param")) select.selectedIndex = at;
  for (const chart of charts) {
    if (chart instanceof Part || chart instanceof Ratios) chart.pick(at);
  }
  tell(cursor);
}

// One that was never moved would be the least to show of all.
function firstMoved() {
  const at = anatomy ? anatomy.values.update_norm.findIndex(norm => norm > 0) : -1;
  return at < 0 ? 0 : Math.floor(at / anatomy.steps.length);
}

const FACTS = [
  ["gradient norm", ["grad_norm"], ""],
  ["weight norm", ["weight_norm_before", "weight_norm_after"], " → "],
  ["update norm", ["update_norm"], ""],
  ["… by weight decay", ["decay_norm"], ""],
  ["… by old momentum", ["momentum_norm"], ""],
  ["… by the fresh gradient", ["fresh_norm"], ""],
  ["effective lr, least to greatest", ["effective_lr_min", "effective_lr_max"], " … "],
  ["… its mean", ["effective_lr_mean"], ""],
  ["residual against the formula", ["residual"], ""],
  ["… rounding alone may cause", ["rounding"], ""],
  ["cosine of update and -gradient", ["update_gradient_cosine"], ""],
  ["left unmoved by rounding", ["unchanged_fraction"], "%"],
];

function facts() {
  const table = $("#facts tbody");
  if (!table) return;
  const {steps, params, values} = anatomy, n = steps.length;
  let at = nearest(steps, cursor ?? steps[n - 1]);
  const known = place => !Number.isNaN(values.unchanged_fraction?.[param * n + place] ?? NaN);
  // Where parameters take turns: the nearest step at which this one was taken apart.
  for (let off = 1; !known(at) && off < n; off++) {
    if (known(at - off) && at >= off) at -= off;
    else if (at + off < n && known(at + off)) at += off;
  }
  const {optimizer, kind, shape} = params[param];
  $("#facts-title").textContent = `Step ${steps[at].toLocaleString("en")} in numbers`;
  const rows = [["shape", shape], ["optimizer", optimizer === kind ? kind : `${optimizer} (${kind})`]];
  for (const [name, quantities, between] of FACTS) {
    const numbers = quantities.map(each => values[each]?.[param * n + at] ?? NaN);
    if (numbers.every(Number.isNaN)) continue;
    rows.push([name, between === "%" ? `${(100 * numbers[0]).toPrecision(3)} %`
      : numbers.map(each => written(each, 4)).join(between)]);
  }
  table.replaceChildren(...rows.map(([name, value]) => {
    const row = make("tr"), head = make("th", name);
    head.scope = "row";
    row.append(head, make("td", value));
    return row;
  }));
}

for (const select of $$("select.param")) {
  const names = anatomy ? anatomy.params.map(each => each.name) : data.ratios.names;
  select.replaceChildren(...names.map(name => make("option", name)));
  select.addEventListener("change", () => pick(select.selectedIndex));
}
for (const [id, move] of [["previous", -1], ["next", 1]]) {
  document.getElementById(id)?.addEventListener("click", () => {
    const n = anatomy.params.length;
    pick((param + move + n) % n);
  });
}

// -- drawing -------------------------------------------------------------------------------

async function draw() {
  if (!data.document) {
    root.dataset.drawn = "yes";
    return;
  }
  
  Bokeh.logger.set_level("error");
  book = Bokeh.require("document").Document.from_json(data.document);
  xRange = book.get_model_by_id(data.x_range);
  wholeRange = {start: xRange.start, end: xRange.end};
  for (const spec of data.charts) {
    const kind = spec.key === "flow" ? Flow : spec.key === "ratios" ? Ratios
      : spec.key.startsWith("anatomy-") ? Part : Chart;
    charts.push(new kind(spec));
  }
  models = [...book.all_models];
  paint();
  pick(firstMoved());
  const settled = () => {
    for (const chart of charts) if (chart.view) chart.placed?.();
    const isWhole = xRange.start === wholeRange.start && xRange.end === wholeRange.end;
    for (const button of $$(".reset")) button.hidden = isWhole;
    tell(cursor);
  };
  xRange.change.connect(settled);
  addEventListener("resize", () => setTimeout(settled, 100));
  for (const button of $$(".reset")) button.addEventListener("click", showAll);
  // One chart after the other, so that the page can be scrolled and read meanwhile.
  for (const chart of charts) book.remove_root(chart.figure);
  const plots = [];
  const manager = await Bokeh.embed.add_document_standalone(book, document.body, plots);
  for (const chart of charts) {
    plots.push(chart.plot);
    book.add_root(chart.figure);
    let view;
    while (!(view = manager.get(chart.figure))) await pause();
    await pause();
    chart.view = view;
    letScroll(chart.plot);
    chart.placed?.();
    chart.show(cursor);
  }
  setTimeout(settled, 100);
  root.dataset.drawn = "yes";
}

// Bokeh takes every touch for itself, and nobody could scroll past a chart with a finger.
function letScroll(node) {
  if (node.classList?.contains("bk-events")) {
    node.style.setProperty("touch-action", "pan-y pinch-zoom", "important");
  }
  for (const child of [...node.shadowRoot?.children ?? [], ...node.children]) letScroll(child);
}

const pause = () => new Promise(done => setTimeout(done));

function repaint() {
  if (book) {
    paint();
    for (const chart of charts) chart.fill?.();
  }
  paintGraph();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  repaint();
});
let before;
addEventListener("beforeprint", () => {
  before = root.dataset.theme;
  root.dataset.theme = "light";
  repaint();
  for (const chart of charts) chart.view?.paint();  // at once: the printer does not wait
});
addEventListener("afterprint", () => {
  if (before === undefined) delete root.dataset.theme; else root.dataset.theme = before;
  repaint();
});

// -- the graph -----------------------------------------------------------------------------

const explorer = document.getElementById("explorer");
function paintGraph() {
  const inner = explorer?.contentDocument?.documentElement;
  if (inner && root.dataset.theme) inner.dataset.theme = root.dataset.theme;
}
if (explorer) {
  explorer.addEventListener("load", paintGraph);
  // Laid out only when somebody comes near: charts are there sooner.
  const watcher = new IntersectionObserver(entries => {
    if (!entries.some(entry => entry.isIntersecting)) return;
    watcher.disconnect();
    explorer.srcdoc = data.graph;
  }, {rootMargin: "600px"});
  watcher.observe(explorer);
}

// -- tables and contents -------------------------------------------------------------------

for (const table of $$("table.sortable")) {
  const heads = $$("thead th", table), body = table.tBodies[0];
  heads.forEach((head, column) => $("button", head).addEventListener("click", () => {
    const ascending = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const worth = row => row.cells[column].dataset.sort ?? row.cells[column].textContent;
    const isNumber = head.classList.contains("number");
    const rows = [...body.rows].sort((a, b) => isNumber ? worth(a) - worth(b)
      : worth(a).localeCompare(worth(b), "en", {numeric: true}));
    body.replaceChildren(...(ascending ? rows : rows.reverse()));
  }));
}

const links = new Map($$("nav a").map(link => [link.hash.slice(1), link]));
const spy = new IntersectionObserver(entries => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get(entry.target.id)?.setAttribute("aria-current", "true");
  }
}, {rootMargin: "-20% 0px -70% 0px"});
for (const section of $$("section")) spy.observe(section);

// The words are there to read before the charts are.
requestAnimationFrame(() => setTimeout(draw));
})();
