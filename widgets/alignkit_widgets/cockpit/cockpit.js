// The panel of TrainingCockpit: plain ESM for anywidget, no build step, nothing loaded from elsewhere.
// Rule: text reaches the page through textContent only. Model text is never parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";
const ICONS = { Play: "M3 2 13 8 3 14Z", Pause: "M3 2h4v12H3ZM9 2h4v12H9Z", Step: "M2 2 9 8 2 14ZM10 2h3v12h-3Z", Stop: "M3 3h10v10H3Z" };

const short = (key) => key.split("/").pop();
const typeable = (v) => v && Math.abs(v) < 1e-3 ? v.toExponential() : v; // 3e-6, which is as exact as 0.000003 and fits its box
const number = (v) => v == null ? "–" : v === 0 ? "0" : Math.abs(v) >= 1e4 || Math.abs(v) < 1e-3 ? v.toExponential(1) : String(+v.toPrecision(3));

function make(parent, tag, attributes = {}, text) {
  const svg = parent instanceof SVGElement || tag === "svg";
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text != null) node.textContent = text;
  parent.append(node);
  return node;
}

function nice(low, high, n) {
  const raw = (high - low) / n, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.999) ?? 10), ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(+(k * step).toPrecision(12));
  return ticks;
}

function thin(points, most = 900) { // the smallest and the largest of each bucket: peaks stay
  if (points.length <= most) return points;
  const size = Math.ceil(2 * points.length / most), kept = [];
  for (let i = 0; i < points.length; i += size) {
    const part = points.slice(i, i + size).filter((p) => p[1] != null).sort((a, b) => a[1] - b[1]);
    if (part.length) kept.push(...[part[0], part[part.length - 1]].sort((a, b) => a[0] - b[0]));
  }
  return kept;
}

function at(points, x) { // the last point at or before x
  let low = 0, high = points.length;
  while (low < high) { const mid = (low + high) >> 1; points[mid][0] <= x ? (low = mid + 1) : (high = mid); }
  return points[low - 1];
}

function save(picture, title) { // a PNG in base64, as a download
  const name = title.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
  Object.assign(document.createElement("a"), { href: `data:image/png;base64,${picture}`, download: `${name}.png` }).click();
}

class Plot { // what line charts and bands share: size, x axis, marks, cursor
  constructor(view, parent, height) {
    this.view = view; this.height = height;
    this.svg = make(parent, "svg", { class: "akc-plot", height, tabindex: 0, role: "img", "data-lm-suppress-shortcuts": "true" });
    this.svg.addEventListener("pointermove", (e) => view.point(this.iteration(e.clientX - this.svg.getBoundingClientRect().left)));
    this.svg.addEventListener("pointerleave", () => view.point(null));
    this.svg.addEventListener("blur", () => view.point(null));
    this.svg.addEventListener("keydown", (e) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10 }[e.key], last = view.store.state?.done ?? 0;
      if (by) { view.point(Math.min(Math.max((view.cursor ?? last) + by, 1), last)); e.preventDefault(); }
    });
  }
  tall(height) { if (height !== this.height) { this.height = height; this.svg.setAttribute("height", height); } }
  iteration(px) { return Math.round((px - this.left) / (this.width - this.left - this.right) * this.end); }
  frame(low, high, ticks, label, room = 0) {
    const width = this.svg.clientWidth || 300, right = room < width / 3 ? room : 14;
    Object.assign(this, { width, left: 44, right, top: this.view.store.marks.length ? 26 : 14, bottom: 30, end: this.view.end() });
    const { height, left, top, bottom, svg, end } = this;
    svg.replaceChildren();
    this.x = (v) => left + v / end * (width - left - right);
    this.y = (v) => top + (high - v) / (high - low) * (height - top - bottom);
    for (const t of ticks) {
      make(svg, "line", { class: "grid", x1: left, x2: width - right, y1: this.y(t), y2: this.y(t) });
      make(svg, "text", { x: left - 6, y: this.y(t) + 4, "text-anchor": "end" }, label(t));
    }
    for (const t of nice(0, end, width > 360 ? 5 : 4).filter((t) => t % 1 === 0))
      make(svg, "text", { x: this.x(t), y: height - bottom + 14, "text-anchor": "middle" }, String(t));
    make(svg, "text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, this.view.config.unit);
  }
  finish(labels) {
    const { svg, top, bottom, height, width } = this, ends = [-1e9, -1e9];
    for (const m of labels ? this.view.store.marks : []) {
      const x = this.x(m.step), text = m.old === null ? m.name : `${m.name} ${number(m.old)} → ${number(m.new)}`, size = text.length * 5.4;
      const right = x + 4 + size < width, from = right ? x + 3 : x - 3 - size, row = ends.findIndex((e) => e < from);
      make(svg, "line", { class: "mark", x1: x, x2: x, y1: top - 4, y2: height - bottom });
      if (row < 0) continue; // no room: the line stays, the number is in the log
      make(svg, "text", { class: "marktext", x: right ? x + 3 : x - 3, y: 9 + row * 11, "text-anchor": right ? "start" : "end" }, text);
      ends[row] = from + size;
    }
    if (this.view.cursor != null) make(svg, "line", { class: "cursor", x1: this.x(this.view.cursor), x2: this.x(this.view.cursor), y1: top, y2: height - bottom });
  }
}

