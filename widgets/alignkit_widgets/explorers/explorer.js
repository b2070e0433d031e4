// All explorers: controls above, the kernel's picture below. Plain ESM for anywidget, no build step, nothing from elsewhere.
// Rules: text reaches the page through textContent only; one picture is asked for at a time, and always the newest.

const SVG = "http://www.w3.org/2000/svg";
const MARKS = { o: "M-1 0A1 1 0 1 0 1 0A1 1 0 1 0-1 0Z", s: "M-.9-.9H.9V.9H-.9Z", "^": "M0-1.1 1 .8H-1Z", v: "M0 1.1 1-.8H-1Z",
  D: "M0-1.2 1.2 0 0 1.2-1.2 0Z", P: "M-.4-1H.4V-.4H1V.4H.4V1H-.4V.4H-1V-.4H-.4Z", X: "M-.9-1 0-.4.9-1 .9-.6.4 0 .9.6.9 1 0 .4-.9 1-.9.6-.4 0-.9-.6Z",
  "*": "M0-1.3.35-.45 1.25-.4.55.2.8 1.05 0 .55-.8 1.05-.55.2-1.25-.4-.35-.45Z" };
const number = (v) => v == null ? "–" : v === 0 ? "0" : (Math.abs(v) >= 1e4 || Math.abs(v) < 1e-3 ? v.toExponential(1) : String(+v.toPrecision(4))).replace("-", "−");
let count = 0;

function make(parent, tag, attributes = {}, text) {
  const svg = parent instanceof SVGElement || tag === "svg";
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text != null) node.textContent = text;
  parent.append(node);
  return node;
}

function ticks({ low, high, log, whole }, n) {
  const found = [];
  if (log) {
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++)
      for (const m of Math.log10(high / low) > 2.5 ? [1] : [1, 2, 5]) found.push(m * 10 ** p);
    return found.filter((t) => t >= low * 0.999 && t <= high * 1.001);
  }
  const raw = (high - low) / n, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.999);
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(+(k * step).toPrecision(12));
  return whole ? found.filter((t) => t % 1 === 0) : found;
}

function copy(text, button) { // the clipboard, or the old way where a page may not use it
  const done = () => { const was = button.textContent; button.textContent = "copied"; setTimeout(() => { button.textContent = was; }, 1500); };
  const old = () => { button.parentElement.querySelector("input").select(); if (document.execCommand("copy")) done(); };
  navigator.clipboard ? navigator.clipboard.writeText(text).then(done, old) : old();
}

function save(picture, title) { // a PNG in base64, as a download
  const name = title.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
  Object.assign(document.createElement("a"), { href: `data:image/png;base64,${picture}`, download: `${name}.png` }).click();
}

function meet(a, b) { return a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]; } // two boxes: left, top, right, bottom

