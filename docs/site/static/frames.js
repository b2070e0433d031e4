// Live pages in frames: their state is in this page's URL, their theme is this page's, and their height is their own.

const frames = () => [...document.querySelectorAll("iframe.live")];
const theme = () => document.documentElement.dataset.theme === "dark" ? "dark" : "light";
const here = () => location.href.split("#")[0];

window.addEventListener("message", ({ source, data }) => {
  const frame = frames().find((each) => each.contentWindow === source), said = data?.alignkit;
  if (!frame || !said) return;
  if (said.ready) source.postMessage({ alignkit: { theme: theme(), around: here() } }, "*");
  if (typeof said.state === "string") history.replaceState(null, "", `#${said.state}`);
  if (said.height > 0) frame.style.height = `${Math.ceil(said.height)}px`;
});
document.addEventListener("DOMContentLoaded", () => {
  for (const frame of frames()) {
    const state = location.hash.includes("=") ? location.hash : frame.dataset.state ? `#${frame.dataset.state}` : "";
    frame.src = frame.dataset.page + state; // the state that a link asks for
  }
  for (const wide of document.querySelectorAll("div.math, .bd-article table, .bd-article pre")) wide.tabIndex = 0; // scrolled by keyboard too
  new MutationObserver(() => { for (const frame of frames()) frame.contentWindow?.postMessage({ alignkit: { theme: theme() } }, "*"); })
    .observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
});
