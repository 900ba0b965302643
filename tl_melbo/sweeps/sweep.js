// Draws every figure in the page's colours, by day and by night.
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function painted(layout) {
  const looks = {
    ...layout,
    font: { ...layout.font, color: colour("--ink") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--ink") },
    hoverlabel: {
      ...layout.hoverlabel,
      bgcolor: colour("--card"),
      font: { color: colour("--ink") },
    },
  };
  // A finger that drags wants to scroll the page, not to zoom.
  if (touch) looks.dragmode = false;
  for (const name of Object.keys(layout).filter((key) => /^[xy]axis/.test(key)))
    looks[name] = { ...layout[name], gridcolor: colour("--line"), automargin: true };
  return looks;
}

function drawAll() {
  const look = {
    responsive: true,
    displaylogo: false,
    displayModeBar: touch ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
  };
  return Promise.all(
    [...document.querySelectorAll(".plot")].map((holder) => {
      holder.source ??= JSON.parse(holder.querySelector("script").textContent);
      const { data, layout } = holder.source;
      return Plotly.react(holder, data, painted(layout), look);
    }),
  );
}

dark.addEventListener("change", drawAll);
drawAll().then(() => (document.documentElement.dataset.ready = ""));
