"use strict";

const touch = matchMedia("(pointer: coarse)").matches;

// Figures: the data lie in the page as JSON.
for (const holder of document.querySelectorAll(".plot")) {
  const { data, layout } = JSON.parse(holder.querySelector("script").textContent);
  // A finger that drags wants to scroll the page, not to zoom.
  if (touch) layout.dragmode = false;
  Plotly.newPlot(holder, data, layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: touch ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
  });
}

// The table is complete without this; DataTables makes it sortable and searchable.
const bundle = document.getElementById("datatables").textContent;
const address = URL.createObjectURL(new Blob([bundle], { type: "text/javascript" }));
import(address).then(({ default: DataTable, set_or_remove_dark_class: followColourScheme }) => {
  followColourScheme();
  for (const table of document.querySelectorAll("table.data")) makeSearchable(DataTable, table);
});

function makeSearchable(DataTable, table) {
  const rows = table.tBodies[0].rows.length;
  new DataTable(table, {
    autoWidth: false,
    order: [],
    pageLength: 50,
    paging: rows > 50,
    layout: {
      topStart: { search: { placeholder: "any word" } },
      topEnd: "info",
      bottomStart: null,
      bottomEnd: rows > 50 ? "paging" : null,
    },
    language: {
      search: "Search",
      info: "_TOTAL_ rows",
      infoEmpty: "no rows",
      infoFiltered: "of _MAX_",
      zeroRecords: "No completion holds these words.",
    },
  });
}
