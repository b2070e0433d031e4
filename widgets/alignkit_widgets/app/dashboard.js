// The page of `alignkit app`: three tabs, the widgets' own modules in them, one websocket for all. Text through textContent only.

const token = new URLSearchParams(location.search).get("token");
const file = (name) => `/file/${name}?token=${encodeURIComponent(token)}`;
const socket = new WebSocket(`ws://${location.host}/socket?token=${encodeURIComponent(token)}`);
const send = (message) => { if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message)); };
const tabs = {}, models = {};
let known = "";

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
  const tab = make(document.querySelector("[role=tablist]"), "button", { role: "tab", id: `tab-${name}`, "aria-controls": `panel-${name}` }, label);
  const panel = make(document.querySelector("main"), "section", { role: "tabpanel", id: `panel-${name}`, "aria-labelledby": tab.id });
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
  if (name === "frontier" && !tabs.frontier.host.hasChildNodes() && !own.hidden) send({ do: "frontier" });
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
  document.getElementById("run").textContent = status.run;
  for (const [name, tab] of Object.entries(tabs)) {
    const busy = status.busy.includes(name);
    tab.tab.textContent = tab.label + (busy ? (name === "train" ? " · running" : " · busy") : "");
    tab.said.textContent = busy && name !== "train" ? "One moment …" : status.said[name];
    for (const button of tab.form.querySelectorAll("button")) button.disabled = busy;
  }
  const there = status.unfinished.join("\n");
  if (there !== goOn.dataset.there) {
    goOn.dataset.there = there;
    goOn.replaceChildren();
    for (const name of status.unfinished) make(goOn, "option", { value: name }, name);
    goOn.value = status.unfinished.at(-1);
  }
  for (const node of [goOnLabel, goOnButton]) node.hidden = !status.unfinished.length || status.busy.includes("train");
  own.hidden = !status.desk; // without a world that can be enumerated, the recorded runs are there all the same
  iterations.max = status.most;
  const names = status.checkpoints.join("\n");
  if (names !== known) {
    known = names;
    const ticked = [...boxes.querySelectorAll("input:checked")].map((box) => box.value);
    boxes.replaceChildren();
    status.checkpoints.forEach((name, i) => {
      const label = make(boxes, "label"), box = make(label, "input", { type: "checkbox", value: name });
      box.checked = ticked.length ? ticked.includes(name) || (ticked.length === 1 && i === status.checkpoints.length - 1) : i === 0 || i === status.checkpoints.length - 1;
      make(label, "span", {}, name);
    });
  }
  const many = boxes.querySelectorAll("input:checked").length, enough = status.checkpoints.length > 1;
  few.textContent = enough ? "" : "There is only one checkpoint so far. Start a run in the tab Train to make another.";
  compare.disabled ||= many < 2 || many > 6;
}

const train = addTab("train", "Train", "PPO trains the SFT policy against the reward model. You can pause, step, move the sliders and stop; a stopped run is kept.");
const label = make(train, "label", {}, "Iterations "), iterations = make(label, "input", { type: "number", min: 1, value: 40, required: "" });
make(train, "button", {}, "Start a run");
const goOnLabel = make(train, "label", {}, "Unfinished "), goOn = make(goOnLabel, "select");
const goOnButton = make(train, "button", { type: "button" }, "Continue it");
goOnButton.addEventListener("click", () => send({ do: "continue", name: goOn.value }));
train.addEventListener("submit", (e) => { e.preventDefault(); send({ do: "train", iterations: iterations.valueAsNumber }); });

const choose = addTab("compare", "Compare", "Two or more checkpoints answer the same held-out prompts; their names are hidden. Vote, then show the names.");
const boxes = make(choose, "span", { role: "group", "aria-label": "Checkpoints", style: "display:contents" }), compare = make(choose, "button", {}, "Compare");
const few = make(choose, "span");
boxes.addEventListener("change", () => { const n = boxes.querySelectorAll("input:checked").length; compare.disabled = n < 2 || n > 6; });
choose.addEventListener("submit", (e) => { e.preventDefault(); send({ do: "compare", names: [...boxes.querySelectorAll("input:checked")].map((box) => box.value) }); });

const explore = addTab("frontier", "Frontier", "How much reward a nat of KL can buy: the best policy for each price of KL, by enumeration of all responses.");
const own = make(explore, "button", { type: "button" }, "This run"), recorded = make(explore, "button", { type: "button" }, "Recorded runs");
own.addEventListener("click", () => send({ do: "frontier" }));
recorded.addEventListener("click", () => send({ do: "frontier", recorded: true }));
select("train");

const dark = matchMedia("(prefers-color-scheme: dark)"), theme = () => { document.body.dataset.jpThemeLight = !dark.matches; };
dark.addEventListener("change", theme);
theme();
socket.addEventListener("message", ({ data }) => {
  const message = JSON.parse(data);
  if (message.status) show(message.status);
  else if (message.mount) mount(message);
  else for (const heard of models[message.to]?.heard ?? []) heard(message.content);
});
socket.addEventListener("close", () => make(document.body, "p", { class: "ended", role: "alert" }, "The server has ended. Checkpoints and votes are saved."));
