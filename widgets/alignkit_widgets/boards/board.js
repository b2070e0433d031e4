// The panel of PreferenceAnnotator and CheckpointComparer: plain ESM for anywidget, no build step, nothing from elsewhere.
// Rule: text reaches the page through textContent only. Model text is never parsed as HTML.

function make(parent, tag, attributes = {}, text) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text != null) node.textContent = text;
  parent.append(node);
  return node;
}

const say = (node, text) => { if (node.textContent !== text) node.textContent = text; }; // a status is read out only when it changes

function save(picture, title) { // a PNG in base64, as a download
  const name = title.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
  Object.assign(document.createElement("a"), { href: `data:image/png;base64,${picture}`, download: `${name}.png` }).click();
}

class View {
  constructor(model, el, store) {
    Object.assign(this, { model, store, buttons: {}, cards: [] });
    const root = this.root = make(el, "section", { class: "akb", tabindex: 0, "aria-label": model.get("config").title, "data-lm-suppress-shortcuts": "true" });
    const head = make(root, "div", { class: "akb-head" });
    make(head, "span", { class: "akb-title" }, model.get("config").title);
    this.status = make(head, "span", { class: "akb-status", role: "status" });
    const picture = make(head, "button", { type: "button", class: "akb-save", "data-lm-suppress-shortcuts": "true" }, "save picture");
    picture.addEventListener("click", () => model.send({ type: "picture" }));
    this.progress = make(root, "progress", { max: 1, value: 0, "aria-label": "Progress" });
    this.main = make(root, "div");
    const prompt = make(this.main, "div", { class: "akb-prompt" });
    make(prompt, "b", {}, "Prompt");
    this.prompt = make(prompt, "div", { class: "akb-text" });
    this.caption = make(prompt, "span");
    this.grid = make(this.main, "div", { class: "akb-cards" });
    this.end = make(root, "div", { class: "akb-end" }, "That was the last item.");
    this.row = make(root, "div", { class: "akb-buttons" });
    this.note = make(root, "div", { class: "akb-note", role: "alert" });
    this.results = make(root, "div", { class: "akb-results", role: "group", "aria-label": "Results" });
    this.hint = make(root, "div", { class: "akb-hint" });
    root.addEventListener("keydown", (e) => this.key(e));
    for (const name of ["focusin", "focusout"]) root.addEventListener(name, () => setTimeout(() => this.hints()));
    this.beat = setInterval(() => model.send({ type: "alive" }), 5000);
  }
  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return; // a key that is held down chooses once
    const button = this.store.state?.buttons.find((b) => b.keys.includes(event.key.toLowerCase()));
    if (!button) return;
    event.preventDefault();
    event.stopPropagation();
    this.press(button.id);
  }
  press(id) {
    const { state } = this.store;
    if (state && !state.buttons.find((b) => b.id === id)?.off) this.model.send({ type: "press", button: id, item: state.item?.id ?? null });
  }
  draw() {
    const { state } = this.store;
    if (!state) return;
    say(this.status, state.status);
    this.progress.max = state.total;
    this.progress.value = state.done;
    say(this.note, state.note);
    this.main.hidden = !state.item;
    this.end.hidden = Boolean(state.item);
    if (state.item) {
      say(this.prompt, state.item.prompt);
      say(this.caption, state.item.caption);
      this.drawCards(state.item.cards);
    }
    this.drawButtons(state.buttons);
    this.drawResults(state.results);
    this.hints();
  }
  drawCards(cards) {
    if (cards.length !== this.cards.length) {
      this.grid.replaceChildren();
      this.buttons = {}; this.row.replaceChildren();
      this.grid.style.gridTemplateColumns = `repeat(auto-fit, minmax(min(100%, ${cards.length > 2 ? 240 : 300}px), 1fr))`;
      this.cards = cards.map(() => {
        const card = make(this.grid, "article", { class: "akb-card" }), head = make(card, "header");
        const [label, name, tag, mark] = [["b"], ["span", "akb-name"], ["span", "akb-tag"], ["span", "akb-mark"]].map(([t, c]) => make(head, t, c ? { class: c } : {}));
        return { card, label, name, tag, mark, text: make(card, "div", { class: "akb-text" }) };
      });
    }
    cards.forEach((card, i) => {
      const to = this.cards[i];
      for (const part of ["label", "name", "tag"]) say(to[part], card[part]);
      say(to.mark, card.chosen ? "✓ chosen" : "");
      to.card.dataset.chosen = card.chosen;
      to.card.setAttribute("aria-label", [card.label, card.name, card.tag].filter(Boolean).join(", "));
      to.text.replaceChildren();
      for (const [piece, differs] of card.pieces) make(to.text, differs ? "mark" : "span", {}, piece);
      if (!card.pieces.length) make(to.text, "span", { class: "akb-nothing" }, "says nothing");
    });
    this.differing = cards.some((card) => card.pieces.some(([, differs]) => differs));
  }
  drawButtons(buttons) {
    for (const id of Object.keys(this.buttons)) if (!buttons.some((b) => b.id === id)) { this.buttons[id].remove(); delete this.buttons[id]; }
    for (const b of buttons) {
      if (b.card != null && !this.cards[b.card]) continue;
      const button = this.buttons[b.id] ??= this.makeButton(b, b.card != null ? this.cards[b.card].card : this.row);
      button.setAttribute("aria-disabled", b.off); // not `disabled`, which would throw the focus out of the panel
    }
  }
  makeButton(b, parent) {
    const button = make(parent, "button", { type: "button", "data-id": b.id, "data-lm-suppress-shortcuts": "true" });
    make(button, "span", {}, b.label);
    const keys = make(button, "span", { class: "akb-keys", "aria-hidden": "true" });
    for (const key of b.shown) make(keys, "kbd", {}, key);
    if (b.keys.length) button.setAttribute("aria-keyshortcuts", b.keys.join(" "));
    button.addEventListener("click", () => this.press(b.id));
    return button;
  }
  drawResults(rows) {
    this.results.replaceChildren();
    for (const row of rows) {
      make(this.results, "span", {}, row.text);
      if (row.low == null) { make(this.results, "span"); make(this.results, "span"); continue; }
      const percent = (v) => `${(100 * v).toFixed(1)}%`, bar = make(this.results, "i", { "aria-hidden": "true" });
      Object.assign(make(bar, "s").style, { left: percent(row.low), width: percent(row.high - row.low) });
      make(bar, "u").style.left = percent(row.value);
      make(this.results, "span", {}, `95 % interval ${Math.round(100 * row.low)} to ${Math.round(100 * row.high)} %`);
    }
  }
  hints() {
    const on = this.root.contains(document.activeElement);
    say(this.hint, [on ? "The keys work while this panel has the focus." : "Click into the panel, or go there with Tab, to use the keys.",
      this.differing ? "Underlined: words that differ from the other response." : ""].join(" "));
  }
  dispose() { clearInterval(this.beat); this.root.remove(); }
}

export default () => {
  const store = { state: null, views: new Set() };
  return {
    initialize({ model }) {
      model.on("msg:custom", (state) => {
        if (state.picture) return save(state.picture, model.get("config").title);
        store.state = state; for (const view of store.views) view.draw();
      });
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
