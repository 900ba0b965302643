// The page begins: parts in their order, links, keys, paper.
import { $, $$, el, prose, sampledPart } from "./dom.js";
import { data, manyPrompts, unsteeredTexts } from "./data.js";
import { begin, change, follow } from "./state.js";
import { beginNotes } from "./notes.js";
import { buildEverything, buildTables } from "./tables.js";
import { beginVectors, goToRow } from "./vectors.js";
import { beginCards, goToCard, whilePrinting } from "./cards.js";
import { beginFilters, beginScale } from "./filters.js";
import { beginCompare } from "./compare.js";
import { beginFigures, drawAll } from "./figures.js";

function unsteeredParts() {
  data.prompts.forEach((prompt, place) => {
    const [greedy, ...samples] = unsteeredTexts(place);
    if (greedy === undefined) return;
    const caption = manyPrompts ? el("figcaption", { text: prompt }) : null;
    const text = el("blockquote", {}, prose(greedy ?? "–"));
    $("#unsteered").append(el("figure", { class: "text" }, caption, text, sampledPart(samples)));
  });
}

// "#v4", "#b2", or a part of the page.
function targetOf(anchor) {
  if (anchor.startsWith("v") && goToRow(anchor.slice(1))) return document.getElementById(anchor);
  return goToCard(anchor) ?? document.getElementById(anchor);
}

function goTo(anchor) {
  const target = anchor ? targetOf(anchor) : null;
  for (const other of $$(".target")) other.classList.remove("target");
  if (!target) return;
  target.classList.add("target");
  for (let around = target.parentElement; around; around = around.parentElement)
    if (around.tagName === "DETAILS") around.open = true;
  target.scrollIntoView({ block: "start" });
  // Tables that are built on the way push it down; a reader who has scrolled on is left alone.
  const there = scrollY;
  setTimeout(() => scrollY === there && target.scrollIntoView({ block: "start" }), 100);
}

function jump(anchor, changes = {}) {
  change({ ...changes, anchor, cmp: false });
  goTo(anchor);
  // The keyboard goes on from there.
  const target = document.getElementById(anchor);
  const first = target && ($("a, button", target) ?? target);
  first?.focus({ preventScroll: true });
}

function followLinks() {
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.('a[href^="#"]');
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    jump(link.getAttribute("href").slice(1));
  });
  // Back and forth: only where the place changed, so that nothing jumps.
  let before = null;
  follow((now, restored) => {
    const moved = now.anchor !== before;
    before = now.anchor;
    if (restored && moved) goTo(now.anchor);
  });
}

function printWhole() {
  const opened = [];
  const before = () => {
    whilePrinting(true);
    buildEverything();
    drawAll();
    for (const each of $$("main details:not([open])")) {
      if (each.closest("#settings, .plain")) continue;
      each.open = true;
      opened.push(each);
    }
  };
  const after = () => {
    for (const each of opened.splice(0)) each.open = false;
    setTimeout(() => whilePrinting(false));
  };
  addEventListener("beforeprint", before);
  addEventListener("afterprint", after);
  matchMedia("print").addEventListener("change", ({ matches }) => (matches ? before() : after()));
}

unsteeredParts();
beginNotes();
beginFilters();
beginScale();
beginVectors();
beginCards(jump);
beginCompare();
buildTables(data.tables);
beginFigures();
followLinks();
printWhole();
begin();
document.documentElement.dataset.ready = String(Math.round(performance.now()));
