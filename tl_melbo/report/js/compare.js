// Two vectors side by side, word by word.
import { $, button, copyButton, el, number, prose, sampledPart, soft } from "./dom.js";
import {
  cosine,
  data,
  effectCosine,
  nameOf,
  python,
  rowOf,
  textAt,
  textsAt,
  unsteeredText,
} from "./data.js";
import { marked } from "./diff.js";
import { behaviourWords, vectorLink } from "./marks.js";
import { change, follow, state } from "./state.js";
import { tokensOf } from "./details.js";

const MODES = [
  ["none", "None"],
  ["other", "With each other"],
  ["unsteered", "With unsteered"],
];
let mode = "other";

const chosen = () => [...state.sel].map((key) => rowOf.get(key)).filter(Boolean);

function shown(row, other, scale) {
  const text = textAt(row, scale);
  if (text === null) return el("p", { class: "soft", text: "–" });
  const beside = mode === "other" ? textAt(other, scale) : unsteeredText(row);
  return mode === "none" || beside === null ? prose(text) : marked(text, beside);
}

function headOf(row) {
  const kl = `KL ${number(row.values.kl, 2)}`;
  return el(
    "div",
    {},
    el("h3", {}, "Vector ", vectorLink(row.key)),
    el("p", { class: "soft", text: [behaviourWords(row), kl].filter(Boolean).join(" · ") }),
    ...tokensOf(row),
  );
}

function sideOf(row, other, scale) {
  const text = el("blockquote", {}, shown(row, other, scale));
  const name = el("p", { class: "soft whose", text: `Vector ${nameOf(row)}` });
  return el("div", { class: "side" }, name, text, sampledPart(textsAt(row, scale).slice(1)));
}

function body(a, b) {
  const parts = [headOf(a), headOf(b)];
  for (const scale of data.scales.filter((each) => a.texts[each] || b.texts[each])) {
    if (data.scales.length > 1) parts.push(el("h4", { class: "across", text: `Scale ${scale}` }));
    parts.push(sideOf(a, b, scale), sideOf(b, a, scale));
  }
  return el("div", { class: "sides" }, ...parts);
}

function facts(a, b) {
  const effect = effectCosine(a, b);
  const told = [`Cosine of the vectors ${cosine(a, b).toFixed(2)}`];
  if (effect !== null) told.push(`of their effects ${effect.toFixed(2)}`);
  return el("p", { class: "cosines", text: `${told.join(", ")}.` });
}

function modes(choose) {
  const made = MODES.map(([key, label]) => {
    const pressed = String(mode === key);
    return button(label, () => choose(key), {
      class: "chip",
      "data-mode": key,
      "aria-pressed": pressed,
    });
  });
  const options = { class: "chips", role: "group", "aria-label": "Mark differences" };
  return el("div", options, soft("Mark differences"), ...made);
}

function fillDialog(dialog, a, b) {
  const choose = (key) => {
    mode = key;
    fillDialog(dialog, a, b);
    $(`[data-mode="${key}"]`, dialog).focus();
  };
  const title = el("h2", { text: `Vectors ${nameOf(a)} and ${nameOf(b)}`, id: "compared" });
  const close = button("Close", () => dialog.close(), { class: "close" });
  const parts = [el("div", { class: "head" }, title, close), facts(a, b), modes(choose)];
  const unsteered = unsteeredText(a);
  if (unsteered !== null) {
    const text = el("blockquote", {}, prose(unsteered));
    parts.push(el("details", {}, el("summary", { text: "Unsteered" }), text));
  }
  dialog.replaceChildren(...parts, body(a, b));
}

function bar() {
  const rows = chosen();
  const holder = $("#selection");
  holder.hidden = !rows.length;
  // What is focused stays: only the words are new.
  const compare = $(".compare", holder);
  compare.disabled = rows.length !== 2;
  compare.textContent =
    rows.length === 2 ? `Compare ${nameOf(rows[0])} and ${nameOf(rows[1])}` : "Tick two to compare";
  $(".python", holder).replaceChildren(...(rows.length ? [copyButton(python(rows))] : []));
}

function show() {
  bar();
  const dialog = $("#compare");
  const rows = chosen();
  const wanted = state.cmp && rows.length === 2;
  if (wanted) {
    fillDialog(dialog, ...rows);
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  } else if (dialog.open) dialog.close();
}

export function compare(a, b) {
  change({ sel: new Set([a, b]), cmp: true });
}

export function beginCompare() {
  const holder = $("#selection");
  holder.append(
    button("", () => change({ cmp: true }), { class: "compare" }),
    el("span", { class: "python" }),
    button("Clear", () => change({ sel: new Set(), cmp: false }), { class: "none" }),
  );
  const dialog = $("#compare");
  // Escape closes it by itself.
  dialog.addEventListener("close", () => {
    if (state.cmp) change({ cmp: false });
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  follow(show);
}
