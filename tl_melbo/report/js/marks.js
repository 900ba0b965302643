// Small things that stand beside a vector's or a behaviour's name.
import { button, el } from "./dom.js";
import { cardOf, data, nameOf, noteKey, rowOf } from "./data.js";
import { cardName, homeOf, noteOf, setNote } from "./notes.js";

export function vectorLink(key) {
  const row = rowOf.get(key);
  const given = noteOf("vectors", noteKey(row)).name;
  const what = row.sign < 0 ? `Negative of vector ${row.number}` : `Vector ${row.number}`;
  return el("a", {
    href: `#v${key}`,
    class: "vector",
    text: nameOf(row),
    title: given ? `${what}: ${given}` : what,
  });
}

export function cardLink(key) {
  const home = homeOf(key);
  return el("a", { href: `#${home}`, class: "behaviour", text: cardName(home) });
}

export function tagList(tags) {
  const names = Object.entries(tags).map(([kind, tag]) =>
    el("span", { class: "tag", title: kind, text: tag }),
  );
  return names.length ? el("span", { class: "tags" }, ...names) : null;
}

export function starButton(kind, key, what) {
  const act = () => {
    setNote(kind, key, { star: !noteOf(kind, key).star });
    showStar(made, kind, key);
  };
  const made = button("", act, { class: "star", "aria-label": `Star ${what}` });
  showStar(made, kind, key);
  return made;
}

export function showStar(made, kind, key) {
  const { star } = noteOf(kind, key);
  made.textContent = star ? "★" : "☆";
  made.setAttribute("aria-pressed", String(star));
}

export function noteFields(kind, key, what) {
  const { name, note } = noteOf(kind, key);
  const named = el("input", {
    type: "text",
    maxlength: 200,
    class: "rename",
    on: { change: () => setNote(kind, key, { name: named.value.trim() }) },
  });
  named.value = name;
  const noted = el("textarea", {
    rows: 2,
    maxlength: 10000,
    class: "note",
    on: { change: () => setNote(kind, key, { note: noted.value }) },
  });
  noted.value = note;
  const labels = [el("label", {}, `Name of ${what} `, named), el("label", {}, "Note ", noted)];
  return el("div", { class: "notes" }, ...labels);
}

const SVG = "http://www.w3.org/2000/svg";
const [WIDE, HIGH] = [64, 18];

// The search of a vector: does the line still climb at its end?
export function sparkline(vector) {
  const values = (data.history[vector] ?? []).filter((value) => typeof value === "number");
  if (values.length < 2) return null;
  const [low, high] = [Math.min(0, ...values), Math.max(...values)];
  const at = (value, i) =>
    `${(1 + (i * (WIDE - 2)) / (values.length - 1)).toFixed(1)},${(HIGH - 1 - ((value - low) * (HIGH - 2)) / (high - low || 1)).toFixed(1)}`;
  const svg = document.createElementNS(SVG, "svg");
  const line = document.createElementNS(SVG, "polyline");
  const options = {
    viewBox: `0 0 ${WIDE} ${HIGH}`,
    width: WIDE,
    height: HIGH,
    class: "spark",
    role: "img",
    "aria-label": `During the search: ${short(values[0])} to ${short(values.at(-1))}`,
  };
  for (const [name, value] of Object.entries(options)) svg.setAttribute(name, value);
  line.setAttribute("points", values.map(at).join(" "));
  svg.append(line);
  return svg;
}

const short = (value) => String(Number(value.toPrecision(3)));

export const behaviourWords = (row) =>
  row.behaviour && cardOf.has(row.behaviour)
    ? cardName(homeOf(row.behaviour))
    : row.filtered
      ? `filtered out: ${row.filtered}`
      : "";
