// Plays a recorded run: what the cockpit showed after each iteration, on any of the run's branches.

const { ways, keys, rows, samples } = page, last = (way) => ways[way].rows.length;
const now = { way: ways.length - 1, at: 0, playing: false, seconds: 0.25 };

function drawn(list) { // rows as the cockpit's messages have them
  const points = Object.fromEntries(keys.map((key, k) => [key, list.map((row) => [row.step, row.values[k]])]));
  return { points, shares: list.filter((row) => row.shares).map((row) => [row.step, row.shares]) };
}
const whole = ways.map((way) => way.rows.map((i) => rows[i]));
const parts = whole.map((list, way) => whole.flatMap((other, n) => { // what the other ways have that this one has not
  const shared = other.findIndex((row, i) => row !== list[i]);
  return n === way || shared < 0 ? [] : [drawn(other.slice(Math.max(0, shared - 1)))];
}));

function newestSamples(list) { // the last that were recorded so far on this way: {step, pairs}
  for (const row of [...list].reverse())
    for (let way = now.way; way >= 0; way--) {
      const pairs = samples[`${way}:${row.step}`];
      if (pairs && whole[way].includes(row)) return { step: row.step, pairs };
    }
  return Object.keys(samples).length ? { step: 0, pairs: [] } : null;
}

function show() {
  const list = whole[now.way].slice(0, now.at), row = list.at(-1), step = row?.step ?? 0;
  const set = Object.entries(row?.controls ?? {}).map(([name, value]) => `${name} ${+value.toPrecision(3)}`);
  const state = { name: now.playing ? "playing" : now.at === last(now.way) ? "finished" : "paused", over: false, done: step, note: "",
    place: [`iteration ${step} of ${whole[now.way].at(-1)?.step ?? 0}`, ...set].join(" · "), controls: {}, waiting: {}, snapshots: null };
  send({ whole: true, from: 0, to: list.length, ...drawn(list), branches: parts[now.way], ahead: drawn(whole[now.way]).points,
    marks: ways[now.way].marks.filter((mark) => mark.step <= step), samples: newestSamples(list), state });
  scrub.max = last(now.way); scrub.value = now.at; out.textContent = `${step} / ${whole[now.way].at(-1)?.step ?? 0}`;
  scrub.setAttribute("aria-valuetext", `iteration ${step}`);
  toggle.textContent = now.playing ? "Pause" : "Play";
  back.disabled = !now.at; forth.disabled = now.at === last(now.way);
  if (select) select.value = now.way;
}

function go(at, playing = false) {
  now.at = Math.min(Math.max(at, 0), last(now.way));
  now.playing = playing && now.at < last(now.way);
  show();
  remember(`step=${whole[now.way][now.at - 1]?.step ?? 0}` + (ways.length > 1 ? `&way=${now.way}` : ""));
}
let beat = 0;
function play(on) {
  clearInterval(beat);
  if (on) beat = setInterval(() => { if (now.playing) go(now.at + 1, true); if (!now.playing) clearInterval(beat); }, 1000 * now.seconds);
  go(on && now.at === last(now.way) ? 0 : now.at, on);
}
function read() {
  const wanted = new URLSearchParams(inUrl()), way = Number(wanted.get("way") ?? ways.length - 1), step = wanted.get("step");
  if (Number.isInteger(way) && way >= 0 && way < ways.length) now.way = way;
  const to = step === null ? last(now.way) : whole[now.way].filter((row) => row.step <= Number(step)).length;
  clearInterval(beat);
  now.at = Math.min(to, last(now.way)); now.playing = false;
  show();
}

const bar = document.getElementById("bar");
function put(tag, parent, attributes, text = "") {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  parent.append(node);
  return node;
}
const button = (text, act, label = text) => {
  const made = put("button", bar, { type: "button", ...(label === text ? {} : { "aria-label": label }) }, text);
  made.addEventListener("click", act);
  return made;
};
const toggle = button("Play", () => play(!now.playing));
const back = button("◀", () => go(now.at - 1), "one iteration back"), forth = button("▶", () => go(now.at + 1), "one iteration on");
const label = put("label", bar, { class: "scrub" });
put("span", label, {}, "iteration");
const scrub = put("input", label, { type: "range", min: 0, step: 1, "aria-label": "iteration" }), out = put("output", label, {});
scrub.addEventListener("input", () => go(Number(scrub.value)));
const speed = put("select", put("label", bar, {}, "speed "), {});
for (const [text, seconds] of [["slow", 0.6], ["normal", 0.25], ["fast", 0.08]]) put("option", speed, { value: seconds }, text);
speed.value = now.seconds;
speed.addEventListener("change", () => { now.seconds = Number(speed.value); if (now.playing) play(true); });
let select = null;
if (ways.length > 1) { // the run's rewinds: the branches that it abandoned, and the one that was kept
  select = put("select", put("label", bar, {}, "branch "), {});
  ways.forEach(({ name }, way) => put("option", select, { value: way }, name));
  select.addEventListener("change", () => { now.way = Number(select.value); go(Math.min(now.at, last(now.way))); });
}
document.addEventListener("keydown", (event) => {
  if (event.key === " " && event.target === document.body) { event.preventDefault(); play(!now.playing); }
});

const send = connect(page.config, () => {});
read();
window.addEventListener("hashchange", () => { if (inUrl() !== known) read(); });
