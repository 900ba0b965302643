// Figures: drawn when they come into view, in the page's colours, by day and by night.
import { $, $$, el, number } from "./dom.js";
import { effectCosine, normal, rowOf, textAt } from "./data.js";
import { behaviourWords } from "./marks.js";
import { compare } from "./compare.js";

const touch = matchMedia("(pointer: coarse)").matches;
const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new Set();

// Of which rows a point of these figures is.
const KEYS = {
  effects: ({ x, y }) => [y, x].map(String),
  map: ({ data: trace, pointNumber }) => [trace.meta[pointNumber]],
};

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function axisLook() {
  const [line, soft] = [colour("--line"), colour("--soft")];
  return {
    gridcolor: line,
    zerolinecolor: line,
    linecolor: line,
    tickcolor: soft,
    automargin: true,
  };
}

// The colours of a figure's frame; those of its data stay.
function look() {
  const [ink, card] = [colour("--ink"), colour("--card")];
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    "font.color": ink,
    "hoverlabel.bgcolor": card,
    "hoverlabel.font.color": ink,
  };
}

function painted(layout) {
  const looks = {
    ...layout,
    font: { ...layout.font, color: colour("--ink") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
  };
  looks.hoverlabel = {
    ...layout.hoverlabel,
    bgcolor: colour("--card"),
    font: { color: colour("--ink") },
  };
  for (const name of Object.keys(layout).filter((key) => /^[xy]axis/.test(key)))
    looks[name] = { ...layout[name], ...axisLook() };
  return looks;
}

async function draw(holder) {
  if (drawn.has(holder)) return;
  drawn.add(holder);
  const { data, layout } = JSON.parse($("script", holder).textContent);
  for (const trace of data) if (trace.textfont) trace.textfont.color = colour("--soft");
  // A finger that drags wants to scroll the page, not to zoom.
  if (touch) layout.dragmode = false;
  // The panel beside it tells more.
  if (KEYS[holder.dataset.figure])
    for (const trace of data) Object.assign(trace, { hoverinfo: "none", hovertemplate: null });
  await Plotly.newPlot(holder, data, painted(layout), {
    responsive: true,
    displaylogo: false,
    displayModeBar: touch ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
  });
  const keys = KEYS[holder.dataset.figure];
  if (keys) listen(holder, keys);
}

function repaint() {
  for (const holder of drawn) {
    if (!holder.layout) continue;
    const axes = Object.keys(holder.layout).filter((key) => /^[xy]axis\d*$/.test(key));
    const changes = Object.fromEntries(
      axes.flatMap((name) =>
        Object.entries(axisLook()).map(([key, value]) => [`${name}.${key}`, value]),
      ),
    );
    const named = holder.data.flatMap((trace, place) => (trace.textfont ? [place] : []));
    if (named.length) Plotly.restyle(holder, { "textfont.color": colour("--soft") }, named);
    Plotly.relayout(holder, { ...look(), ...changes });
  }
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
  const head =
    cosine === null
      ? null
      : el("p", { class: "soft", text: `cosine of effects ${number(cosine, 2)}` });
  const parts = a === b ? [told(a)] : rows.map(told);
  panel.replaceChildren(...[head, ...parts].filter(Boolean));
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
  const watcher = new IntersectionObserver(
    (seen) => {
      for (const { isIntersecting, target } of seen) {
        if (!isIntersecting) continue;
        watcher.unobserve(target);
        draw(target);
      }
    },
    { rootMargin: "300px" },
  );
  for (const holder of $$(".plot")) watcher.observe(holder);
  dark.addEventListener("change", repaint);
  addEventListener("scroll", hidePanel, { passive: true });
}
