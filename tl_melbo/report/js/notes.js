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
    const notes = JSON.parse(localStorage.getItem(PLACE));
    return notes && typeof notes.vectors === "object" && Array.isArray(notes.behaviours)
      ? notes
      : null;
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

function cleaned({ star, name, note }) {
  return {
    star: star === true,
    name: String(name ?? "").slice(0, 200),
    note: String(note ?? "").slice(0, 10000),
  };
}

function take(notes) {
  for (const [key, entry] of Object.entries(notes.vectors)) own.vectors.set(key, cleaned(entry));
  for (const entry of notes.behaviours) {
    const key = nearestCard(entry.members ?? []);
    if (key !== null) {
      const merged = (entry.merged ?? [])
        .map(nearestCard)
        .filter((other) => other && other !== key);
      own.cards.set(key, { ...cleaned(entry), merged });
    } else if (!own.lost.some((other) => JSON.stringify(other) === JSON.stringify(entry)))
      own.lost.push(entry);
  }
}

export function noteOf(kind, key) {
  return own[kind].get(key) ?? { star: false, name: "", note: "", merged: [] };
}

export function setNote(kind, key, changes) {
  own[kind].set(key, { ...noteOf(kind, key), ...changes });
  const kept = store();
  for (const act of followers) act(kept);
}

// Where a behaviour went: itself, or the one that it was merged into.
export function homeOf(key) {
  for (const [other, note] of own.cards) if (note.merged?.includes(key)) return other;
  return key;
}

export function cardName(key) {
  return noteOf("cards", key).name || cardOf.get(key)?.name || "";
}

export function mergeInto(key, other) {
  const gone = [key, ...(noteOf("cards", key).merged ?? [])];
  if (own.cards.has(key)) own.cards.set(key, { ...noteOf("cards", key), merged: [] });
  setNote("cards", other, { merged: [...(noteOf("cards", other).merged ?? []), ...gone] });
}

function exported() {
  const behaviours = [...own.cards].map(([key, { merged, ...note }]) => ({
    ...note,
    members: membersOf(cardOf.get(key)),
    merged: (merged ?? []).map((other) => membersOf(cardOf.get(other))),
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
  if (kept) take(kept);
  const list = $("#lost-notes");
  for (const entry of own.lost) {
    list.append(
      el("li", {
        text: [entry.star ? "★" : "", entry.name, entry.note].filter(Boolean).join(" – "),
      }),
    );
  }
  list.parentElement.hidden = !own.lost.length;
  $("#export").append(button("Export notes.json", download, { class: "export" }));
  onNotes((saved) => {
    $("#not-kept").hidden = saved;
  });
}