class Chart extends Plot {
  constructor(view, parent, chart) {
    const figure = make(parent, "figure"), alone = chart.keys.length === 1; // alone: the title names the line
    const title = make(figure, "figcaption", {}, chart.title), legend = make(figure, "div", { class: "akc-legend" });
    const meaning = Object.entries(view.config.glossary ?? {}).find(([term]) => chart.title.startsWith(term))?.[1];
    if (meaning) title.title = meaning;
    super(view, figure, 168);
    Object.assign(this, chart);
    this.values = chart.keys.map((key, i) => {
      const entry = make(legend, "span"), [colour, dash] = this.style(i);
      make(make(entry, "svg", { width: 26, height: 8, "aria-hidden": "true" }), "path", { class: "series", d: "M1 4H25", stroke: colour, "stroke-dasharray": dash });
      make(entry, "span", {}, alone ? " now " : ` ${view.label(key)} `);
      return make(entry, "b");
    });
    this.past = make(legend, "span", { hidden: "" });
    make(make(this.past, "svg", { width: 26, height: 8, "aria-hidden": "true" }), "path", { class: "past", d: "M1 4H25", stroke: "currentColor" });
    make(this.past, "span", {}, " before the rewind");
  }
  style(i) { const { lines } = this.view.config; return lines[i % lines.length]; }
  draw() {
    const { store, cursor } = this.view, lines = ({ points }) => this.keys.map((key) => points[key] ?? []);
    const series = lines(store), branches = store.branches.map(lines);
    const values = [series, ...branches, lines({ points: store.ahead ?? {} })].flat(2).map((p) => p[1]).filter((v) => v != null);
    let low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (!values.length) [low, high] = [0, 1];
    if (low > 0 && low < 0.5 * high) low = 0;
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    if (low !== 0) low -= pad;
    high += pad;
    const ticks = nice(low, high, 4), digits = Math.max(0, ...ticks.map((t) => (String(t).split(".")[1] ?? "").length));
    const names = this.keys.length > 1 ? this.keys.map((key) => this.view.label(key)) : [];
    const room = 24 + 6.6 * Math.max(0, ...names.map((name) => name.length));
    this.frame(low, high, ticks, (t) => Math.abs(t) >= 1e4 || digits > 4 ? number(t) : t.toFixed(digits), room);
    const heads = [];
    for (const branch of branches) branch.forEach((points, i) => make(this.svg, "path", { class: "past", d: this.path(points), stroke: this.style(i)[0] }));
    series.forEach((points, i) => {
      const [colour, dash] = this.style(i);
      make(this.svg, "path", { class: "series", d: this.path(points), stroke: colour, "stroke-dasharray": dash });
      const head = at(points, cursor ?? Infinity);
      this.values[i].textContent = head ? number(head[1]) : "";
      if (head && head[1] != null) heads.push({ x: this.x(head[0]), y: this.y(head[1]), colour, text: names[i] ?? "" });
    });
    this.finish(true);
    heads.sort((a, b) => a.y - b.y);
    heads.forEach((h, i) => { h.ly = Math.max(h.y + 4, this.top + 8, i ? heads[i - 1].ly + 13 : 0); });
    const over = (heads.at(-1)?.ly ?? 0) - (this.height - this.bottom - 4);
    for (const h of heads) {
      make(this.svg, "circle", { cx: h.x, cy: h.y, r: 3, fill: h.colour });
      if (h.text && this.right > 14) make(this.svg, "text", { class: "halo", x: this.width - this.right + 8, y: h.ly - Math.max(over, 0) }, h.text); // beside the plot: no line runs there
    }
    if (!values.length) make(this.svg, "text", { x: this.width / 2, y: this.height / 2, "text-anchor": "middle" }, "no values yet");
    this.past.hidden = !branches.length;
    const said = this.keys.map((key, i) => `${this.view.label(key)} ${this.values[i].textContent}`).join(", ");
    this.svg.setAttribute("aria-label", `${this.title}. ${said}${branches.length ? "; dotted: before the rewind" : ""}`);
  }
  path(points) {
    let d = "", pen = "M";
    for (const [x, v] of thin(points)) {
      if (v == null) { pen = "M"; continue; }
      d += `${pen}${this.x(x).toFixed(1)} ${this.y(v).toFixed(1)}`; pen = "L";
    }
    return d;
  }
}

