// The page of `alignkit app`: three tabs (of a sweep, one), the widgets' own modules in them, one websocket for all. Text through textContent only.

const token = new URLSearchParams(location.search).get("token");
const file = (name) => `/file/${name}?token=${encodeURIComponent(token)}`;
const socket = new WebSocket(`ws://${location.host}/socket?token=${encodeURIComponent(token)}`);
const send = (message) => { if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message)); };
const tabs = {}, models = {};
let known = "", shown = null, saved = " Checkpoints and votes are saved."; // shown: tabs that have a widget
const kept = (name, value) => value === undefined ? sessionStorage.getItem(name) : sessionStorage.setItem(name, value); // over a reload

function make(parent, tag, attributes = {}, text) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text != null) node.textContent = text;
  parent.append(node);
  return node;
}

class Model { // what a widget of anywidget expects of its model, as far as ours use it
  constructor(id, config) { Object.assign(this, { id, config, heard: [] }); }
  get(name) { return name === "config" ? this.config : undefined; }
  on(name, callback) { if (name === "msg:custom") this.heard.push(callback); }
  off(name, callback) { this.heard = this.heard.filter((f) => callback && f !== callback); }
  send(content) { send({ to: this.id, content }); }
}

function addTab(name, label, about) {
  const tab = make(document.querySelector("[role=tablist]"), "button", { role: "tab", id: `tab-${name}`, "aria-controls": `panel-${name}`, hidden: "" }, label);
  const panel = make(document.querySelector("main"), "section", { role: "tabpanel", id: `panel-${name}`, "aria-labelledby": tab.id, hidden: "" });
  const form = make(panel, "form");
  make(form, "p", {}, about);
  tabs[name] = { tab, label, panel, form, said: make(panel, "p", { class: "said", role: "status" }), host: make(panel, "div"), leave: [] };
  tab.addEventListener("click", () => select(name));
  tab.addEventListener("keydown", (e) => {
    const names = Object.keys(tabs).filter((n) => !tabs[n].tab.hidden), by = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (by) { const next = names[(names.indexOf(name) + by + names.length) % names.length]; select(next); tabs[next].tab.focus(); }
  });
  return form;
}

function select(name) {
  for (const [other, { tab, panel }] of Object.entries(tabs)) {
    tab.setAttribute("aria-selected", other === name);
    tab.tabIndex = other === name ? 0 : -1;
    panel.hidden = other !== name;
  }
  history.replaceState(null, "", `#${name}`); // a reload opens the same tab
  if (name === "frontier" && !shown.includes(name)) send({ do: "frontier" });
}

async function mount({ mount: id, tab, kind, config }) {
  if (models[id]) return;
  const model = models[id] = new Model(id, config), { host, leave } = tabs[tab];
  for (const end of leave.splice(0)) end?.();
  host.replaceChildren();
  host.dataset.of = id;
  if (!document.querySelector(`link[data-kind=${kind}]`)) make(document.head, "link", { rel: "stylesheet", href: file(`${kind}.css`), "data-kind": kind });
  const module = await import(file(`${kind}.js`)), widget = typeof module.default === "function" ? await module.default() : module.default;
  if (host.dataset.of === id) leave.push(await widget.initialize?.({ model }), await widget.render({ model, el: host })); // else another came meanwhile
}

function show(status) {
  const first = shown === null;
  document.getElementById("run").textContent = status.run;
  if (status.sweep) showSweep(status);
  for (const [name, tab] of Object.entries(tabs)) {
    const working = status.busy.includes(name);
    tab.tab.hidden = !status.tabs.includes(name);
    tab.tab.textContent = tab.label + (working ? (name === "train" ? " · running" : " · busy") : "");
    tab.said.textContent = status.said[name] || (working && name !== "train" ? "One moment …" : "");
    for (const button of tab.form.querySelectorAll("button")) button.disabled = working;
    if (tab.host.dataset.of && !status.shown.includes(name)) {
      for (const end of tab.leave.splice(0)) end?.();
      tab.host.replaceChildren();
      delete tab.host.dataset.of;
    }
  }
  if (!status.sweep) showRun(status, first);
  shown = status.shown;
  const asked = location.hash.slice(1);
  if (first) select(status.tabs.includes(asked) ? asked : status.tabs[0]);
}

