// Small things that stand beside a vector's or a behaviour's name.
import { button, el } from "./dom.js";
import { cardOf, nameOf, noteKey, rowOf } from "./data.js";
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

export const behaviourWords = (row) =>
  row.behaviour && cardOf.has(row.behaviour)
    ? cardName(homeOf(row.behaviour))
    : row.filtered
      ? `filtered out: ${row.filtered}`
      : "";
