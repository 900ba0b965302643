// What the reader chose: in the address, so that it can be shared, and that "back" works.
import { data, normal } from "./data.js";

const SETS = ["sel", "open", "b", "tag", "hide"];

function fresh() {
  const sets = Object.fromEntries(SETS.map((name) => [name, new Set()]));
  return {
    ...sets,
    anchor: "",
    scale: normal,
    own: new Map(),
    q: "",
    sort: "",
    low: "",
    high: "",
    star: false,
    prompt: "",
    cmp: false,
  };
}

export const state = fresh();
const followers = [];

export function follow(act) {
  followers.push(act);
}

export function encoded(some) {
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
  for (const part of fragment.split("&")) {
    const [name, rest] = [part.split("=")[0], part.slice(part.indexOf("=") + 1)];
    const value = part.includes("=") ? readable(rest) : null;
    if (value === null) some.anchor = readable(part) || some.anchor;
    else if (SETS.includes(name)) some[name] = new Set(value.split(",").filter(Boolean));
    else if (name === "own")
      some.own = new Map(
        value
          .split(",")
          .map((pair) => pair.split(":"))
          .filter((pair) => data.scales.includes(pair[1])),
      );
    else if (name === "scale") some.scale = data.scales.includes(value) ? value : normal;
    else if (["star", "cmp"].includes(name)) some[name] = value === "1";
    else if (["low", "high", "prompt"].includes(name))
      some[name] = value !== "" && Number.isFinite(Number(value)) ? value : "";
    else if (["q", "sort"].includes(name)) some[name] = value;
  }
  return some;
}

// A broken address is no reason to show nothing.
function readable(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return "";
  }
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
