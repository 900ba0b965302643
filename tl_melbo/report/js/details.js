// What an opened row shows: whole texts at its own scale, samples, tokens, notes, next commands.
import { button, copyButton, el, number, prose, sampledPart, soft } from "./dom.js";
import {
  data,
  folder,
  isBaseline,
  nameOf,
  noteKey,
  python,
  textsAt,
  unsteeredText,
} from "./data.js";
import { marked } from "./diff.js";
import { noteFields } from "./marks.js";
import { change, state } from "./state.js";

export const scaleOf = (row) => state.own.get(row.key) ?? state.scale;

export function scaleSlider(shown, label, current, act) {
  const told = el("output");
  const slider = el("input", {
    type: "range",
    min: 0,
    max: data.scales.length - 1,
    step: 1,
    "aria-label": label,
  });
  const show = (scale) => {
    slider.value = data.scales.indexOf(scale);
    told.textContent = `× ${scale}`;
    slider.setAttribute("aria-valuetext", `scale ${scale}`);
  };
  slider.addEventListener("input", () => {
    const scale = data.scales[slider.value];
    show(scale);
    act(scale);
  });
  show(current);
  return { part: el("label", { class: "scale" }, shown, slider, told), show };
}

export function detailsOf(row) {
  const texts = el("div", { class: "texts" });
  const refresh = () => texts.replaceChildren(...textsOf(row));
  const holder = el("div", { class: "inside" });
  if (data.scales.length > 1) {
    const label = `Scale of vector ${nameOf(row)} alone`;
    const act = (scale) => change({ own: new Map(state.own).set(row.key, scale) }, true);
    const slider = scaleSlider("Its own scale ", label, scaleOf(row), act);
    holder.append(el("div", { class: "only" }, slider.part));
    holder.follow = () => slider.show(scaleOf(row));
  }
  holder.append(texts, ...tokensOf(row));
  const next = [soft("In Python"), copyButton(python([row]))];
  if (data.folder !== null && row.sign > 0)
    next.push(
      soft("More vectors with its effect"),
      copyButton(`tl-melbo ortho ${folder()} --vector ${row.number}`),
    );
  const notes = noteFields("vectors", noteKey(row), `vector ${nameOf(row)}`);
  holder.append(el("div", { class: "next" }, ...next), notes);
  holder.refresh = refresh;
  refresh();
  return holder;
}

function textsOf(row) {
  const scale = scaleOf(row);
  const [text = null, ...samples] = textsAt(row, scale);
  if (text === null)
    return [el("p", { class: "soft", text: `Nothing was written at scale ${scale}.` })];
  const unsteered = unsteeredText(row);
  const whole = el("blockquote", {}, prose(text));
  const differs = unsteered !== null && !isBaseline(row, scale);
  const parts = [differs ? diffSwitch(whole, text, unsteered) : null, whole, sampledPart(samples)];
  return parts.filter(Boolean);
}

function diffSwitch(whole, text, unsteered) {
  const act = () => {
    const on = made.getAttribute("aria-pressed") !== "true";
    made.setAttribute("aria-pressed", String(on));
    whole.replaceChildren(on ? marked(text, unsteered) : prose(text));
  };
  const options = { class: "chip", "aria-pressed": "false" };
  const made = button("Mark what differs from unsteered", act, options);
  return made;
}

// Tokens that the vector makes likelier or rarer, and where its text parts from the unsteered one.
export function tokensOf(row) {
  const tokens = data.tokens?.[row.key];
  const parts = [];
  if (tokens) {
    const { promoted, suppressed } = tokens;
    const lists = [tokenList("promoted", promoted), tokenList("suppressed", suppressed)];
    parts.push(el("div", { class: "tokens" }, ...lists));
  }
  const path = data.divergence?.[row.key];
  if (path) {
    const act = () => holder.replaceChildren(tokenPath(path));
    const made = button("Where does it diverge, token by token?", act, { class: "chip" });
    const holder = el("div", {}, made);
    parts.push(holder);
  }
  return parts;
}

function tokenList(label, tokens) {
  const shown = tokens.flatMap(({ token, change: by }) => {
    const title = by === null ? null : `${by > 0 ? "+" : ""}${number(by, 2)}`;
    return [el("code", { class: "token", text: token, title }), " "];
  });
  return el("p", {}, soft(`Next tokens ${label} `), ...shown);
}

function tokenPath(path) {
  const most = Math.max(1e-9, ...path.map(({ value }) => Math.abs(value ?? 0)));
  const parts = path.map(({ token, value, told }) => {
    const made = el("span", { class: "step", text: token, title: told });
    made.style.setProperty("--share", ((value ?? 0) / most).toFixed(2));
    return made;
  });
  return el("div", { class: "path words" }, ...parts);
}
