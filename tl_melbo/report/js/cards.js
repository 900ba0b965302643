// Behaviours as cards that open to their vectors.
import { $, button, clamped, el, percent, plural } from "./dom.js";
import { cardOf, data, isBaseline, manyPrompts, membersOf, normal, rowOf, textAt } from "./data.js";
import { change, follow, state, toggled } from "./state.js";
import { cardName, homeOf, mergeInto, noteOf, onNotes, setNote } from "./notes.js";
import { forPrinting } from "./tables.js";
import { noteFields, starButton, tagList, vectorLink } from "./marks.js";

const made = new Map();

function merged(card) {
  return [card, ...noteOf("cards", card.key).merged.map((key) => cardOf.get(key))];
}

const rowKey = (member) => member.replace(/s\d+$/, "");
const keysOf = (card) => [...new Set(merged(card).flatMap(membersOf).map(rowKey))];

function counted({ n, n_samples, low, high }) {
  return `${n} of ${n_samples} (${percent(low)}–${percent(high)})`;
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);

function ratesOf(card) {
  const rates = merged(card).flatMap((each) => each.rates);
  const control = card.random ? `random vectors in ${counted(card.random)}` : "";
  if (!rates.length) return control ? el("p", { class: "rate soft" }, capital(control)) : null;
  const best = rates.reduce((one, other) => (other.rate > one.rate ? other : one));
  const parts = ["Sampled: ", vectorLink(best.key), ` in ${counted(best)}`];
  if (card.unsteered) parts.push(`; unsteered in ${counted(card.unsteered)}`);
  if (control) parts.push(`; ${control}`);
  return el("p", { class: "rate soft" }, ...parts);
}

function memberRow(member, card) {
  const key = rowKey(member);
  const row = rowOf.get(key);
  const sample = Number(member.slice(key.length + 1));
  const text = textAt(row, normal, sample);
  const rate = card.rates.find((each) => each.key === key);
  const shown = !sample && isBaseline(row, normal)
    ? el("span", { class: "soft", text: "= baseline" })
    : clamped(text ?? "–");
  const told = rate ? el("span", { class: "soft rate", text: counted(rate) }) : null;
  return el("li", {}, el("span", { class: "member" }, vectorLink(key), told), shown);
}

function insideOf(card) {
  const members = el(
    "ul",
    { class: "members" },
    ...merged(card).flatMap((each) => membersOf(each).map((member) => memberRow(member, each))),
  );
  const others = data.behaviours.filter(
    (each) => each !== card && homeOf(each.key) === each.key && each.prompt === card.prompt,
  );
  const choice = el(
    "select",
    {},
    el("option", { value: "", text: "…" }),
    ...others.map((each) =>
      el("option", { value: each.key, text: `${cardName(each.key)} (${each.key})` }),
    ),
  );
  choice.addEventListener("change", () => choice.value && mergeInto(card.key, choice.value));
  const tools = el("div", { class: "next" }, el("label", {}, "Merge into ", choice));
  if (noteOf("cards", card.key).merged.length) {
    const apart = () => setNote("cards", card.key, { merged: [], lost: [] });
    tools.append(button("Take apart", apart, { class: "chip" }));
  }
  // The table has the greedy completions.
  if (merged(card).some((each) => each.rows.length))
    tools.append(
      button(
        "Only these in the table",
        () => goTo("all-vectors", { b: new Set([card.key]) }),
        { class: "chip" },
      ),
    );
  return el(
    "div",
    { class: "inside" },
    members,
    noteFields("cards", card.key, "this behaviour"),
    tools,
  );
}

function summaryWords(card) {
  const keys = keysOf(card);
  const minus = keys.filter((key) => rowOf.get(key).sign < 0).length;
  const parts = [
    [keys.length - minus, "vector"],
    [minus, "negative"],
  ].filter(([count]) => count);
  const words = parts.map(([count, word]) => plural(count, word)).join(", ");
  return merged(card).some((each) => each.rows.length) ? words : `${words}, in samples only`;
}

