// Tables that sort and search, and build only the rows that somebody scrolls to.
import { $, $$, button, clamped, el, number, plural, whenNear } from "./dom.js";

const AT_ONCE = 50;
const everything = [];

// Rows of `items` as they come into view; all of them for the printer.
export function lazily(body, items, make) {
  let done = 0;
  const upTo = (count) => {
    const some = items.slice(done, Math.max(done, count));
    done += some.length;
    const rows = some.flatMap(make);
    if (sentinel.isConnected) sentinel.before(...rows);
    else body.append(...rows);
    if (done >= items.length) {
      watcher.disconnect();
      sentinel.remove();
    }
  };
  const sentinel = el("tr", { class: "sentinel" }, el("td"));
  const watcher = new IntersectionObserver(
    (seen) => seen.some((each) => each.isIntersecting) && upTo(done + AT_ONCE),
    { rootMargin: "800px" },
  );
  body.replaceChildren(sentinel);
  upTo(AT_ONCE);
  if (sentinel.isConnected) watcher.observe(sentinel);
  return {
    upTo,
    all: () => body.isConnected && upTo(items.length),
    stop: () => watcher.disconnect(),
  };
}

export function forPrinting(act) {
  everything.push(act);
}

export function buildEverything() {
  for (const act of everything) act();
}

// The head of a table whose columns sort; `chosen` tells the column, with "-" for downwards.
export function sortHeads(columns, act) {
  return columns.map(({ name, label, kind, hint, sorts = true, hidden }) => {
    const options = { class: `${kind} ${name}`, scope: "col", title: hint };
    if (sorts) {
      const sort = button(label, () => act(name), { class: "sort" });
      return el("th", { ...options, "data-column": name }, sort);
    }
    return el("th", options, hidden ? el("span", { class: "away", text: label }) : label);
  });
}

export function rowsShown(some, rows) {
  const all = plural(rows.length, "row");
  return some.length === rows.length ? all : `${some.length} of ${all}`;
}

export function markSorted(head, sort) {
  for (const each of $$("th[data-column]", head)) {
    const name = each.dataset.column;
    const order = sort === name ? "ascending" : sort === `-${name}` ? "descending" : null;
    if (order) each.setAttribute("aria-sort", order);
    else each.removeAttribute("aria-sort");
  }
}

export function nextSort(sort, name) {
  return sort === name ? `-${name}` : sort === `-${name}` ? "" : name;
}

export function inOrder(items, sort, value) {
  if (!sort) return items;
  const [name, sign] = sort.startsWith("-") ? [sort.slice(1), -1] : [sort, 1];
  const keyed = items.map((item) => [comparable(value(item, name)), item]);
  // What is not known comes last, whichever way.
  keyed.sort(([a], [b]) => (a === null) - (b === null) || sign * ((a > b) - (a < b)));
  return keyed.map(([, item]) => item);
}

function comparable(value) {
  if (value === null || value === undefined || value === "–") return null;
  if (typeof value === "number") return value;
  return { "∞": Infinity, "-∞": -Infinity }[value] ?? value.toLowerCase();
}

// A whole table from columns and rows, each row a list of values.
function dataTable(holder, { columns, rows }) {
  const valueOf = (row, name) => row[columns.findIndex((column) => column.name === name)];
  const body = el("tbody");
  const info = el("span", { class: "info", role: "status" });
  let [list, sort] = [null, ""];
  const show = () => {
    const asked = search.value.toLowerCase();
    const some = rows.filter((row) =>
      row.some((value) => String(value).toLowerCase().includes(asked)),
    );
    list?.stop();
    list = lazily(body, inOrder(some, sort, valueOf), (row) => dataRow(columns, row));
    info.textContent = rowsShown(some, rows);
    markSorted(head, sort);
  };
  const heads = sortHeads(columns, (name) => {
    sort = nextSort(sort, name);
    show();
  });
  const head = el("thead", {}, el("tr", {}, ...heads));
  const search = el("input", { type: "search", placeholder: "any word", on: { input: show } });
  const tools = el("div", { class: "tools" }, el("label", {}, "Search ", search), info);
  holder.append(tools, el("table", { class: "data", id: holder.dataset.table }, head, body));
  forPrinting(() => list.all());
  show();
}

function dataRow(columns, row) {
  const cells = columns.map((column, place) => {
    const [value, digits] = [row[place], column.name.startsWith("kl") ? 2 : 4];
    const shown = { text: clamped, number: (some) => number(some, digits) }[column.kind];
    const options = { class: `${column.kind} ${column.name}`, "data-label": column.label };
    return el("td", options, shown ? shown(value) : value);
  });
  return el("tr", {}, ...cells);
}

export function buildTables(tables) {
  for (const holder of $$("[data-table]")) {
    const table = tables[holder.dataset.table];
    const near = holder.closest("details");
    const build = () => {
      if (!$("table", holder)) dataTable(holder, table);
    };
    // Most families are never opened: their tables are built when they come near.
    whenNear(holder, 1000, build);
    near?.addEventListener("toggle", build, { once: true });
    forPrinting(build);
  }
}