class Bands extends Plot { // shares of behaviours of one prompt class, stacked
  constructor(view, parent, kind) {
    const figure = make(parent, "figure"), caption = make(figure, "figcaption", {}, `${kind} prompts: % of responses`);
    super(view, figure, 118);
    this.kind = kind;
    this.words = make(figure, "div", { class: "akc-shares" });
  }
  draw() {
    const { store, cursor } = this.view, of = ({ shares }) => shares.filter(([, s]) => s[this.kind]).map(([x, s]) => [x, s[this.kind]]);
    const rows = of(store), branches = store.branches.map(of).map((past) => ({ past, under: past.map(() => 0) }));
    if (!rows.length) return this.svg.replaceChildren();
    this.frame(0, 1, [0, 0.5, 1], (t) => `${100 * t}`, 14);
    const head = at(rows, cursor ?? Infinity) ?? rows[0], words = [];
    let under = rows.map(() => 0);
    const known = Object.keys(this.view.config.behaviours), labels = [], lines = [];
    for (const name of [...known.filter((b) => store.behaviours.includes(b)), ...store.behaviours.filter((b) => !known.includes(b))]) {
      const over = rows.map(([, s], i) => under[i] + (s[name] ?? 0)), share = head[1][name] ?? 0;
      const up = rows.map(([x], i) => `${this.x(x).toFixed(1)} ${this.y(over[i]).toFixed(1)}`);
      const down = rows.map(([x], i) => `${this.x(x).toFixed(1)} ${this.y(under[i]).toFixed(1)}`).reverse();
      const colour = this.view.config.behaviours[name] ?? "#999999";
      make(this.svg, "path", { d: `M${[...up, ...down].join("L")}Z`, fill: colour, stroke: "var(--panel)", "stroke-width": 1 });
      const at_ = rows.indexOf(head), middle = (over[at_] + under[at_]) / 2, x = this.x(head[0]);
      if (share >= 0.13) {
        const left = x - this.left > 12 + 6.4 * name.length;
        labels.push([{ class: "halo", x: left ? x - 5 : x + 6, y: this.y(middle) + 4, "text-anchor": left ? "end" : "start" }, name]);
      }
      if (share > 0) words.push(`${name} ${Math.round(100 * share)} %`);
      under = over;
      for (const branch of branches) { // where this band ended, as a line
        branch.under = branch.past.map(([, s], i) => branch.under[i] + (s[name] ?? 0));
        if (branch.under.some((v) => v < 0.999)) lines.push(branch.past.map(([x], i) => `${this.x(x).toFixed(1)} ${this.y(branch.under[i]).toFixed(1)}`));
      }
    }
    for (const line of lines) make(this.svg, "path", { class: "past", d: `M${line.join("L")}`, stroke: "var(--ink)" });
    for (const [place, name] of labels) make(this.svg, "text", place, name); // above all bands
    this.finish(false);
    this.words.textContent = this.words.title = words.join(" · ");
    this.svg.setAttribute("aria-label", `${this.kind} prompts, share of responses: ${words.join(", ")}`);
  }
}

