// Stars, names, remarks and merged behaviours of whoever reads: kept by the browser, if it may.
import { $, button, el } from "./dom.js";
import { cardOf, data, membersOf } from "./data.js";

const PLACE = `tl_melbo:${data.library}`;
const SAME = 0.5;
const followers = [];

export function onNotes(act) {
  followers.push(act);
}

// The browser may forbid it; then notes last as long as the page is open.
function stored() {
  try {
    return JSON.parse(localStorage.getItem(PLACE));
  } catch {
    return null;
  }
}

function store() {
  try {
    localStorage.setItem(PLACE, JSON.stringify(exported()));
    return true;
  } catch {
    return false;
  }
}

const own = { vectors: new Map(), cards: new Map(), lost: [] };
const lostBefore = new Set();

function likeness(one, other) {
  const shared = one.filter((key) => other.includes(key)).length;
  return shared / (one.length + other.length - shared || 1);
}

// Behaviours get new numbers when vectors are added: known again by their members.
function nearestCard(members) {
  const cards = [...cardOf.values()];
  const best = cards
    .map((card) => [likeness(members, membersOf(card)), card.key])
    .sort((a, b) => b[0] - a[0])[0];
  return best && best[0] >= SAME ? best[1] : null;
}

// Whole characters: half an emoji is none.
const cut = (text, longest) => [...String(text ?? "")].slice(0, longest).join("");
const keysIn = (list) =>
  list.map(String).filter((key) => /^\d{1,9}-?(p\d{1,4})?(s\d{1,4})?$/.test(key));

function cleaned({ star, name, note }) {
  return { star: star === true, name: cut(name, 200), note: cut(note, 10000) };
}

// What the browser kept may be anything: an entry that is no note is left out.
function takeEach(entries, act) {
  for (const entry of entries) {
    try {
      act(entry);
    } catch {
      continue;
    }
  }
}

function take(notes) {
  takeEach(Object.entries(notes?.vectors ?? {}), ([key, entry]) => {
    if (/^\d{1,9}-?$/.test(key)) own.vectors.set(key, cleaned(entry));
  });
  takeEach(Array.isArray(notes?.behaviours) ? notes.behaviours : [], takeBehaviour);
}

function takeBehaviour(entry) {
  const [members, merged] = [keysIn(entry.members ?? []), (entry.merged ?? []).map(keysIn)];
  const key = nearestCard(members);
  if (key === null) {
    const lost = { ...cleaned(entry), members, merged };
    const told = JSON.stringify(lost);
    if (!lostBefore.has(told)) own.lost.push(lost);
    lostBefore.add(told);
    return;
  }
  const known = merged.map(nearestCard);
  own.cards.set(key, {
    ...cleaned(entry),
    merged: [],
    lost: merged.filter((_, place) => known[place] === null),
  });
  for (const other of known) if (other !== null) join(other, key);
}

// Each behaviour is in one place, and takes along what was merged into it; none is in itself.
function join(key, other) {
  const home = homeOf(other);
  if (homeOf(key) === home) return;
  for (const note of own.cards.values()) note.merged = note.merged.filter((each) => each !== key);
  const [from, to] = [noteOf("cards", key), noteOf("cards", home)];
  if (own.cards.has(key)) own.cards.set(key, { ...from, merged: [], lost: [] });
  own.cards.set(home, {
    ...to,
    merged: [...to.merged, key, ...from.merged],
    lost: [...to.lost, ...from.lost],
  });
}

export function noteOf(kind, key) {
  const none = { star: false, name: "", note: "" };
  return own[kind].get(key) ?? (kind === "cards" ? { ...none, merged: [], lost: [] } : none);
}

export function setNote(kind, key, changes) {
  own[kind].set(key, { ...noteOf(kind, key), ...changes });
  const kept = store();
  for (const act of followers) act(kept);
}

// Where a behaviour went: itself, or the one that it was merged into.
export function homeOf(key) {
  for (const [other, note] of own.cards) if (note.merged.includes(key)) return other;
  return key;
}

export function cardName(key) {
  return noteOf("cards", key).name || cardOf.get(key)?.name || "";
}

export function mergeInto(key, other) {
  join(key, other);
  setNote("cards", homeOf(other), {});
}

function exported() {
  const behaviours = [...own.cards].map(([key, { merged, lost, ...note }]) => ({
    ...note,
    members: membersOf(cardOf.get(key)),
    merged: [...merged.map((other) => membersOf(cardOf.get(other))), ...lost],
  }));
  return {
    version: 1,
    vectors: Object.fromEntries(own.vectors),
    behaviours: [...behaviours, ...own.lost],
  };
}

function download() {
  const text = JSON.stringify(exported(), null, 1);
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = el("a", { href: address, download: "notes.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

export function beginNotes() {
  const kept = stored();
  take(data.notes);
  take(kept);
  const list = $("#lost-notes");
  for (const { star, name, note } of own.lost)
    list.append(el("li", { text: [star ? "★" : "", name, note].filter(Boolean).join(" – ") }));
  for (const [key, { lost }] of own.cards)
    for (const members of lost)
      list.append(el("li", { text: `Merged into ${cardName(key)}: ${members.join(", ")}` }));
  list.parentElement.hidden = !list.children.length;
  $("#export").append(button("Export notes.json", download, { class: "export" }));
  onNotes((saved) => {
    $("#not-kept").hidden = saved;
  });
}
