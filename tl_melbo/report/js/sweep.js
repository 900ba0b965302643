// The page of a sweep: all its figures.
import { $$ } from "./dom.js";
import { paint } from "./paint.js";

Promise.all($$(".plot").map((holder) => paint(holder))).then(() => {
  document.documentElement.dataset.ready = "";
});