class View {
  constructor(model, el, store) {
    Object.assign(this, { model, store, config: model.get("config"), cursor: null, dirty: {}, bands: {}, timers: {}, unsent: {} });
    const root = this.root = make(el, "section", { class: "akc", "aria-label": `Training: ${this.config.title}` });
    const head = make(root, "div", { class: "akc-head" });
    make(head, "span", { class: "akc-title" }, this.config.title);
    this.state = make(head, "span", { class: "akc-state", role: "status" });
    this.place = make(head, "span", { class: "akc-place" });
    this.inside = make(head, "span", { class: "akc-inside" });
    if (this.config.mode === "recorded"); // a recorded run's page has its own buttons
    else if (this.config.mode !== "watch") this.addButtons(make(head, "div", { class: "akc-buttons", role: "group", "aria-label": "Run" }));
    else make(head, "span", { class: "akc-place", style: "margin-left:auto" }, "to stop: Interrupt in the toolbar");
    this.progress = make(root, "progress", { max: this.config.total ?? 1, value: 0, "aria-label": "Progress" });
    this.note = make(root, "div", { class: "akc-note", role: "status" });
    this.inputs = {};
    const controls = make(root, "div", { class: "akc-controls" });
    if (!["watch", "recorded"].includes(this.config.mode)) {
      for (const control of this.config.controls) this.addControl(controls, control);
      this.addRewind(controls);
    }
    this.grid = make(root, "div", { class: "akc-grid" });
    this.charts = this.config.charts.map((chart) => new Chart(this, this.grid, chart));
    this.shares = this.fold(root, "What the policy does", "akc-bands");
    this.bandGrid = make(this.shares.box, "div", { class: "akc-grid" });
    this.sampled = this.fold(root, "Samples", "akc-pairs");
    this.table = make(this.sampled.box, "table", { class: "akc-samples" });
    if (this.config.log) make(root, "div", { class: "akc-log" }, `log: ${this.config.log}`);
    if (this.config.picture) this.savePicture(head);
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(root);
    this.beat = setInterval(() => { if (this.store.state?.name === "paused") this.model.send({ type: "alive" }); }, 2000);
  }
  fold(parent, name, kind) { // one line, whose words are live; its content has a fixed height, so that the panel keeps its own
    const fold = make(parent, "details", { class: `akc-fold ${kind}` }), line = make(fold, "summary", { "data-lm-suppress-shortcuts": "true" });
    make(line, "b", {}, name);
    fold.addEventListener("toggle", () => this.draw());
    const scrolled = { tabindex: 0, role: "region", "aria-label": name, "data-lm-suppress-shortcuts": "true" }; // by keys too
    return { fold, words: make(line, "span"), box: make(fold, "div", scrolled) };
  }
  savePicture(head) {
    const button = make(head, "button", { type: "button", class: "akc-save", "data-lm-suppress-shortcuts": "true" }, "save picture");
    button.addEventListener("click", () => this.model.send({ type: "picture" }));
  }
  addButtons(group) {
    this.buttons = {};
    for (const name of ["Pause", "Step", "Stop"]) {
      const button = this.buttons[name] = make(group, "button", { type: "button", "data-lm-suppress-shortcuts": "true" });
      make(make(button, "svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }), "path", { d: ICONS[name] });
      make(button, "span", {}, name);
      button.addEventListener("click", () => {
        for (const send of Object.values(this.unsent)) send(); // what a slider says counts for the step that is asked for now
        this.model.send({ type: button.textContent.toLowerCase() });
      });
    }
    this.buttons.Step.title = "one iteration, then pause";
    this.buttons.Stop.title = "end the run here and keep it";
  }
  addControl(parent, control) {
    const row = make(parent, "div", { class: "akc-control" }), id = `akc-${Math.random().toString(36).slice(2)}`, { name, stops } = control;
    const named = make(row, "label", { for: id }, name), meaning = this.config.glossary?.[name];
    if (meaning) named.title = meaning;
    const own = { "data-lm-suppress-shortcuts": "true", "data-control": name };
    const slider = make(row, "input", { type: "range", id, min: 0, max: stops.length - 1, step: 1, ...own });
    const box = make(row, "input", { type: "number", min: stops[0], max: stops.at(-1), step: "any", "aria-label": `${name}, exact value`, ...own });
    const wait = make(row, "span", { class: "akc-wait", role: "status" });
    const show = (v) => {
      slider.value = stops.reduce((best, s, i) => Math.abs(s - v) < Math.abs(stops[best] - v) ? i : best, 0);
      slider.setAttribute("aria-valuetext", number(v));
      box.value = typeable(v);
    };
    const ask = (v) => {
      this.dirty[name] = v;
      clearTimeout(this.timers[name]); // the last of a burst is sent
      this.unsent[name] = () => { clearTimeout(this.timers[name]); delete this.unsent[name]; this.model.send({ type: "set", name, value: v }); };
      this.timers[name] = setTimeout(this.unsent[name], 60);
      wait.textContent = `${number(v)} from the next iteration on`;
    };
    slider.addEventListener("input", () => { const v = stops[+slider.value]; slider.setAttribute("aria-valuetext", number(v)); box.value = typeable(v); ask(v); });
    const typed = () => { const v = Math.min(Math.max(+box.value, stops[0]), stops.at(-1)); show(v); ask(v); };
    box.addEventListener("change", typed);
    box.addEventListener("keydown", (e) => { if (e.key === "Enter") typed(); }); // JupyterLab keeps Enter from making a change
    this.inputs[name] = { slider, box, wait, show };
    show(control.start);
  }
  addRewind(parent) { // invisible until the run says what it can go back to; its place is kept
    const row = make(parent, "div", { class: "akc-control akc-rewind", style: "visibility:hidden" }), id = `akc-${Math.random().toString(36).slice(2)}`;
    make(row, "label", { for: id }, `back to ${this.config.unit}`);
    const select = make(row, "select", { id, "data-lm-suppress-shortcuts": "true" });
    const button = make(row, "button", { type: "button", "data-lm-suppress-shortcuts": "true" }, "Rewind");
    button.title = "go back to this iteration and train on with the present controls; the curves since then stay as dotted lines";
    const wait = make(row, "span", { class: "akc-wait", role: "status" });
    button.addEventListener("click", () => {
      this.model.send({ type: "rewind", iteration: +select.value });
      wait.textContent = "after this iteration";
      this.rewind.done = this.store.state.done;
    });
    this.rewind = { row, select, button, wait, done: null };
  }
  end() { // of the x axis: the run's, or less while only a little of a long run is done
    const runs = [this.store, ...this.store.branches, { points: this.store.ahead ?? {} }].flatMap(({ points }) => Object.values(points));
    const last = Math.max(1, ...runs.map((p) => p.at(-1)?.[0] ?? 1));
    let end = 20;
    while (end < 1.25 * last) end *= 2;
    return Math.max(last, 2 * end < (this.config.total ?? Infinity) ? end : this.config.total);
  }
  label(key) { return this.config.labels[key] ?? short(key); }
  point(x) { if (x !== this.cursor) { this.cursor = x; this.draw(); } }
  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => { this.header(); this.pictures(); this.intoView(); });
  }
  pictures() {
    for (const grid of [this.grid, this.bandGrid]) { // columns that fill their rows: four charts stand 2 × 2, not 3 + 1
      const n = grid.childElementCount, rows = Math.ceil(n / Math.max(1, Math.floor(this.root.clientWidth / 250)));
      grid.style.gridTemplateColumns = `repeat(${Math.max(1, Math.ceil(n / rows) || 1)}, minmax(0, 1fr))`;
      if (grid === this.grid) for (const chart of this.charts) chart.tall(rows > 1 ? 130 : 190);
    }
    for (const chart of this.charts) chart.draw();
    this.behaviours();
    const { samples } = this.store;
    if (samples === (this.shown ?? null)) return;
    this.shown = samples;
    this.table.replaceChildren();
    this.sampled.words.textContent = "";
    if (!samples) return;
    const [prompt, response] = samples.pairs[0] ?? ["", ""], fit = this.store.shares.length; // other data may not be fit for a screen: its
    this.sampled.words.textContent = ` at ${this.config.unit} ${samples.step}` + (fit ? `: ${prompt.trim()} → ${response.trim()}` : ""); // texts stay folded
    for (const [tag, cells] of [["th", ["prompt", "response"]], ...samples.pairs.map((p) => ["td", p])]) {
      const row = make(this.table, "tr");
      for (const text of cells) make(row, tag, {}, text);
    }
  }
  behaviours() {
    const last = this.store.shares.at(-1)?.[1] ?? {}, kinds = new Set(this.store.shares.flatMap(([, s]) => Object.keys(s)));
    const most = (part) => Object.entries(part).sort((a, b) => b[1] - a[1])[0] ?? ["", 0];
    this.shares.words.textContent = Object.entries(last).map(([kind, part]) => ` · ${kind}: ${most(part)[0]} ${Math.round(100 * most(part)[1])} %`).join("");
    this.shares.fold.hidden = this.store.rows > 0 && ![this.store, ...this.store.branches].some(({ shares }) => shares.length);
    if (!this.shares.fold.open) return;
    for (const kind of kinds) (this.bands[kind] ??= new Bands(this, this.bandGrid, kind)).draw();
  }
  intoView() { // once, when the run begins: the cell's own scrolling comes before it
    if (this.store.scrolled || !this.store.state || this.config.mode !== "control") return;
    this.store.scrolled = true;
    setTimeout(() => this.root.scrollIntoView({ block: this.root.clientHeight < window.innerHeight ? "nearest" : "start" }), 250);
  }
  header() {
    const state = this.store.state;
    if (!state) return;
    if (this.state.textContent !== state.name) this.state.textContent = state.name;
    this.state.dataset.state = state.name;
    this.place.textContent = state.place;
    this.inside.textContent = state.inside ? `now: ${state.inside.words}` : "";
    this.progress.value = state.done + (state.inside?.share ?? 0);
    if (this.note.textContent !== state.note) this.note.textContent = state.note;
    if (this.buttons) {
      const { Pause: toggle, Step, Stop } = this.buttons, name = state.name === "paused" ? "Play" : "Pause";
      toggle.lastChild.textContent = name;
      toggle.firstChild.firstChild.setAttribute("d", ICONS[name]);
      for (const button of [toggle, Step, Stop]) button.disabled = state.over;
    }
    if (this.rewind) this.earlier(state);
    for (const [name, { slider, box, wait, show }] of Object.entries(this.inputs)) {
      const value = state.waiting[name] ?? state.controls[name];
      if (this.dirty[name] === value) delete this.dirty[name];
      slider.disabled = box.disabled = state.over || this.config.mode === "replay";
      if (name in this.dirty) continue;
      if (document.activeElement !== box) show(value);
      wait.textContent = name in state.waiting ? `${number(value)} from the next iteration on` : "";
    }
  }
  earlier({ snapshots, done, over }) { // what the run can go back to
    const { row, select, button, wait } = this.rewind, there = [...select.options].map((option) => +option.value);
    if (snapshots) {
      row.style.visibility = "visible";
      for (const option of [...select.options]) if (!snapshots.includes(+option.value)) option.remove();
      for (const at of snapshots) if (!there.includes(at)) make(select, "option", { value: at }, at ? String(at) : "start");
    }
    select.disabled = button.disabled = !snapshots;
    if (over || done !== this.rewind.done) wait.textContent = "";
  }
  dispose() { clearInterval(this.beat); this.observer.disconnect(); cancelAnimationFrame(this.frame); this.root.remove(); }
}