function showSweep(status) {
  tabs.frontier.label = "Sweep";
  explore.querySelector("p").textContent = status.sweep;
  own.textContent = "Read it again";
  recorded.hidden = true;
  saved = "";
}

function showRun(status, first) {
  const busy = status.busy.includes("train");
  about.textContent = status.about;
  for (const button of home.querySelectorAll("[data-starts]")) button.disabled = busy;
  if (first || busy !== (home.dataset.busy === "true")) home.open = !busy;
  home.dataset.busy = busy;
  iterations.max = status.most;
  if (first) for (const [name, input] of Object.entries(settings)) input.value = kept(name) ?? status.settings[name];
  showUnfinished(status);
  showRuns(status);
  showCheckpoints(status);
  measure.hidden = !status.unmeasured.length;
  measure.textContent = `Measure ${status.unmeasured.join(", ")}`;
}

function showUnfinished({ runs }) { // newest first
  const unfinished = runs.filter((run) => run.unfinished).map((run) => run.name);
  const there = unfinished.join("\n");
  if (there !== goOn.dataset.there) {
    goOn.dataset.there = there;
    goOn.replaceChildren();
    for (const name of unfinished) make(goOn, "option", { value: name }, name);
    goOn.value = unfinished[0];
  }
  for (const node of [goOnLabel, goOnButton]) node.hidden = !unfinished.length;
  goOnNone.hidden = unfinished.length > 0;
}

function showRuns({ runs, running }) {
  const number = (v) => v == null ? "–" : v.toFixed(2).replace("-", "−");
  earlier.hidden = !runs.length;
  rows.replaceChildren();
  for (const run of runs) {
    const row = make(rows, "tr");
    const state = run.name === running ? "running" : run.done < run.iterations ? `${run.done} of ${run.iterations}` : `${run.done}, finished`;
    for (const [tag, text] of [["th", run.name], ["td", run.kl_coef], ["td", run.seed], ["td", state], ["td", number(run.proxy)], ["td", number(run.kl)]])
      make(row, tag, tag === "th" ? { scope: "row" } : {}, String(text));
    const cell = make(row, "td");
    const again = make(cell, "button", { type: "button", "aria-label": `Use the settings of ${run.name}` }, "Same settings");
    again.addEventListener("click", () => { for (const [name, input] of Object.entries(settings)) { input.value = run[name]; kept(name, run[name]); } settings.kl_coef.focus(); });
  }
}

function showCheckpoints({ checkpoints }) {
  const names = checkpoints.join("\n");
  if (names !== known) {
    const ticked = known ? [...boxes.querySelectorAll("input:checked")].map((box) => box.value) : JSON.parse(kept("ticked") ?? "[]");
    known = names;
    boxes.replaceChildren();
    checkpoints.forEach((name, i) => {
      const label = make(boxes, "label"), box = make(label, "input", { type: "checkbox", value: name });
      box.checked = ticked.length ? ticked.includes(name) || (ticked.length === 1 && i === checkpoints.length - 1) : i === 0 || i === checkpoints.length - 1;
      make(label, "span", {}, name);
    });
  }
  const many = boxes.querySelectorAll("input:checked").length, enough = checkpoints.length > 1;
  few.textContent = enough ? "" : "There is only one checkpoint so far. Start a run in the tab Train to make another.";
  toCompare.disabled = !enough;
  compareSays.textContent = enough ? `${checkpoints.length} checkpoints answer the same prompts; you vote without knowing which is which.` : few.textContent;
  compare.disabled ||= many < 2 || many > 6;
}

function card(title, says) {
  const box = make(cards, "section", { class: "card" });
  make(box, "h2", {}, title);
  return { box, says: make(box, "p", {}, says) };
}

const about = addTab("train", "Train", "").querySelector("p");
const home = make(tabs.train.panel, "details", { open: "", class: "home" });
make(home, "summary", {}, "What to do");
const cards = make(home, "div", { class: "cards" });

