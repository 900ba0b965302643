// Figures in the page's colours, by day and by night.
import { $ } from "./dom.js";

const touch = matchMedia("(pointer: coarse)").matches;
const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new Set();

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

// Draws a figure once, and tells whether it did; `own` are settings of its traces.
export async function paint(holder, own = {}) {
  if (drawn.has(holder)) return false;
  drawn.add(holder);
  const { data, layout } = JSON.parse($("script", holder).textContent);
  for (const trace of data) {
    if (trace.textfont) trace.textfont.color = colour("--soft");
    Object.assign(trace, own);
  }
  // A finger that drags wants to scroll the page, not to zoom.
  if (touch) layout.dragmode = false;
  await Plotly.newPlot(holder, data, painted(layout), {
    responsive: true,
    displaylogo: false,
    displayModeBar: touch ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
  });
  return true;
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

dark.addEventListener("change", repaint);