export default () => {
  const store = { views: new Set(), rows: 0, points: {}, shares: [], behaviours: [], marks: [], branches: [], samples: null, state: null };
  const receive = (model, message) => {
    if (message.whole) Object.assign(store, { rows: 0, points: {}, shares: [], marks: [], branches: message.branches, ahead: message.ahead });
    if (message.from === store.rows) {
      store.rows = message.to;
      for (const [key, points] of Object.entries(message.points)) (store.points[key] ??= []).push(...points);
      store.shares.push(...message.shares);
      store.marks.push(...message.marks);
      for (const [, kinds] of [message, ...message.branches].flatMap(({ shares }) => shares)) for (const part of Object.values(kinds))
        for (const name of Object.keys(part)) if (!store.behaviours.includes(name)) store.behaviours.push(name);
    } else model.send({ type: "sync" }); // something was missed
    store.samples = message.samples ?? (message.whole ? null : store.samples); // a rewind takes them back
    store.state = message.state;
    for (const view of store.views) view.draw();
  };
  return {
    initialize({ model }) {
      model.on("msg:custom", (message) => message.picture ? save(message.picture, model.get("config").title) : receive(model, message));
      const leave = () => model.send({ type: "gone" });
      window.addEventListener("pagehide", leave);
      model.send({ type: "sync" });
      return () => window.removeEventListener("pagehide", leave);
    },
    render({ model, el }) {
      const view = new View(model, el, store);
      store.views.add(view);
      view.draw();
      return () => { store.views.delete(view); view.dispose(); if (!store.views.size) model.send({ type: "gone" }); };
    },
  };
};
