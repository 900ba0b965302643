// Figures in the page's colours, by day and by night.
import { $ } from "./dom.js";

const touch = matchMedia("(pointer: coarse)").matches;
const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new Set();

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// The colours of a figure's frame and of its names; those of its data stay.
function painted(traces, layout) {
  const [ink, card, line, soft] = ["--ink", "--card", "--line", "--soft"].map(colour);
  const looks = {
    ...layout,
    font: { ...layout.font, color: ink },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink },
    hoverlabel: { ...layout.hoverlabel, bgcolor: card, font: { color: ink } },
  };
  const axes = { gridcolor: line, zerolinecolor: line, linecolor: line, tickcolor: soft };
  for (const name of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key)))
    looks[name] = { ...layout[name], ...axes, automargin: true };
  const named = ({ textfont, ...trace }) =>
    textfont ? { ...trace, textfont: { ...textfont, color: soft } } : trace;
  return [traces.map(named), looks];
}

// Draws a figure once, and tells whether it did; `own` are settings of its traces.
export async function paint(holder, own = {}) {
  if (drawn.has(holder)) return false;
  drawn.add(holder);
  const { data, layout } = JSON.parse($("script", holder).textContent);
  for (const trace of data) Object.assign(trace, own);
  if (layout.meta?.alt) holder.setAttribute("aria-label", layout.meta.alt);
  // A finger that drags wants to scroll the page, not to zoom.
  if (touch) layout.dragmode = false;
  await Plotly.newPlot(holder, ...painted(data, layout), {
    responsive: true,
    displaylogo: false,
    displayModeBar: touch ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
  });
  return true;
}

function repaint() {
  for (const holder of drawn)
    if (holder.layout) Plotly.react(holder, ...painted(holder.data, holder.layout));
}

dark.addEventListener("change", repaint);
