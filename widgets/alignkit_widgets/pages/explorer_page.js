// Answers an explorer's messages from pictures that were computed beforehand: one for each setting of the controls.

const { axes, shapes, nodes, roots } = page, made = new Map(), start = axes.map((axis) => axis.start);
let at = [...start];

function node(i) { // parts that several pictures share are stored once
  if (typeof nodes[i] === "string") return nodes[i];
  if (!made.has(i)) {
    const [kind, ...items] = nodes[i], part = (item) => Array.isArray(item) ? node(item[0]) : item;
    if (kind === "list") made.set(i, items.map(part));
    else if (kind === "points") { const [xs, ys] = items.map(part); made.set(i, xs.map((x, n) => [x, ys[n]])); }
    else made.set(i, Object.fromEntries(shapes[kind].map((name, n) => [name, part(items[n])])));
  }
  return made.get(i);
}

const nearest = (axis, value) => {
  const exact = axis.written.indexOf(String(value));
  if (exact >= 0 || typeof axis.values[0] !== "number" || !Number.isFinite(+value)) return exact;
  return axis.values.reduce((best, v, i) => Math.abs(v - value) < Math.abs(axis.values[best] - value) ? i : best, 0);
};

function picture(n, note = "") {
  const state = axes.map((axis, i) => `${axis.name}=${axis.written[at[i]]}`).join("&");
  const root = roots[axes.reduce((index, axis, i) => index * axis.values.length + at[i], 0)];
  return { n, note, state, values: Object.fromEntries(axes.map((axis, i) => [axis.name, axis.values[at[i]]])), rows: node(root), ms: 0 };
}

function read(text) { // what the URL asks for, and what of it this page does not have
  const wrong = [];
  for (const part of text ? text.split("&") : []) {
    const [name, value] = part.split("="), i = axes.findIndex((axis) => axis.name === name);
    const found = i < 0 || value === undefined ? -1 : nearest(axes[i], value);
    if (found >= 0) at[i] = found;
    if (found < 0 || (axes[i].written[found] !== value && Number(axes[i].written[found]) !== Number(value))) wrong.push(part);
  }
  return wrong.length ? `This page does not have ${wrong.join(", ").slice(0, 200)}; the nearest setting that it has is shown.` : "";
}

function answer(message) {
  if (message.type === "set") for (const [name, value] of Object.entries(message.values)) {
    const i = axes.findIndex((axis) => axis.name === name), found = i < 0 ? -1 : nearest(axes[i], value === true ? 1 : value === false ? 0 : value);
    if (found >= 0) at[i] = found;
  }
  if (message.type === "reset") at = at.map((now, i) => axes[i].kept ? now : start[i]);
  if (message.type === "press") {
    const [name, by, around] = page.moves[message.name], i = axes.findIndex((axis) => axis.name === name), n = axes[i].values.length;
    at[i] = around ? (at[i] + by + n) % n : Math.min(Math.max(at[i] + by, 0), n - 1);
  }
  const hello = message.type === "hello", note = hello ? read(inUrl()) : "", shown = picture(message.n, note);
  queueMicrotask(() => { send(shown); if (!hello) remember(shown.state); });
}

const send = connect(page.config, answer);
window.addEventListener("hashchange", () => {
  if (inUrl() === known) return;
  const note = read(inUrl());
  send(picture(null, note));
});