const starting = card("Start", "A new PPO run from SFT. You can pause it, step, move its sliders, go back and stop; a stopped run is kept.");
const train = make(starting.box, "form"), settings = {};
for (const [name, label, attributes] of [["kl_coef", "kl_coef", { min: 0, step: "any" }], ["seed", "Seed", { min: 0, step: 1 }], ["iterations", "Iterations", { min: 1, step: 1 }]]) {
  const input = settings[name] = make(make(train, "label", {}, `${label} `), "input", { type: "number", required: "", ...attributes });
  input.addEventListener("change", () => kept(name, input.value));
}
settings.kl_coef.parentElement.title = "the price of a nat of KL to SFT, in SFT-sd of proxy reward";
settings.seed.parentElement.title = "of the sampling and of the order of minibatches; the world stays the same";
const { iterations } = settings;
make(train, "button", { "data-starts": "" }, "Start a run");
train.addEventListener("submit", (e) => {
  e.preventDefault();
  send({ do: "train", ...Object.fromEntries(Object.entries(settings).map(([name, input]) => [name, input.valueAsNumber])) });
});

const going = card("Continue", "A run that was stopped goes on from its last checkpoint, with the settings that it had.");
const goOnForm = make(going.box, "form"), goOnLabel = make(goOnForm, "label", {}, "Unfinished "), goOn = make(goOnLabel, "select");
const goOnButton = make(goOnForm, "button", { type: "button", "data-starts": "" }, "Continue it");
const goOnNone = make(goOnForm, "span", {}, "No run is unfinished.");
goOnButton.addEventListener("click", () => send({ do: "continue", name: goOn.value }));

const comparing = card("Compare", ""), compareSays = comparing.says;
const toCompare = make(make(comparing.box, "form"), "button", { type: "button" }, "Compare checkpoints");
toCompare.addEventListener("click", () => { select("compare"); tabs.compare.tab.focus(); });

const exploring = card("Explore", "How much reward a nat of KL can buy, and where this run's policies stand.");
const toExplore = make(make(exploring.box, "form"), "button", { type: "button" }, "Explore the frontier");
toExplore.addEventListener("click", () => { select("frontier"); tabs.frontier.tab.focus(); });

const earlier = make(home, "div", { class: "earlier", role: "region", "aria-label": "Earlier runs", tabindex: 0, hidden: "" });
make(earlier, "h2", {}, "Earlier runs");
const table = make(earlier, "table"), heads = make(make(table, "thead"), "tr"), rows = make(table, "tbody");
for (const head of ["run", "kl_coef", "seed", "iterations", "proxy, SFT-sd", "KL, nats", ""]) make(heads, head ? "th" : "td", head ? { scope: "col" } : {}, head);

const choose = addTab("compare", "Compare", "Two or more checkpoints answer the same held-out prompts; their names are hidden. Vote, then show the names.");
const boxes = make(choose, "span", { role: "group", "aria-label": "Checkpoints", style: "display:contents" }), compare = make(choose, "button", {}, "Compare");
const few = make(choose, "span");
boxes.addEventListener("change", () => {
  const ticked = [...boxes.querySelectorAll("input:checked")].map((box) => box.value);
  compare.disabled = ticked.length < 2 || ticked.length > 6;
  kept("ticked", JSON.stringify(ticked));
});
choose.addEventListener("submit", (e) => { e.preventDefault(); send({ do: "compare", names: [...boxes.querySelectorAll("input:checked")].map((box) => box.value) }); });

const explore = addTab("frontier", "Frontier", "How much reward a nat of KL can buy, and where this run's SFT, PPO and DPO policies stand. In the desk world both are exact; elsewhere they are measured from samples on held-out prompts.");
const own = make(explore, "button", { type: "button" }, "This run"), recorded = make(explore, "button", { type: "button" }, "Recorded runs");
own.addEventListener("click", () => send({ do: "frontier" }));
const measure = make(explore, "button", { type: "button", hidden: "" });
recorded.addEventListener("click", () => send({ do: "frontier", recorded: true }));
measure.addEventListener("click", () => send({ do: "frontier", measure: true }));

const dark = matchMedia("(prefers-color-scheme: dark)"), theme = () => { document.body.dataset.jpThemeLight = !dark.matches; };
dark.addEventListener("change", theme);
theme();
socket.addEventListener("message", ({ data }) => {
  const message = JSON.parse(data);
  if (message.status) show(message.status);
  else if (message.mount) mount(message);
  else for (const heard of models[message.to]?.heard ?? []) heard(message.content);
});
socket.addEventListener("close", () => make(document.body, "p", { class: "ended", role: "alert" }, `The server has ended.${saved}`));
