// Two vectors side by side, word by word.
import { $, button, copyButton, el, fill, number } from "./dom.js";
import {
  cosine,
  data,
  effectCosine,
  nameOf,
  nSamples,
  python,
  rowOf,
  textAt,
  unsteeredText,
} from "./data.js";
import { marked } from "./diff.js";
import { behaviourWords, vectorLink } from "./marks.js";
import { change, follow, state } from "./state.js";
import { samplesOf, tokensOf } from "./details.js";

const MODES = [
  ["none", "No"],
  ["other", "With each other"],
  ["unsteered", "With unsteered"],
];
let mode = "other";

const chosen = () => [...state.sel].map((key) => rowOf.get(key)).filter(Boolean);

function shown(row, other, scale) {
  const text = textAt(row, scale);
  if (text === null) return el("p", { class: "soft", text: "–" });
  const beside = mode === "other" ? textAt(other, scale) : unsteeredText(row);
  return mode === "none" || beside === null
    ? fill(el("div", { class: "words" }), text)
    : marked(text, beside);
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

function scalesOf(a, b) {
  return data.scales.filter((scale) => a.texts[scale] || b.texts[scale]);
}

function body(a, b) {
  const rows = [
    [a, b],
    [b, a],
  ];
  const parts = rows.map(([row]) => headOf(row));
  for (const scale of scalesOf(a, b)) {
    if (data.scales.length > 1) parts.push(el("h4", { class: "across", text: `Scale ${scale}` }));
    for (const [row, other] of rows) {
      const count = nSamples(row, scale);
      parts.push(
        el(
          "div",
          { class: "side" },
          el("blockquote", {}, shown(row, other, scale)),
          count > 1 ? samplesOf(row, scale, count) : null,
        ),
      );
    }
  }
  return el("div", { class: "sides" }, ...parts);
}

function facts(a, b) {
  const effect = effectCosine(a, b);
  const told = [`Cosine of the vectors ${cosine(a, b).toFixed(2)}`];
  if (effect !== null) told.push(`of their effects ${effect.toFixed(2)}`);
  return el("p", { class: "cosines", text: `${told.join(", ")}.` });
}

function modes(again) {
  const made = MODES.map(([key, label]) =>
    button(
      label,
      () => {
        mode = key;
        again();
      },
      { class: "chip", "data-mode": key, "aria-pressed": String(mode === key) },
    ),
  );
  return el(
    "div",
    { class: "chips", role: "group", "aria-label": "Mark differences" },
    el("span", { class: "soft", text: "Mark differences" }),
    ...made,
  );
}

function fillDialog(dialog, a, b) {
  const again = () => {
    const focused = document.activeElement?.dataset?.mode;
    fillDialog(dialog, a, b);
    if (focused) $(`[data-mode="${focused}"]`, dialog)?.focus();
  };
  const close = button("Close", () => dialog.close(), { class: "close" });
  const unsteered = unsteeredText(a);
  const baseline =
    unsteered === null
      ? null
      : el(
          "details",
          {},
          el("summary", { text: "Unsteered" }),
          el("blockquote", {}, fill(el("div", { class: "words" }), unsteered)),
        );
  dialog.replaceChildren(
    el(
      "div",
      { class: "head" },
      el("h2", { text: `${nameOf(a)} and ${nameOf(b)}`, id: "compared" }),
      close,
    ),
    facts(a, b),
    modes(again),
    baseline ?? "",
    body(a, b),
  );
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
