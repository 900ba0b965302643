// Behaviours as cards that open to their vectors.
import { $, button, clamped, el, percent, plural, soft } from "./dom.js";
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
  return `${n} of ${n_samples}` + (low === undefined ? "" : ` (${percent(low)}–${percent(high)})`);
}

// A control of all that is merged, "unsteered" or "random"; of several the count alone.
function controlOf(card, name) {
  const parts = merged(card).map((each) => each[name]).filter(Boolean);
  if (parts.length < 2) return parts[0];
  return { n: parts.reduce((sum, { n }) => sum + n, 0), n_samples: parts[0].n_samples };
}

// In how many samples the behaviour shows: under its most frequent vector, random ones, and none.
function ratesOf(card) {
  const rates = merged(card).flatMap((each) => each.rates);
  const [random, unsteered] = [controlOf(card, "random"), controlOf(card, "unsteered")];
  // Of several, one that shows it greedily, too.
  const isOwn = ({ key }) => merged(card).some((each) => each.rows.includes(key));
  const [best] = rates.sort((one, other) => other.rate - one.rate || isOwn(other) - isOwn(one));
  const told = [];
  if (best) told.push("vector ", vectorLink(best.key), `, ${counted(best)}; `);
  if (random) told.push(`random vectors, ${counted(random)}; `);
  const isKnown = unsteered?.n > 0 && !card.baseline;
  if (unsteered && !isKnown) told.push(`unsteered, ${counted(unsteered)}; `);
  if (told.length) told.push(told.pop().slice(0, -2));
  const known = `Samples of the unsteered model show it, too: ${unsteered && counted(unsteered)}.`;
  const what = best ? "Samples" : "Completions";
  return [
    isKnown ? el("p", { class: "rate known", text: known }) : null,
    told.length
      ? el("p", { class: "rate soft" }, `${what} that show it (95% interval): `, ...told)
      : null,
  ];
}

function memberRow(member, card) {
  const key = rowKey(member);
  const row = rowOf.get(key);
  const sample = Number(member.slice(key.length + 1));
  const text = textAt(row, normal, sample);
  const rate = card.rates.find((each) => each.key === key);
  const shown = !sample && isBaseline(row, normal) ? soft("= baseline") : clamped(text ?? "–");
  const told = rate ? el("span", { class: "soft rate", text: counted(rate) }) : null;
  return el("li", {}, el("span", { class: "member" }, vectorLink(key), told), shown);
}

function insideOf(card) {
  const members = merged(card).flatMap((each) =>
    membersOf(each).map((member) => memberRow(member, each)),
  );
  const others = data.behaviours.filter(
    (each) => each !== card && homeOf(each.key) === each.key && each.prompt === card.prompt,
  );
  const names = others.map(({ key }) =>
    el("option", { value: key, text: `${cardName(key)} (${key})` }),
  );
  const choice = el("select", {}, el("option", { value: "", text: "…" }), ...names);
  // By a button: arrow keys walk through the choices.
  const merge = () => choice.value && mergeInto(card.key, choice.value);
  const tools = el("div", { class: "next" }, el("label", {}, "Merge into ", choice));
  tools.append(button("Merge", merge, { class: "chip merge" }));
  if (noteOf("cards", card.key).merged.length) {
    const apart = () => setNote("cards", card.key, { merged: [], lost: [] });
    tools.append(button("Take apart", apart, { class: "chip" }));
  }
  const only = () => goTo("all-vectors", { b: new Set([card.key]) });
  // The table has the greedy completions.
  if (merged(card).some((each) => each.rows.length))
    tools.append(button("Only these in the table", only, { class: "chip" }));
  const list = el("ul", { class: "members" }, ...members);
  const notes = noteFields("cards", card.key, "this behaviour");
  return el("div", { class: "inside" }, list, notes, tools);
}

function summaryWords(card) {
  const keys = keysOf(card);
  const minus = keys.filter((key) => rowOf.get(key).sign < 0).length;
  const plus = keys.length - minus;
  const parts = [plus && plural(plus, "vector"), minus && plural(minus, "negative")];
  const words = parts.filter(Boolean).join(", ");
  return merged(card).some((each) => each.rows.length) ? words : `${words}, in samples only`;
}

// Something behind these words, made when it is first opened.
function folded(words, make) {
  const part = el("details", {}, el("summary", { text: words }));
  const build = () => {
    if (part.children.length === 1) part.append(make());
  };
  part.addEventListener("toggle", () => part.open && build());
  return [part, build];
}

function cardPart(card) {
  const name = cardName(card.key);
  const [inside, build] = folded(summaryWords(card), () => insideOf(card));
  inside.addEventListener("toggle", () => {
    if (inside.open !== state.open.has(card.key) && !printing) change(toggled("open", card.key));
  });
  const text = data.texts[card.example];
  const title = el("h3", {}, el("span", { class: "name", text: name }));
  const part = el(
    "article",
    { class: "card", id: card.key },
    el("div", { class: "head" }, title, starButton("cards", card.key, `behaviour ${name}`)),
    tagList(card.tags),
    manyPrompts ? el("p", { class: "soft", text: data.prompts[card.prompt] }) : null,
    text === undefined ? null : el("div", { class: "example" }, clamped(text, 150)),
    ...ratesOf(card),
    el("p", { class: "remark", text: noteOf("cards", card.key).note }),
    inside,
  );
  return { part, inside, build };
}

let printing = false;
let goTo;
let filtered = [];

function build() {
  made.clear();
  const [main, aside] = [[], []];
  for (const card of data.behaviours.filter((card) => homeOf(card.key) === card.key)) {
    made.set(card.key, cardPart(card));
    (card.baseline ? aside : main).push(made.get(card.key).part);
  }
  $("#cards").replaceChildren(...main);
  $("#cards-aside").replaceChildren(...aside, ...filtered);
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
    const rows = () => keys.map((key) => memberRow(key, { rates: [] }));
    const list = () => el("ul", { class: "members" }, ...rows());
    const [inside, fillIn] = folded(plural(keys.length, "completion"), list);
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
