// What an opened row shows: whole texts at its own scale, samples, tokens, notes, next commands.
import { button, copyButton, el, fill, number } from "./dom.js";
import {
  data,
  folder,
  isBaseline,
  nameOf,
  noteKey,
  nSamples,
  python,
  textAt,
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
    const slider = scaleSlider(
      "Its own scale ",
      `Scale of vector ${nameOf(row)} alone`,
      scaleOf(row),
      (scale) => {
        change({ own: new Map(state.own).set(row.key, scale) }, true);
      },
    );
    holder.append(el("div", { class: "only" }, slider.part));
    holder.follow = () => slider.show(scaleOf(row));
  }
  holder.append(texts, ...tokensOf(row));
  const what = `vector ${nameOf(row)}`;
  holder.append(
    el("div", { class: "next" }, copyButton(python([row])), nextCommand(row)),
    noteFields("vectors", noteKey(row), what),
  );
  holder.refresh = refresh;
  refresh();
  return holder;
}

function nextCommand(row) {
  return data.folder !== null && row.sign > 0
    ? copyButton(`tl-melbo ortho ${folder()} --vector ${row.number}`)
    : null;
}

function textsOf(row) {
  const scale = scaleOf(row);
  const text = textAt(row, scale);
  if (text === null)
    return [el("p", { class: "soft", text: `Nothing was written at scale ${scale}.` })];
  const unsteered = unsteeredText(row);
  const whole = el("blockquote");
  const plain = () => whole.replaceChildren(fill(el("div", { class: "words" }), text));
  plain();
  const parts = [whole];
  if (unsteered !== null && !isBaseline(row, scale))
    parts.unshift(diffSwitch(whole, plain, text, unsteered));
  const count = nSamples(row, scale);
  if (count > 1) parts.push(samplesOf(row, scale, count));
  return parts;
}

function diffSwitch(whole, plain, text, unsteered) {
  const made = button(
    "Mark what differs from unsteered",
    () => {
      const on = made.getAttribute("aria-pressed") !== "true";
      made.setAttribute("aria-pressed", String(on));
      if (on) whole.replaceChildren(marked(text, unsteered));
      else plain();
    },
    { class: "chip", "aria-pressed": "false" },
  );
  return made;
}

export function samplesOf(row, scale, count) {
  const list = el("ol", { class: "samples" });
  for (let sample = 1; sample < count; sample++)
    list.append(fill(el("li"), textAt(row, scale, sample) ?? "–"));
  return el("details", {}, el("summary", { text: `${count - 1} sampled` }), list);
}

// Tokens that the vector makes likelier or rarer, and where its text parts from the unsteered one.
export function tokensOf(row) {
  const tokens = data.tokens?.[row.key];
  const parts = [];
  if (tokens)
    parts.push(
      el(
        "div",
        { class: "tokens" },
        tokenList("Promoted", tokens.promoted),
        tokenList("Suppressed", tokens.suppressed),
      ),
    );
  const path = data.divergence?.[row.key];
  if (path) {
    const holder = el("div");
    const made = button(
      "Where does it diverge, token by token?",
      () => {
        made.remove();
        holder.append(tokenPath(path));
      },
      { class: "chip" },
    );
    holder.append(made);
    parts.push(holder);
  }
  return parts;
}

function tokenList(label, tokens) {
  return el(
    "p",
    {},
    el("span", { class: "soft", text: `${label} ` }),
    ...tokens.flatMap(({ token, change: by }) => [
      el("code", {
        class: "token",
        text: token,
        title: by === null ? null : `${by > 0 ? "+" : ""}${number(by, 2)}`,
      }),
      " ",
    ]),
  );
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
