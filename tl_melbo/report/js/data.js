// What Python measured, and how the parts refer to each other.
import { $ } from "./dom.js";

export const data = JSON.parse($("#data").textContent);
export const rowOf = new Map(data.rows.map((row) => [row.key, row]));
export const cardOf = new Map(data.behaviours.map((card) => [card.key, card]));
export const manyPrompts = data.prompts.length > 1;
export const normal = data.scales.includes("1") ? "1" : nearest(data.scales, 1);

function nearest(scales, value) {
  return [...scales].sort((a, b) => Math.abs(a - value) - Math.abs(b - value))[0] ?? "1";
}

const textsOf = (places) => (places ?? []).map((place) => data.texts[place] ?? null);

// The greedy completion first.
export const textsAt = (row, scale) => textsOf(row.texts[scale]);
export const textAt = (row, scale, sample = 0) => textsAt(row, scale)[sample] ?? null;
export const unsteeredTexts = (prompt) => textsOf(data.unsteered[prompt]);
export const unsteeredText = (row) => unsteeredTexts(row.prompt)[0] ?? null;

export function isBaseline(row, scale) {
  const own = textAt(row, scale);
  return own !== null && own === unsteeredText(row);
}

// Whether a row's completion is the baseline's, or was grouped with it.
export function isNear(row, scale) {
  return row.baseline || isBaseline(row, scale) || !!cardOf.get(row.behaviour)?.baseline;
}

// The rows of a behaviour; "4s2", the second sample of row 4, where it shows in samples alone.
export const membersOf = (card) => (card.rows.length ? card.rows : card.samples);

// "4", "−4", and where there are several prompts, of which.
export function nameOf(row) {
  const prompt = row.prompt ? ` (prompt ${row.prompt + 1})` : "";
  return `${row.sign < 0 ? "−" : ""}${row.number}${prompt}`;
}

// A reader's notes are of the vector, whatever the prompt.
export const noteKey = (row) => row.key.replace(/p\d+$/, "");

// In Python, with places in the library; those of negatives apart.
export function python(rows) {
  const places = (sign) => [
    ...new Set(rows.filter((row) => row.sign === sign).map((row) => row.vector)),
  ];
  const [plus, minus] = [places(1), places(-1)];
  const picked = (some) =>
    some.length === 1 ? `found[${some[0]}]` : `found[[${some.join(", ")}]]`;
  if (!minus.length) return picked(plus);
  if (!plus.length) return `-${picked(minus)}`;
  return `tm.concatenate([${picked(plus)}, -${picked(minus)}])`;
}

// The folder that this page is in, so that the command works from anywhere.
export function folder() {
  if (location.protocol !== "file:") return quoted(data.folder);
  const path = decodeURIComponent(location.pathname).replace(/\/[^/]*$/, "");
  return quoted(path.replace(/^\/([A-Za-z]:)/, "$1"));
}

function quoted(path) {
  return /^[\w./:@%+=-]+$/.test(path) ? path : `'${path.replaceAll("'", "'\\''")}'`;
}

// Cosines in hundredths, a byte each.
function matrix(encoded) {
  if (!encoded) return null;
  const bytes = Int8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
  const side = Math.round(Math.sqrt(bytes.length));
  return (row, column) => bytes[row * side + column] / 100;
}

const ofVectors = matrix(data.cosines);
const ofEffects = matrix(data.effects);
const nVectors = 1 + Math.max(...data.rows.map((row) => row.vector));
const place = (row) => row.vector + (row.sign < 0 ? nVectors : 0);

export const cosine = (a, b) => a.sign * b.sign * ofVectors(a.vector, b.vector);
export const effectCosine = (a, b) => ofEffects && ofEffects(place(a), place(b));
