// The one table: vectors and their negatives as rows of equal right.
import { $, $$, button, clamped, el, number, soft } from "./dom.js";
import {
  data,
  isBaseline,
  isNear,
  manyPrompts,
  nameOf,
  noteKey,
  rowOf,
  textAt,
  textsAt,
} from "./data.js";
import { change, filters, follow, noFilters, state, toggled } from "./state.js";
import { cardName, homeOf, noteOf, onNotes } from "./notes.js";
import {
  forPrinting,
  inOrder,
  lazily,
  markSorted,
  nextSort,
  rowsShown,
  sortHeads,
} from "./tables.js";
import {
  behaviourWords,
  cardLink,
  showStar,
  sparkline,
  starButton,
  tagList,
  vectorLink,
} from "./marks.js";
import { detailsOf, scaleOf } from "./details.js";

const columns = [
  { name: "pick", label: "Compare", kind: "pick", sorts: false, hidden: true },
  { name: "vector", label: "Vector", kind: "word", hint: "Its number; − is its negative" },
  ...(manyPrompts
    ? [{ name: "prompt", label: "Prompt", kind: "word", hint: "What the model was asked" }]
    : []),
  ...(data.behaviours.length
    ? [{ name: "behaviour", label: "Behaviour", kind: "word", hint: "The group of its completion" }]
    : []),
  ...data.columns,
  ...(data.history.length
    ? [{ name: "search", label: "Search", kind: "spark", sorts: false }]
    : []),
  { name: "completion", label: "Completion", kind: "text", hint: "What the model writes" },
];

let list = null;
let shown = [];
let signature = "";
let body;

function valueOf(row, name) {
  if (name === "vector") return row.number + (row.sign < 0 ? 0.5 : 0);
  if (name === "prompt") return row.prompt;
  if (name === "behaviour") return behaviourWords(row);
  if (name === "completion") return textAt(row, scaleOf(row));
  return Object.hasOwn(row.values, name) ? row.values[name] : null;
}

// Of every row but those of other kinds of aside: whether the reader's choice takes it.
function passes(row) {
  const s = state;
  const kl = row.values.kl;
  if (s.hide.has("near") && isNear(row, scaleOf(row))) return false;
  if (s.hide.has("filtered") && row.filtered) return false;
  if (s.hide.has("plus") && row.sign > 0) return false;
  if (s.hide.has("minus") && row.sign < 0) return false;
  if (s.prompt !== "" && row.prompt !== Number(s.prompt)) return false;
  if (s.star && !noteOf("vectors", noteKey(row)).star) return false;
  if (s.b.size && ![...s.b].some((key) => homeOf(key) === homeOf(row.behaviour))) return false;
  if (s.tag.size && !Object.entries(row.tags).some(([kind, tag]) => s.tag.has(`${kind}:${tag}`)))
    return false;
  if (s.low !== "" && !(kl === "∞" || (typeof kl === "number" && kl >= Number(s.low))))
    return false;
  if (s.high !== "" && !(typeof kl === "number" && kl <= Number(s.high))) return false;
  return !s.q || searched(row).includes(s.q.toLowerCase());
}

function searched(row) {
  const { name, note } = noteOf("vectors", noteKey(row));
  const own = [nameOf(row), behaviourWords(row), name, note, ...Object.values(row.tags)];
  return [...textsAt(row, scaleOf(row)), ...own].join("\n").toLowerCase();
}

// What stands in each cell. A completion comes with its scale.
const contents = {
  pick: (row) => [
    el("input", {
      type: "checkbox",
      "aria-label": `Compare vector ${nameOf(row)}`,
      on: { change: () => change(toggled("sel", row.key)) },
    }),
  ],
  vector: (row) => {
    const what = `vector ${nameOf(row)}`;
    const act = () => change(toggled("open", `v${row.key}`));
    const open = button("▸", act, { class: "open", "aria-label": `Details of ${what}` });
    const given = el("span", { class: "given", text: noteOf("vectors", noteKey(row)).name });
    return [open, vectorLink(row.key), starButton("vectors", noteKey(row), what), given];
  },
  prompt: (row) => [data.prompts[row.prompt]],
  behaviour: (row) => {
    const tags = tagList(row.tags);
    const link = row.behaviour ? cardLink(row.behaviour) : null;
    return [link ?? (row.filtered ? soft(behaviourWords(row)) : null), tags && " ", tags];
  },
  search: (row) => [row.sign > 0 ? sparkline(row.vector) : null],
  completion: () => [],
};

