// Figures: drawn when they come into view, and what their points stand for.
import { $, $$, el, number, whenNear } from "./dom.js";
import { effectCosine, normal, rowOf, textAt } from "./data.js";
import { behaviourWords } from "./marks.js";
import { compare } from "./compare.js";
import { paint } from "./paint.js";

// Of which rows a point of these figures is.
const KEYS = {
  effects: ({ x, y }) => [y, x].map(String),
  map: ({ data: trace, pointNumber }) => [trace.meta[pointNumber]],
};

async function draw(holder) {
  const keys = KEYS[holder.dataset.figure];
  // The panel beside it tells more.
  const own = keys ? { hoverinfo: "none", hovertemplate: null } : {};
  if ((await paint(holder, own)) && keys) listen(holder, keys);
}

// What a point stands for, as text beside it: no markup can hide in it.
function listen(holder, keysOf) {
  holder.on("plotly_hover", ({ points, event }) => {
    const rows = keysOf(points[0])
      .map((key) => rowOf.get(key))
      .filter(Boolean);
    if (rows.length) showPanel(rows, event);
  });
  holder.on("plotly_unhover", hidePanel);
  holder.on("plotly_click", ({ points }) => {
    const keys = keysOf(points[0]).filter((key) => rowOf.has(key));
    hidePanel();
    if (keys.length === 2 && keys[0] !== keys[1]) compare(...keys);
    else if (keys.length) follow(keys[0]);
  });
}

// As if a link had been clicked.
function follow(key) {
  const link = el("a", { href: `#v${key}`, hidden: true });
  document.body.append(link);
  link.click();
  link.remove();
}

function told(row) {
  const text = textAt(row, normal) ?? "–";
  return el(
    "div",
    {},
    el("b", { text: `${row.sign < 0 ? "−" : ""}${row.number} ${behaviourWords(row)}` }),
    el("p", { text: text.length > 300 ? `${text.slice(0, 299)}…` : text }),
  );
}

function showPanel(rows, event) {
  const panel = $("#hover");
  const [a, b] = rows;
  const cosine = b && a !== b ? effectCosine(a, b) : null;
  const parts = a === b ? [told(a)] : rows.map(told);
  if (cosine !== null)
    parts.unshift(el("p", { class: "soft", text: `cosine of effects ${number(cosine, 2)}` }));
  panel.replaceChildren(...parts);
  panel.hidden = false;
  const { clientX = 0, clientY = 0 } = event ?? {};
  const [wide, high] = [panel.offsetWidth, panel.offsetHeight];
  const left = clientX + wide + 24 < innerWidth ? clientX + 16 : Math.max(8, clientX - wide - 16);
  panel.style.left = `${Math.max(8, Math.min(left, innerWidth - wide - 8))}px`;
  panel.style.top = `${Math.max(8, Math.min(clientY + 16, innerHeight - high - 8))}px`;
}

function hidePanel() {
  $("#hover").hidden = true;
}

export function drawAll() {
  return Promise.all($$(".plot").map(draw));
}

export function beginFigures() {
  for (const holder of $$(".plot")) whenNear(holder, 300, () => draw(holder));
  addEventListener("scroll", hidePanel, { passive: true });
}