class Drawing {
  constructor(view) { this.view = view; }
  explain(node, text) { // what a quantity is, as a tooltip
    const { glossary = {} } = this.view.config, meaning = glossary[text] ?? glossary[String(text).split(/[,:·]/)[0].trim()];
    if (meaning && node instanceof SVGElement) make(node, "title", {}, meaning);
    else if (meaning) { node.title = meaning; node.classList.add("ake-term"); }
    return node;
  }
  look(name) { return this.view.config.looks[name] ?? this.view.config.looks.blue; }
  mark(svg, look, x, y, { open, big } = {}) {
    const [colour, shape] = this.look(look), size = big ? 7 : 4.5;
    return make(svg, "path", { class: "mark" + (open ? " open" : ""), d: MARKS[shape], transform: `translate(${x.toFixed(1)} ${y.toFixed(1)}) scale(${size})`,
      fill: colour, stroke: colour, "stroke-width": (big ? 2 : 1.5) / size });
  }
  line(svg, look, d) {
    const [colour, , dash] = this.look(look);
    return make(svg, "path", { class: "series", d, stroke: colour, "stroke-dasharray": dash });
  }
  legend(parent, entries) {
    const legend = make(parent, "div", { class: "ake-legend" });
    for (const s of entries) {
      const entry = make(legend, "span"), svg = make(entry, "svg", { width: 28, height: 12, "aria-hidden": "true" });
      if (s.line) this.line(svg, s.look, "M1 6H27");
      if (s.marks || s.big) this.mark(svg, s.look, 14, 6, { open: s.open });
      this.explain(make(entry, "span", {}, s.name), s.name);
    }
  }
  path(points, [left, top, right, bottom]) { // a line inside the box, and where it leaves it above or below
    let d = "", pen = false;
    const away = [], edge = ([px, py]) => { if (py < top + 1 || py > bottom - 1) away.push([px, py < top + 1 ? -1 : 1]); };
    points.forEach((b, i) => {
      const a = points[i - 1];
      if (!a || !b || [...a, ...b].some((v) => !Number.isFinite(v))) { pen = false; return; }
      let from = 0, to = 1;
      for (const [axis, low, high] of [[0, left - 0.5, right + 0.5], [1, top - 0.5, bottom + 0.5]]) {
        const step = b[axis] - a[axis], ends = step ? [(low - a[axis]) / step, (high - a[axis]) / step].sort((p, q) => p - q) : a[axis] >= low && a[axis] <= high ? [0, 1] : [2, -1];
        from = Math.max(from, ends[0]); to = Math.min(to, ends[1]);
      }
      if (from >= to) { pen = false; return; }
      const [start, end] = [from, to].map((s) => a.map((v, axis) => v + s * (b[axis] - v)));
      if (!pen || from > 0) d += `M${start.map((v) => v.toFixed(1)).join(" ")}`;
      d += `L${end.map((v) => v.toFixed(1)).join(" ")}`;
      if (from > 0) edge(start);
      if (to < 1) edge(end);
      pen = to === 1;
    });
    return [d, away];
  }
  words(svg, labels, boxes, left, right, top, bottom) { // a word beside its point, where it covers no other word and no point
    const placed = [];
    for (const [px, py, word] of labels) {
      const size = 6 * word.length, places = [[7, 14, "start"], [7, -6, "start"], [-7, -6, "end"], [-7, 14, "end"], [9, 4, "start"], [-9, 4, "end"]];
      const box = ([dx, dy, anchor]) => { const x0 = px + dx - (anchor === "end" ? size : 0); return [x0, py + dy - 9, x0 + size, py + dy + 1]; };
      const free = (others) => (place) => { const at = box(place); return at[0] > left && at[2] < right && at[1] > top - 4 && at[3] < bottom && !others.some((other) => meet(at, other)); };
      const place = places.find(free([...placed, ...boxes])) ?? places.find(free(placed));
      if (!place) continue; // the point's tooltip has it
      placed.push(box(place));
      make(svg, "text", { class: "word", x: px + place[0], y: py + place[1], "text-anchor": place[2] }, word);
    }
  }
  hover(svg, b, named, x, y, [left, top, right, bottom]) { // the figures under the pointer
    const lines = named.filter((s) => s.line && s.points.length > 2);
    if (!lines.length) return;
    const guide = make(svg, "path", { class: "guide", visibility: "hidden" }), said = make(svg, "text", { class: "word", x: right, y: top + 9, "text-anchor": "end" });
    svg.addEventListener("pointermove", (e) => {
      const px = e.clientX - svg.getBoundingClientRect().left;
      const nearest = lines.map((s) => s.points.filter((p) => p[1] != null).reduce((best, p) => Math.abs(x(p[0]) - px) < Math.abs(x(best[0]) - px) ? p : best));
      guide.setAttribute("visibility", px < left || px > right ? "hidden" : "visible");
      guide.setAttribute("d", `M${x(nearest[0][0]).toFixed(1)} ${top}V${bottom}`);
      said.textContent = px < left || px > right ? "" : `${b.x.label.split(",")[0]} ${number(nearest[0][0])}: ${lines.map((s, i) => `${s.name} ${number(nearest[i][1])}`).join(", ")}`;
    });
    svg.addEventListener("pointerleave", () => { said.textContent = ""; guide.setAttribute("visibility", "hidden"); });
  }
  drag(svg, [control, stops], x) { // a control that follows the pointer along the x axis
    const { view } = this;
    svg.classList.add("ake-drag");
    svg.addEventListener("pointerdown", (down) => {
      const from = svg.getBoundingClientRect().left; // the picture is drawn anew while the pointer moves; its place stays
      let last = null;
      const move = (e) => {
        const px = e.clientX - from, [, value] = stops.reduce((best, s) => Math.abs(x(s[0]) - px) < Math.abs(x(best[0]) - px) ? s : best);
        if (value !== last) view.store.ask(view.model, { type: "set", values: { [control]: last = value } });
      };
      const up = () => { window.removeEventListener("pointermove", move); window.removeEventListener("pointerup", up); window.removeEventListener("pointercancel", up); };
      for (const [name, act] of [["pointermove", move], ["pointerup", up], ["pointercancel", up]]) window.addEventListener(name, act);
      move(down);
      down.preventDefault();
    });
  }
  chart(parent, b, room) {
    const figure = make(parent, "figure");
    make(figure, "figcaption", {}, b.title);
    const named = b.series.filter((s) => s.name && s.points.length);
    if (named.length > 1) this.legend(figure, named);
    const svg = make(figure, "svg", { class: "ake-plot", height: b.height, role: "img",
      "aria-label": `${b.title}. ${b.y.label} against ${b.x.label}. ${named.map((s) => s.name).join(", ")}` });
    const width = Math.max(200, room), left = 56, right = 16, top = b.marks.length || b.zones.length ? 18 : 8, bottom = 38;
    const scale = (axis, from, to, inside = (v) => Math.min(Math.max(v, axis.low), axis.high)) => {
      const f = axis.log ? Math.log : (v) => v, low = f(axis.low), high = f(axis.high);
      return (v) => from + (to - from) * (f(inside(v)) - low) / (high - low);
    };
    const x = scale(b.x, left, width - right), y = scale(b.y, b.height - bottom, top);
    const anywhere = [scale(b.x, left, width - right, (v) => v), scale(b.y, b.height - bottom, top, (v) => v)];
    const plane = [left, top, width - right, b.height - bottom], labels = [], boxes = [], id = `ake-hatch-${count++}`;
    if (b.zones.length) {
      const pattern = make(make(svg, "defs"), "pattern", { id, width: 7, height: 7, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
      make(pattern, "path", { class: "hatch", d: "M0 0V7" });
    }
    for (const [from, to, word] of b.zones) {
      const x0 = x(from), x1 = x(to);
      make(svg, "rect", { x: x0, width: Math.max(0, x1 - x0), y: top, height: b.height - bottom - top, fill: `url(#${id})` });
      make(svg, "text", { class: "word", x: (x0 + x1) / 2, y: top - 6, "text-anchor": "middle" }, word);
    }
    for (const t of ticks(b.y, b.height / 55)) {
      make(svg, "path", { class: "grid", d: `M${left} ${y(t).toFixed(1)}H${width - right}` });
      make(svg, "text", { x: left - 7, y: y(t) + 4, "text-anchor": "end" }, number(t));
    }
    for (const t of ticks(b.x, width / 90)) {
      make(svg, "path", { class: "tick", d: `M${x(t).toFixed(1)} ${b.height - bottom}v4` });
      make(svg, "text", { x: x(t), y: b.height - bottom + 16, "text-anchor": "middle" }, number(t));
    }
    make(svg, "path", { class: "axis", d: `M${left} ${top}V${b.height - bottom}H${width - right}` });
    this.explain(make(svg, "text", { class: "label", x: (left + width - right) / 2, y: b.height - 4, "text-anchor": "middle" }, b.x.label), b.x.label);
    make(svg, "text", { class: "label", transform: `translate(12 ${(top + b.height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, b.y.label);
    for (const [axis, at, word] of b.marks) {
      make(svg, "path", { class: "guide", d: axis === "x" ? `M${x(at).toFixed(1)} ${top}V${b.height - bottom}` : `M${left} ${y(at).toFixed(1)}H${width - right}` });
      make(svg, "text", axis === "x" ? { class: "word", x: x(at), y: top - 6, "text-anchor": "middle" } : { class: "word", x: width - right, y: y(at) - 5, "text-anchor": "end" }, word);
    }
    for (const s of b.series) {
      if (s.line && s.points.length) {
        const [d, away] = this.path(s.points.map((p) => p.some((v) => v == null) ? null : p.map((v, i) => anywhere[i](v))), plane);
        this.line(svg, s.look, d);
        for (const [px, way] of away) make(svg, "path", { class: "away", fill: this.look(s.look)[0], d: `M${px - 5} ${(way < 0 ? top + 6 : b.height - bottom - 6)}h10l-5 ${8 * way}Z` });
      }
      s.spans.forEach(([x0, x1, y0, y1], i) => { // what the seeds span
        const [px, py] = s.points[i];
        make(svg, "path", { class: "span", stroke: this.look(s.look)[0], d: `M${x(x0).toFixed(1)} ${y(py).toFixed(1)}H${x(x1).toFixed(1)}M${x(px).toFixed(1)} ${y(y0).toFixed(1)}V${y(y1).toFixed(1)}` });
      });
      if (s.marks || s.big) s.points.forEach(([px, py], i) => {
        if (px == null || py == null) return;
        const node = this.mark(svg, s.look, x(px), y(py), s);
        make(node, "title", {}, `${s.name} ${s.labels[i] ?? ""}: ${number(px)}, ${number(py)}`);
        boxes.push([x(px) - 5, y(py) - 5, x(px) + 5, y(py) + 5]);
        if (s.labels[i]) labels.push([x(px), y(py), s.labels[i]]);
      });
    }
    this.words(svg, labels, boxes, left, width - right, top, b.height - bottom);
    this.hover(svg, b, named, x, y, plane);
    if (b.drag.length) this.drag(svg, b.drag, x);
  }
  bars(parent, b) {
    const figure = make(parent, "figure"), names = Object.keys(b.groups);
    make(figure, "figcaption", {}, b.title);
    if (names.length > 1) this.swatches(figure, b.groups);
    const grid = make(figure, "div", { class: "ake-bars" });
    for (const [label, ...values] of b.rows) {
      make(grid, "span", { class: "name", title: label }, label);
      const cell = make(grid, "div");
      values.forEach((value, i) => {
        const row = make(cell, "div", { class: "bar" }), shown = b.percent ? `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %` : number(value);
        const [colour] = this.look(b.groups[names[i]]);
        make(row, "i", { style: `width:calc((100% - 50px) * ${Math.max(0, Math.min(1, value / b.high)).toFixed(4)});background-color:${colour}`, class: i % 2 ? "hatched" : "", "aria-hidden": "true" });
        make(row, "span", { "aria-label": `${names[i]} ${shown}` }, shown);
      });
    }
    make(figure, "div", { class: "ake-unit" }, b.unit);
  }
  swatches(parent, groups) {
    const legend = make(parent, "div", { class: "ake-legend" });
    Object.entries(groups).forEach(([name, look], i) => {
      const entry = make(legend, "span");
      make(entry, "i", { class: "swatch" + (i % 2 ? " hatched" : ""), style: `background-color:${this.look(look)[0]}` });
      make(entry, "span", {}, name);
    });
  }
  table(parent, b) {
    const table = make(parent, "table", { class: b.rows.length > 9 ? "ake-table long" : "ake-table" });
    if (b.title) make(table, "caption", {}, b.title);
    [b.columns, ...b.rows].forEach((cells, r) => {
      const row = make(r ? (table.tBodies[0] ?? make(table, "tbody")) : make(table, "thead"), "tr", b.hot.includes(r - 1) ? { class: "hot" } : {});
      cells.forEach((cell, c) => {
        const whole = cell.split(/\s+/).every((word) => word.length <= 20); // else a word may be broken
        const node = make(row, r ? "td" : "th", { class: `${c < b.left ? "" : "figure"} ${whole ? "whole" : ""}`.trim() }, cell);
        if (!r) this.explain(node, cell);
      });
    });
  }
  fold(parent, b, room) { // open or shut, it stays so while the picture changes
    const { folds } = this.view, fold = make(parent, "details", { class: "ake-fold" });
    fold.open = folds.has(b.title);
    make(fold, "summary", { "data-lm-suppress-shortcuts": "true" }, b.title);
    fold.addEventListener("toggle", () => folds[fold.open ? "add" : "delete"](b.title));
    this.view.line(fold, b.blocks, room);
  }
  text(parent, b) { make(parent, "p", b.lead ? { class: "lead", role: "status" } : {}, b.text); }
  tokens(parent, b) {
    const figure = make(parent, "figure"), most = Math.max(1e-9, ...b.values.map(Math.abs));
    make(figure, "figcaption", {}, b.title);
    const line = make(figure, "div", { class: "ake-tokens" });
    const signed = (v) => (v < 0 ? "−" : "+") + Math.abs(v).toFixed(2);
    b.tokens.forEach((token, t) => {
      const box = make(line, "div"), up = b.values[t] >= 0, [colour] = this.look(up ? "blue" : "vermilion");
      const word = make(box, "span", { class: "token" + (up ? "" : " hatched"), style: `border-color:${colour};--tint:${colour};--strength:${Math.round(8 + 40 * Math.abs(b.values[t]) / most)}%` });
      make(word, "span", {}, token);
      make(box, "b", {}, `${b.name} ${signed(b.values[t])}`);
      for (const [name, values] of Object.entries(b.rows)) make(box, "small", {}, `${name} ${signed(values[t])}`);
    });
    make(figure, "div", { class: "ake-unit" }, `${b.name} in ${b.unit}; blue, +: better than expected; orange, hatched, −: worse`);
  }
  copy(parent, b, _room, typed) {
    const line = make(parent, "div", { class: "ake-copy" }), id = `ake-${count++}`;
    const button = make(line, "button", { type: "button", "data-lm-suppress-shortcuts": "true", "aria-controls": id }, b.label);
    const field = make(line, "input", { id, "aria-label": typed ? "state: type or paste one, then Enter" : b.label, "data-lm-suppress-shortcuts": "true" });
    field.value = b.text;
    field.readOnly = !typed;
    field.addEventListener("focus", () => field.select());
    if (typed) { field.title = "the setting as text: type or paste one, then press Enter"; field.addEventListener("keydown", (e) => { if (e.key === "Enter") typed(field.value.trim()); }); }
    button.addEventListener("click", () => copy(b.text, button));
  }
}

class View {
  constructor(model, el, store) {
    Object.assign(this, { model, store, config: model.get("config"), inputs: {}, folds: new Set(), drawing: new Drawing(this) });
    const root = this.root = make(el, "section", { class: "ake", "aria-label": this.config.title });
    const head = make(root, "div", { class: "ake-head" });
    make(head, "span", { class: "ake-title" }, this.config.title);
    const buttons = make(head, "div", { class: "ake-buttons" }), controls = make(root, "div", { class: "ake-controls" });
    for (const c of this.config.controls) c.kind === "button" ? this.button(buttons, c.label, () => store.ask(model, { type: "press", name: c.name }), c.name) : this.control(controls, c);
    if (this.config.picture) this.button(buttons, "save picture", () => model.send({ type: "picture" }));
    if (this.config.reset) this.button(buttons, "reset", () => store.ask(model, { type: "reset" }));
    this.note = make(root, "div", { class: "ake-note", role: "alert" });
    this.picture = make(root, "div", { class: "ake-picture" });
    this.foot = make(root, "div", { class: "ake-foot" });
    this.width = 0; // known from the observer: asking an element for it would lay out the whole page, for each chart
    this.observer = new ResizeObserver(([{ contentRect: { width } }]) => { if (Math.abs(width - this.width) > 2) { this.width = width; this.draw(); } });
    this.observer.observe(this.picture);
  }
  button(parent, label, press, name = label) {
    make(parent, "button", { type: "button", "data-control": name, "data-lm-suppress-shortcuts": "true" }, label).addEventListener("click", press);
  }
  control(parent, c) {
    const row = make(parent, "div", { class: `ake-control ake-${c.kind}` }), id = `ake-${count++}`;
    const own = { id, "data-control": c.name, "data-lm-suppress-shortcuts": "true" };
    this.drawing.explain(make(row, "label", { for: id }, c.label), c.label);
    const ask = (value) => this.store.ask(this.model, { type: "set", values: { [c.name]: value } });
    let input;
    if (c.kind === "slider") {
      const range = make(row, "div", { class: "ake-range" });
      input = make(range, "input", { type: "range", min: 0, max: c.stops.length - 1, step: 1, ...own });
      if (c.ends.length) for (const end of [make(range, "div", { class: "ake-ends", "aria-hidden": "true" })]) for (const word of c.ends) make(end, "span", {}, word);
      const out = make(row, "output", { for: id });
      const say = (v) => { out.textContent = c.names[c.stops.indexOf(v)] ?? number(v); input.setAttribute("aria-valuetext", out.textContent); };
      input.addEventListener("input", () => { const v = c.stops[+input.value]; say(v); ask(v); });
      if (!this.plays && c.stops.length > 3) this.plays = this.play(row, c, input);
      this.inputs[c.name] = (v) => { input.value = c.stops.reduce((best, s, i) => Math.abs(s - v) < Math.abs(c.stops[best] - v) ? i : best, 0); say(v); };
    } else if (c.kind === "choice") {
      input = make(row, "select", own);
      if (c.options.some(([, label]) => label.length > 32)) row.classList.add("ake-long");
      for (const [key, label] of c.options) make(input, "option", { value: key }, label);
      input.addEventListener("change", () => ask(input.value));
      this.inputs[c.name] = (v) => { input.value = v; };
    } else {
      input = make(row, "input", { type: "checkbox", ...own });
      input.addEventListener("change", () => ask(input.checked));
      this.inputs[c.name] = (v) => { input.checked = v; };
    }
  }
  play(row, c, input) { // the slider moves by itself, a stop for each picture that has come
    const button = make(row, "button", { type: "button", class: "ake-play", "aria-label": `play ${c.label}`, title: "move this slider by itself", "data-lm-suppress-shortcuts": "true" }, "▶");
    const stop = () => { clearInterval(this.player); this.player = 0; button.textContent = "▶"; };
    const go = () => {
      if (this.store.flying || this.store.wanted) return;
      if (+input.value >= c.stops.length - 1) return stop();
      input.value = +input.value + 1;
      input.dispatchEvent(new Event("input"));
    };
    row.classList.add("ake-plays");
    button.addEventListener("click", () => {
      if (this.player) return stop();
      if (+input.value >= c.stops.length - 1) input.value = -1;
      button.textContent = "❚❚";
      this.player = setInterval(go, 110);
    });
    return button;
  }
  line(parent, blocks, room) { // blocks side by side, or one below the other where there is little room
    const row = make(parent, "div", { class: "ake-row" }), narrow = room < 620;
    row.style.gridTemplateColumns = narrow ? "minmax(0,1fr)" : blocks.map((b) => `minmax(0,${b.weight ?? 1}fr)`).join(" ");
    const total = blocks.reduce((sum, b) => sum + (b.weight ?? 1), 0), free = room - 28 * (blocks.length - 1); // 28: the gap in explorer.css
    for (const block of blocks) this.drawing[block.kind]?.(make(row, "div"), block, narrow ? room : free * (block.weight ?? 1) / total);
    for (const table of row.querySelectorAll(":scope > div > table")) { // one that is too wide is scrolled, by keys too
      const box = table.parentElement, keys = { tabindex: 0, role: "region", "aria-label": table.caption?.textContent ?? "table", "data-lm-suppress-shortcuts": "true" };
      if (box.scrollWidth > box.clientWidth) for (const [name, value] of Object.entries(keys)) box.setAttribute(name, value);
    }
  }
  draw() {
    const { shown, flying, wanted } = this.store;
    this.note.textContent = this.store.silent ? "The kernel does not answer. Is it busy? If it was restarted, run this cell again." : shown?.note ?? "";
    if (!shown || !this.width) return;
    for (const [name, show] of Object.entries(this.inputs)) if (!flying?.values?.[name] && !(name in (wanted?.values ?? {})) && !(name in (flying?.values ?? {}))) show(shown.values[name]);
    const focus = this.picture.contains(document.activeElement) ? [...this.picture.querySelectorAll("button,input")].indexOf(document.activeElement) : -1;
    this.picture.replaceChildren();
    const copies = ([block, ...others]) => block.kind === "copy" && !others.length;
    for (const blocks of shown.rows.filter((row) => !copies(row))) this.line(this.picture, blocks, this.width);
    if (focus >= 0) this.picture.querySelectorAll("button,input")[focus]?.focus();
    if (!this.foot.contains(document.activeElement) || document.activeElement.readOnly !== false) { // not while a state is typed
      this.foot.replaceChildren();
      for (const [block] of shown.rows.filter(copies)) this.drawing.copy(this.foot, block);
      if (this.config.state) this.drawing.copy(this.foot, { label: "copy state", text: shown.state }, 0, (text) => { document.activeElement.blur(); this.store.ask(this.model, { type: "state", text }); });
    }
    Object.assign(this.root.dataset, { state: shown.state, ms: shown.ms ?? "" }); // tests and benchmarks wait for it
  }
  dispose() { clearInterval(this.player); this.observer.disconnect(); this.root.remove(); }
}

export default () => {
  // flying: the request that the kernel works on. wanted: what was asked for since; only the newest of it is sent.
  const store = {
    views: new Set(), shown: null, flying: null, wanted: null, n: 0, silent: false, timer: 0,
    ask(model, message) {
      this.wanted = message.type === "set" && this.wanted?.type === "set" ? { type: "set", values: { ...this.wanted.values, ...message.values } } : message;
      this.send(model);
    },
    send(model) {
      if (this.flying || !this.wanted) return;
      this.flying = { ...this.wanted, n: ++this.n };
      this.wanted = null;
      model.send(this.flying);
      clearTimeout(this.timer);
      this.timer = setTimeout(() => { this.silent = true; this.flying = null; this.draw(); }, 8000);
    },
    draw() { for (const view of this.views) view.draw(); },
  };
  return {
    initialize({ model }) {
      model.on("msg:custom", (message) => {
        if (message.picture) return save(message.picture, model.get("config").title);
        if (message.n == null || message.n === store.flying?.n) { clearTimeout(store.timer); store.flying = null; }
        store.shown = message;
        store.silent = false;
        store.draw();
        store.send(model);
      });
      store.ask(model, { type: "hello" });
    },
    render({ model, el }) {
      const view = new View(model, el, store);
      store.views.add(view);
      view.draw();
      return () => { store.views.delete(view); view.dispose(); };
    },
  };
};
