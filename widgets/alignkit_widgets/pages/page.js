// What every page does: its theme, its state in the URL, and a place in a frame of a documentation page.

const page = JSON.parse(document.getElementById("data").textContent), dark = matchMedia("(prefers-color-scheme: dark)");
const framed = window.parent !== window;
document.documentElement.classList.toggle("framed", framed);

function theme(name) {
  document.documentElement.dataset.theme = name;
  document.body.dataset.jpThemeLight = String(name === "light"); // the widgets' own rule for dark colours
}
theme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));

const inUrl = () => {
  try { return decodeURIComponent(location.hash.slice(1)); } catch { return ""; }
};
const tell = (message) => { if (framed) window.parent.postMessage({ alignkit: message }, "*"); };
let timer = 0, known = null;

function remember(state) { // in the URL; the page around a frame is told, so that its URL has it too
  if (state === known) return;
  known = state;
  clearTimeout(timer); // browsers refuse more than some hundred changes in half a minute
  timer = setTimeout(() => { history.replaceState(null, "", `#${state}`); tell({ state }); }, 150);
}

// A model as an anywidget has it. answer(message) is called with what the view sends; show(message) sends to the view.
function connect(config, answer) {
  let show = () => {};
  const model = { get: () => config, send: answer, on: (_, receive) => { show = receive; } };
  const { initialize, render } = widget();
  initialize({ model });
  render({ model, el: document.getElementById("view") });
  return (message) => show(message);
}

const link = document.getElementById("link");
link.addEventListener("click", async () => {
  const base = framed && page.around ? page.around : location.href.split("#")[0];
  const address = `${base}#${known ?? inUrl()}`;
  try { await navigator.clipboard.writeText(address); link.textContent = "copied"; } catch { link.textContent = "the link is in the address bar"; }
  setTimeout(() => { link.textContent = "copy link"; }, 1500);
});
if (framed) {
  window.addEventListener("message", ({ source, data }) => {
    if (source !== window.parent || typeof data?.alignkit !== "object" || !data.alignkit) return;
    if (["light", "dark"].includes(data.alignkit.theme)) theme(data.alignkit.theme);
    if (typeof data.alignkit.around === "string") page.around = data.alignkit.around; // the address to copy
  });
  new ResizeObserver(() => tell({ height: document.documentElement.offsetHeight })).observe(document.body);
  tell({ ready: true });
}