function measured(row, column) {
  const value = row.values[column.name];
  const shown = number(value, column.name === "kl" ? 2 : 3);
  if (row.times === null || value === null || column !== data.columns[1]) return [shown];
  const times = el("span", { class: "soft times", text: ` ${number(row.times, 2)} × random` });
  return [shown, times];
}

function cellOf(row, column) {
  const label = column.hidden || column.name === "vector" ? null : column.label;
  const options = { class: `${column.kind} ${column.name}`, "data-label": label };
  return el("td", options, ...(contents[column.name] ?? measured)(row, column));
}

function makeRow(row) {
  const made = el(
    "tr",
    { id: `v${row.key}`, class: `row ${row.sign < 0 ? "minus" : "plus"}`, "data-key": row.key },
    ...columns.map((column) => cellOf(row, column)),
  );
  made.addEventListener("click", (event) => {
    if (event.target.closest("a, button, input, textarea, label") || !getSelection().isCollapsed)
      return;
    change(toggled("open", `v${row.key}`));
  });
  showState(made, row);
  return [made, made.details].filter(Boolean);
}

function showState(made, row) {
  showText(made, row);
  showOpen(made, row);
  $("td.pick input", made).checked = state.sel.has(row.key);
}

function showText(made, row) {
  const scale = scaleOf(row);
  if (made.dataset.scale === scale) return;
  made.dataset.scale = scale;
  const cell = $("td.completion", made);
  const text = textAt(row, scale);
  if (text === null) cell.replaceChildren(soft("–"));
  else if (isBaseline(row, scale))
    cell.replaceChildren(el("span", { class: "soft same", text: "= baseline" }));
  else cell.replaceChildren(clamped(text));
  made.details?.firstChild.firstChild.refresh();
  made.details?.firstChild.firstChild.follow?.();
}

function showOpen(made, row) {
  const open = state.open.has(`v${row.key}`);
  made.classList.toggle("opened", open);
  const opener = $("button.open", made);
  opener.setAttribute("aria-expanded", String(open));
  opener.textContent = open ? "▾" : "▸";
  if (open && !made.details) {
    const cell = el("td", { colspan: columns.length }, detailsOf(row));
    made.details = el("tr", { class: "details" }, cell);
    if (made.isConnected) made.after(made.details);
  }
  if (made.details) made.details.hidden = !open;
}

const chosen = () => inOrder(data.rows.filter(passes), state.sort, valueOf);

function refill() {
  shown = chosen();
  list?.stop();
  list = lazily(body, shown, makeRow);
  $("#count").textContent = rowsShown(shown, data.rows);
  $("#none").hidden = shown.length > 0;
  markSorted($("#vectors thead"), state.sort);
}

// What decides which rows there are, and their order.
function wanted() {
  const byText = state.q || state.hide.size || state.sort.endsWith("completion");
  const chosen = [...filters(), state.sort, byText ? [state.scale, ...state.own] : 0];
  return JSON.stringify(chosen, (_, value) => (value instanceof Set ? [...value] : value));
}

function show() {
  const now = wanted();
  if (now !== signature) {
    signature = now;
    refill();
    return;
  }
  for (const made of $$("tr.row", body)) {
    showState(made, rowOf.get(made.dataset.key));
  }
}

// The row of a link, brought in and in sight; filters that hide it give way.
export function goToRow(key) {
  const row = rowOf.get(key);
  if (!row) return null;
  if (!shown.includes(row)) {
    change(noFilters(), true);
  }
  list.upTo(shown.indexOf(row) + 1);
  return document.getElementById(`v${key}`);
}

export function beginVectors() {
  const table = $("#vectors");
  const heads = sortHeads(columns, (name) => change({ sort: nextSort(state.sort, name) }));
  body = el("tbody");
  table.append(el("thead", {}, el("tr", {}, ...heads)), body);
  follow(show);
  onNotes(() => {
    // Stars, names and merged behaviours may decide which rows there are.
    const now = chosen();
    if (now.length !== shown.length || now.some((row, place) => row !== shown[place])) refill();
    for (const made of $$("tr.row", body)) {
      const row = rowOf.get(made.dataset.key);
      $(".given", made).textContent = noteOf("vectors", noteKey(row)).name;
      showStar($(".star", made), "vectors", noteKey(row));
      const link = $("a.behaviour", made);
      if (link && row.behaviour) {
        link.textContent = cardName(homeOf(row.behaviour));
        link.href = `#${homeOf(row.behaviour)}`;
      }
    }
  });
  forPrinting(() => list.all());
}
