// Elements, numbers and texts. Whatever a model wrote becomes a text node, never markup.

export const $ = (selector, inside = document) => inside.querySelector(selector);
export const $$ = (selector, inside = document) => [...inside.querySelectorAll(selector)];

export function el(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on")
      for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else if (name === "text") made.textContent = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function button(label, act, options = {}) {
  return el("button", { type: "button", text: label, on: { click: act }, ...options });
}

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value;
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  if (Math.abs(value) >= 10 ** digits) return value.toFixed(0);
  return Math.abs(value) < 1e-4 ? value.toExponential(digits - 1) : value.toPrecision(digits);
}

export function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

export function percent(share) {
  return `${Math.round(100 * share)}%`;
}

// Text in pieces: prose, and code or drawings, which need a font of one width.
export function pieces(text) {
  const found = [];
  let fenced = false;
  for (const line of text.split("\n")) {
    const fence = /^\s*```/.test(line);
    const mono = fenced || fence || isDrawing(line);
    if (fence) fenced = !fenced;
    const last = found.at(-1);
    if (last && last.mono === mono) last.lines.push(line);
    else found.push({ mono, lines: [line] });
  }
  // A single line of marks is a heading or a rule, not a drawing.
  for (const piece of found)
    if (piece.lines.length < 2)
      piece.mono = piece.lines[0].length > 3 && /^( {4}|\t)\S/.test(piece.lines[0]);
  return joined(found);
}

function joined(parts) {
  const found = [];
  for (const { mono, lines } of parts) {
    const last = found.at(-1);
    if (last && last.mono === mono) last.lines.push(...lines);
    else found.push({ mono, lines: [...lines] });
  }
  return found.map(({ mono, lines }) => ({ mono, text: lines.join("\n") }));
}

// Indented far, wide gaps, or more marks than letters.
function isDrawing(line) {
  if (/^( {4}|\t)\s*\S/.test(line) || /\S {3,}\S/.test(line)) return true;
  const letters = line.replace(/[^\p{L}\p{N}]/gu, "").length;
  const solid = line.replace(/\s/g, "").length;
  return solid >= 2 && letters < solid / 2;
}

export function fill(holder, text) {
  const parts = pieces(text);
  holder.replaceChildren(
    ...parts.map(({ mono, text: shown }) =>
      el(mono ? "code" : "span", { class: mono ? "mono" : null, text: shown }),
    ),
  );
  return holder;
}

const LONG = 260;

// A text of three lines with "more", where it is longer.
export function clamped(text, long = LONG) {
  const body = fill(el("div", { class: "words" }), text);
  const holder = el("div", { class: "clamp" }, body);
  if (text.length <= long && text.split("\n").length <= 3) return holder;
  body.classList.add("short");
  const more = button(
    "more",
    () => {
      const open = body.classList.toggle("short");
      more.textContent = open ? "more" : "less";
      more.setAttribute("aria-expanded", String(!open));
    },
    { class: "more", "aria-expanded": "false" },
  );
  holder.append(more);
  return holder;
}

async function copy(text, said) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without leave, as browsers did before.
    const area = el("textarea", { class: "away", "aria-hidden": "true" });
    area.value = text;
    (said.closest("dialog") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    said.focus();
  }
  const before = said.textContent;
  said.textContent = "copied";
  setTimeout(() => {
    said.textContent = before;
  }, 1200);
}

export function copyButton(text, label = "copy") {
  const made = button(label, () => copy(text, made), {
    class: "copy",
    title: text,
    "aria-label": `Copy ${text}`,
  });
  return el("span", { class: "command" }, el("code", { text }), made);
}