function cardPart(card) {
  const title = el("h3", {}, el("span", { class: "name", text: cardName(card.key) }));
  const inside = el("details", {}, el("summary", { text: summaryWords(card) }));
  inside.addEventListener("toggle", () => {
    if (inside.open) build();
    if (inside.open !== state.open.has(card.key) && !printing) change(toggled("open", card.key));
  });
  const build = () => {
    if (!$(".inside", inside)) inside.append(insideOf(card));
  };
  const example =
    card.example === null
      ? null
      : el("div", { class: "example" }, clamped(data.texts[card.example], 150));
  const head = el(
    "div",
    { class: "head" },
    title,
    starButton("cards", card.key, `behaviour ${cardName(card.key)}`),
  );
  const prompt = manyPrompts ? el("p", { class: "soft", text: data.prompts[card.prompt] }) : null;
  const note = el("p", { class: "remark", text: noteOf("cards", card.key).note });
  const part = el(
    "article",
    { class: "card", id: card.key },
    head,
    tagList(card.tags),
    prompt,
    example,
    ratesOf(card),
    note,
    inside,
  );
  return { part, inside, build };
}

let printing = false;
let goTo;
let filtered = [];

function isAside(card) {
  return card.baseline;
}

function build() {
  made.clear();
  const [main, aside] = [$("#cards"), $("#cards-aside")];
  const some = data.behaviours.filter((card) => homeOf(card.key) === card.key);
  for (const card of some) made.set(card.key, cardPart(card));
  main.replaceChildren(
    ...some.filter((card) => !isAside(card)).map((card) => made.get(card.key).part),
  );
  aside.replaceChildren(
    ...some.filter(isAside).map((card) => made.get(card.key).part),
    ...filtered,
  );
  const count = data.rows.filter(
    (row) => row.filtered || cardOf.get(homeOf(row.behaviour))?.baseline,
  ).length;
  $("#aside").hidden = !count;
  $("#aside > summary").textContent =
    `≈ baseline and filtered out (${plural(count, "completion")})`;
}

// What was filtered out, by reason, for whoever reads what a machine would not.
function filteredPart() {
  const reasons = new Map();
  for (const row of data.rows)
    if (row.filtered) reasons.set(row.filtered, [...(reasons.get(row.filtered) ?? []), row.key]);
  return [...reasons].map(([reason, keys]) => {
    const inside = el("details", {}, el("summary", { text: plural(keys.length, "completion") }));
    const fillIn = () => {
      if (!$("ul", inside))
        inside.append(
          el("ul", { class: "members" }, ...keys.map((key) => memberRow(key, { rates: [] }))),
        );
    };
    inside.addEventListener("toggle", fillIn);
    forPrinting(fillIn);
    return el("article", { class: "card" }, el("h3", { text: `Filtered out: ${reason}` }), inside);
  });
}

function show() {
  for (const [key, { inside, build: fillIn }] of made) {
    const open = state.open.has(key);
    if (open) fillIn();
    if (inside.open !== open) inside.open = open;
  }
}

export function goToCard(key) {
  const home = homeOf(key);
  if (!made.has(home)) return null;
  if (cardOf.get(home).baseline) $("#aside").open = true;
  return document.getElementById(home);
}

// `go` brings a part of the page in sight, with changes to the state.
export function beginCards(go) {
  if (!data.behaviours.length && !data.rows.some((row) => row.filtered)) return;
  goTo = go;
  filtered = filteredPart();
  build();
  follow(show);
  let before = shape();
  onNotes(() => {
    for (const [key, { part }] of made) {
      $(".name", part).textContent = cardName(key);
      $(".remark", part).textContent = noteOf("cards", key).note;
    }
    // Only what merges or parts needs new cards; elsewhere, the one who types keeps the place.
    if (shape() === before) return;
    before = shape();
    build();
    show();
  });
  forPrinting(() => {
    for (const { build: fillIn } of made.values()) fillIn();
  });
}

export function whilePrinting(on) {
  printing = on;
}

const shape = () => JSON.stringify(data.behaviours.map((card) => homeOf(card.key)));
