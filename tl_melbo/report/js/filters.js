// Chips, search and range above the table; the slider that moves every text.
import { $, $$, button, el } from "./dom.js";
import { data, isNear } from "./data.js";
import { change, follow, state, toggled } from "./state.js";
import { cardName, homeOf, onNotes } from "./notes.js";
import { scaleOf, scaleSlider } from "./details.js";

function chip(label, pressed, act, count) {
  const made = button(label, act, { class: "chip", "aria-pressed": "false" });
  if (count !== undefined) made.append(el("span", { class: "soft", text: ` ${count}` }));
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
  return el(
    "div",
    { class: "chips", role: "group", "aria-label": label },
    el("span", { class: "soft", text: label }),
    ...chips,
  );
}

const counted = (test) => data.rows.filter(test).length;

function hideChips() {
  const kinds = [
    ["near baseline", "near", (row) => isNear(row, scaleOf(row))],
    ["filtered out", "filtered", (row) => row.filtered],
    ["v", "plus", (row) => row.sign > 0],
    ["−v", "minus", (row) => row.sign < 0],
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

function promptChips() {
  return data.prompts.length < 2
    ? []
    : data.prompts.map((prompt, place) =>
        chip(
          prompt.length > 40 ? `${prompt.slice(0, 39)}…` : prompt,
          () => state.prompt === String(place),
          () => change({ prompt: state.prompt === String(place) ? "" : String(place) }),
        ),
      );
}

function range() {
  const field = (name, label) => {
    const made = el("input", {
      type: "number",
      min: 0,
      step: "any",
      inputmode: "decimal",
      "aria-label": label,
      on: { input: () => change({ [name]: made.value }, true) },
    });
    made.follow = () => {
      if (made.value !== state[name]) made.value = state[name];
    };
    return made;
  };
  const [low, high] = [field("low", "KL at least"), field("high", "KL at most")];
  return { part: el("span", { class: "range" }, "KL ", low, " to ", high), fields: [low, high] };
}

function build() {
  const groups = [
    ["Hide", hideChips()],
    ["Prompt", promptChips()],
    ["Behaviour", data.behaviours.length > 1 ? behaviourChips() : []],
    ["Tag", tagChips()],
  ].filter(([, chips]) => chips.length);
  $("#chips").replaceChildren(...groups.map((pair) => group(...pair)));
}

function press() {
  for (const each of $$("#filters .chip"))
    if (each.pressed) each.setAttribute("aria-pressed", String(each.pressed()));
}

function anyChosen() {
  const { hide, b, tag, q, low, high, star, prompt } = state;
  return hide.size || b.size || tag.size || q || low !== "" || high !== "" || star || prompt !== "";
}

export function beginFilters() {
  const search = el("input", {
    type: "search",
    id: "search",
    placeholder: "any word",
    on: { input: () => change({ q: search.value }, true) },
  });
  const star = chip(
    "★ starred",
    () => state.star,
    () => change({ star: !state.star }),
  );
  const { part, fields } = range();
  const clear = button(
    "Clear",
    () =>
      change({
        hide: new Set(),
        b: new Set(),
        tag: new Set(),
        q: "",
        low: "",
        high: "",
        star: false,
        prompt: "",
      }),
    { class: "chip clear" },
  );
  const tools = el(
    "div",
    { class: "tools" },
    el("label", {}, "Search ", search),
    part,
    star,
    clear,
    el("span", { id: "count", class: "info", role: "status" }),
  );
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
    if (search.value !== state.q) search.value = state.q;
    for (const field of fields) field.follow();
    clear.hidden = !anyChosen();
  });
}

export function beginScale() {
  if (data.scales.length < 2) return;
  const { part, show } = scaleSlider("Scale ", "Scale of all vectors", state.scale, (scale) =>
    change({ scale }, true),
  );
  const hint = "Texts alone change. Behaviours, tags, numbers and filters are those at scale 1.";
  $("#scale").append(part, el("small", { text: hint }));
  $("#scale").hidden = false;
  follow(() => show(state.scale));
}
