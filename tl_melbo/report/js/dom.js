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

// What stands back behind the rest.
export const soft = (text) => el("span", { class: "soft", text });

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
  let fenced = false;
  const lines = text.split("\n").map((line) => {
    const fence = /^\s*```/.test(line);
    const mono = fenced || fence || isDrawing(line);
    if (fence) fenced = !fenced;
    return { mono, text: line };
  });
  const found = joined(lines);
  // A single line of marks is a heading or a rule, not a drawing.
  for (const piece of found)
    if (!piece.text.includes("\n"))
      piece.mono = piece.text.length > 3 && /^( {4}|\t)\S/.test(piece.text);
  return joined(found);
}

// Neighbours of one kind as one.
function joined(parts) {
  const found = [];
  for (const part of parts) {
    const last = found.at(-1);
    if (last?.mono === part.mono) last.text += `\n${part.text}`;
    else found.push({ ...part });
  }
  return found;
}

// Indented far, wide gaps, or more marks than letters.
function isDrawing(line) {
  if (/^( {4}|\t)\s*\S/.test(line) || /\S {3,}\S/.test(line)) return true;
  const letters = line.replace(/[^\p{L}\p{N}]/gu, "").length;
  const solid = line.replace(/\s/g, "").length;
  return solid >= 2 && letters < solid / 2;
}

function fill(holder, text) {
  const parts = pieces(text);
  holder.replaceChildren(
    ...parts.map(({ mono, text: shown }) =>
      el(mono ? "code" : "span", { class: mono ? "mono" : null, text: shown }),
    ),
  );
  return holder;
}

// A text as a block.
export const prose = (text) => fill(el("div", { class: "words" }), text);

// What was sampled beside a greedy text, folded away; nothing where nothing was.
export function sampledPart(texts) {
  if (!texts.length) return null;
  const list = texts.map((text) => fill(el("li"), text ?? "–"));
  const summary = el("summary", { text: `${texts.length} sampled` });
  return el("details", {}, summary, el("ol", { class: "samples" }, ...list));
}

const LONG = 260;

// A text of three lines with "more", where it is longer.
export function clamped(text, long = LONG) {
  const body = prose(text);
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
  // On a wide screen a long text may be whole in three lines.
  new ResizeObserver(() => {
    if (body.classList.contains("short")) more.hidden = body.scrollHeight <= body.clientHeight;
  }).observe(body);
  return holder;
}

// Act once, when an element comes so many pixels near the screen.
export function whenNear(element, pixels, act) {
  const watcher = new IntersectionObserver(
    (seen) => {
      if (!seen.some((each) => each.isIntersecting)) return;
      watcher.disconnect();
      act();
    },
    { rootMargin: `${pixels}px` },
  );
  watcher.observe(element);
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
