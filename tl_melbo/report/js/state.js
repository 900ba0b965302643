// What the reader chose: in the address, so that it can be shared, and that "back" works.
import { data, normal } from "./data.js";

const SETS = ["sel", "open", "b", "tag", "hide"];

// What lets every row through.
export function noFilters() {
  const [b, tag, hide] = [new Set(), new Set(), new Set()];
  return { b, tag, hide, q: "", low: "", high: "", star: false, prompt: "" };
}

export const filters = () => Object.keys(noFilters()).map((name) => state[name]);

function fresh() {
  const [sel, open, own] = [new Set(), new Set(), new Map()];
  return { ...noFilters(), sel, open, own, anchor: "", scale: normal, sort: "", cmp: false };
}

export const state = fresh();
const followers = [];

export function follow(act) {
  followers.push(act);
}

function encoded(some) {
  const parts = some.anchor ? [some.anchor] : [];
  const add = (name, value) => parts.push(`${name}=${encodeURIComponent(value)}`);
  for (const name of SETS) if (some[name].size) add(name, [...some[name]].join(","));
  if (some.scale !== normal) add("scale", some.scale);
  if (some.own.size) add("own", [...some.own].map((pair) => pair.join(":")).join(","));
  for (const name of ["q", "sort", "low", "high", "prompt"]) if (some[name]) add(name, some[name]);
  for (const name of ["star", "cmp"]) if (some[name]) add(name, 1);
  return parts.join("&");
}

function decoded(fragment) {
  const some = fresh();
  // It reads what is broken, too.
  for (const [name, value] of new URLSearchParams(fragment)) {
    const parts = value.split(",").filter(Boolean);
    if (SETS.includes(name)) some[name] = new Set(parts);
    else if (name === "own") {
      const pairs = parts.map((pair) => pair.split(":"));
      some.own = new Map(pairs.filter(([, scale]) => data.scales.includes(scale)));
    } else if (name === "scale") some.scale = data.scales.includes(value) ? value : normal;
    else if (["star", "cmp"].includes(name)) some[name] = value === "1";
    else if (["low", "high", "prompt"].includes(name))
      some[name] = Number.isFinite(Number(value)) ? value : "";
    else if (["q", "sort"].includes(name)) some[name] = value;
    else if (value === "") some.anchor = name;
  }
  return some;
}

let waiting = null;

// Browsers refuse too many changes of the address a second.
function later(address) {
  clearTimeout(waiting?.timer);
  waiting = { address, timer: setTimeout(written, 150) };
}

function written() {
  if (!waiting) return;
  clearTimeout(waiting.timer);
  history.replaceState(null, "", waiting.address);
  waiting = null;
}

// `quietly` replaces the entry in the history: for what changes with every key.
export function change(changes, quietly = false) {
  Object.assign(state, changes);
  const address = `#${encoded(state)}`;
  if (quietly) later(address);
  else {
    written();
    if (address !== (location.hash || "#")) history.pushState(null, "", address);
  }
  tell();
}

export function toggled(name, key) {
  const some = new Set(state[name]);
  if (!some.delete(key)) some.add(key);
  return { [name]: some };
}

function tell(restored = false) {
  for (const act of followers) act(state, restored);
}

function restore() {
  clearTimeout(waiting?.timer);
  waiting = null;
  Object.assign(state, decoded(location.hash.slice(1)));
  tell(true);
}

export function begin() {
  addEventListener("popstate", restore);
  restore();
}
