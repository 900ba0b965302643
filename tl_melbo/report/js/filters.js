// Chips, search and range above the table; the slider that moves every text.
import { $, $$, button, el, soft } from "./dom.js";
import { data, isNear, manyPrompts } from "./data.js";
import { change, filters, follow, noFilters, state, toggled } from "./state.js";
import { cardName, homeOf, onNotes } from "./notes.js";
import { scaleOf, scaleSlider } from "./details.js";

function chip(label, pressed, act, count) {
  const made = button(label, act, { class: "chip", "aria-pressed": "false" });
  if (count !== undefined) made.append(soft(` ${count}`));
  made.pressed = pressed;
  return made;
}

function setChip(label, name, key, count) {
  return chip(
    label,
    () => state[name].has(key),
    () => change(toggled(name, key)),
    count,
  );
}

function group(label, chips) {
  return el("div", { class: "chips", role: "group", "aria-label": label }, soft(label), ...chips);
}

const counted = (test) => data.rows.filter(test).length;

function hideChips() {
  const kinds = [
    ["near baseline", "near", (row) => isNear(row, scaleOf(row))],
    ["filtered out", "filtered", (row) => row.filtered],
    ["vectors", "plus", (row) => row.sign > 0],
    ["negatives", "minus", (row) => row.sign < 0],
  ];
  const some = kinds
    .map(([label, key, test]) => [label, key, counted(test)])
    .filter(([, key, count]) => state.hide.has(key) || (count && count < data.rows.length));
  return some.map(([label, key, count]) => setChip(label, "hide", key, count));
}

// An address may name a behaviour that was merged into this one.
function behaviourChip(key, count) {
  const chosen = () => [...state.b].filter((each) => homeOf(each) === key);
  const act = () => {
    const gone = chosen();
    const others = [...state.b].filter((each) => !gone.includes(each));
    change({ b: new Set(gone.length ? others : [...others, key]) });
  };
  return chip(cardName(key), () => chosen().length > 0, act, count);
}

function behaviourChips() {
  const cards = data.behaviours.filter((card) => homeOf(card.key) === card.key);
  return cards
    .map((card) => [card, counted((row) => row.behaviour && homeOf(row.behaviour) === card.key)])
    .filter(([, count]) => count)
    .map(([card, count]) => behaviourChip(card.key, count));
}

function tagChips() {
  const tags = new Map();
  for (const row of data.rows)
    for (const [kind, tag] of Object.entries(row.tags))
      tags.set(`${kind}:${tag}`, [tag, 1 + (tags.get(`${kind}:${tag}`)?.[1] ?? 0)]);
  return [...tags].map(([key, [tag, count]]) => setChip(tag, "tag", key, count));
}

function promptChip(prompt, place) {
  const label = prompt.length > 40 ? `${prompt.slice(0, 39)}…` : prompt;
  const chosen = () => state.prompt === String(place);
  return chip(label, chosen, () => change({ prompt: chosen() ? "" : String(place) }));
}

// What the reader types, or an address tells.
function field(name, options) {
  const act = () => change({ [name]: made.value }, true);
  const made = el("input", { ...options, on: { input: act } });
  follow(() => {
    if (made.value !== state[name]) made.value = state[name];
  });
  return made;
}

function range() {
  const options = { type: "number", min: 0, step: "any", inputmode: "decimal" };
  const low = field("low", { ...options, "aria-label": "KL at least" });
  const high = field("high", { ...options, "aria-label": "KL at most" });
  return el("span", { class: "range" }, "KL ", low, " to ", high);
}

function build() {
  const groups = [
    ["Hide", hideChips()],
    ["Prompt", manyPrompts ? data.prompts.map(promptChip) : []],
    ["Behaviour", data.behaviours.length > 1 ? behaviourChips() : []],
    ["Tag", tagChips()],
  ].filter(([, chips]) => chips.length);
  $("#chips").replaceChildren(...groups.map((pair) => group(...pair)));
}

function press() {
  for (const each of $$("#filters .chip"))
    if (each.pressed) each.setAttribute("aria-pressed", String(each.pressed()));
}

export function beginFilters() {
  const search = field("q", { type: "search", id: "search", placeholder: "any word" });
  const isStarred = () => state.star;
  const star = chip("★ starred", isStarred, () => change({ star: !state.star }));
  const clear = button("Clear", () => change(noFilters()), { class: "chip clear" });
  const label = el("label", {}, "Search ", search);
  const count = el("span", { id: "count", class: "info", role: "status" });
  const tools = el("div", { class: "tools" }, label, range(), star, clear, count);
  $("#filters").append(tools, el("div", { id: "chips" }));
  build();
  onNotes(() => {
    build();
    press();
  });
  let before = "";
  follow(() => {
    // How many are near the baseline hangs on the scale.
    const now = JSON.stringify([state.scale, ...state.own]);
    if (now !== before) build();
    before = now;
    press();
    clear.hidden = !filters().some((each) => each.size ?? each);
  });
}

export function beginScale() {
  if (data.scales.length < 2) return;
  const { part, show } = scaleSlider("Scale ", "Scale of all vectors", state.scale, (scale) =>
    change({ scale }, true),
  );
  const hint = "Only completions change. Behaviours, tags, numbers and filters are those at scale 1.";
  $("#scale").append(part, el("small", { text: hint }));
  $("#scale").hidden = false;
  follow(() => show(state.scale));
}
