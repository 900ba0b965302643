// Which words do two texts have in common? The longest common subsequence, found on demand.
import { el, pieces } from "./dom.js";

const MOST = 1200;

export function words(text) {
  return text.match(/[\p{L}\p{N}'’_]+\s*|[^\p{L}\p{N}'’_\s]\s*|\s+/gu) ?? [];
}

// Of each word of either text, whether the other has it, too, at that place.
function common(a, b) {
  const [one, other] = [a.slice(0, MOST), b.slice(0, MOST)].map((some) =>
    some.map((word) => word.trim()),
  );
  const wide = other.length + 1;
  const lengths = new Uint16Array((one.length + 1) * wide);
  for (let i = one.length - 1; i >= 0; i--) {
    for (let j = other.length - 1; j >= 0; j--) {
      const [down, right] = [lengths[(i + 1) * wide + j], lengths[i * wide + j + 1]];
      lengths[i * wide + j] =
        one[i] === other[j] ? lengths[(i + 1) * wide + j + 1] + 1 : Math.max(down, right);
    }
  }
  // What lies beyond is not compared, and so not marked.
  const [inA, inB] = [a, b].map((some) => some.map((_, place) => place >= MOST));
  for (let i = 0, j = 0; i < one.length && j < other.length;) {
    if (one[i] === other[j]) {
      inA[i++] = inB[j++] = true;
    } else if (lengths[(i + 1) * wide + j] >= lengths[i * wide + j + 1]) i++;
    else j++;
  }
  return [inA, inB];
}

// A text with what the other lacks marked.
export function marked(text, other) {
  const own = words(text);
  const [shared] = common(own, words(other));
  const holder = el("div", {
    class: pieces(text).some(({ mono }) => mono) ? "words code" : "words",
  });
  let run = "";
  let isShared = true;
  const close = () => {
    if (run) holder.append(isShared ? run : el("mark", { text: run }));
    run = "";
  };
  own.forEach((word, place) => {
    if (shared[place] !== isShared) close();
    isShared = shared[place];
    run += word;
  });
  close();
  if (own.length > MOST)
    holder.append(el("span", { class: "soft", text: ` [compared: the first ${MOST} words]` }));
  return holder;
}
