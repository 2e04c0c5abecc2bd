"use strict";
// Shows below each result of Sphinx's search the passages with the words, and marks the words. The texts are those
// of search_texts.js; splitQuery, stopwords and Stemmer are those of Sphinx's search.

const SHOWN_PASSAGES = 2;
const PASSAGE_LENGTH = 220;

let stemmer; // created when the page has loaded: Sphinx loads its scripts after this one

/** The stems of the words that are searched for. */
function searchedStems() {
  const query = new URLSearchParams(location.search).get("q") ?? "";
  const words = splitQuery(query.toLowerCase()).filter((word) => !stopwords.has(word));
  return [...new Set(words.map((word) => stemmer.stemWord(word)))];
}

/** The words of a text that match: their position, their length and the stem that they match. */
function findWords(text, stems) {
  const found = [];
  for (const match of text.matchAll(/[\p{Letter}\p{Number}_]+/gu)) {
    const word = match[0].toLowerCase();
    const stem = stems.find((one) => stemmer.stemWord(word) === one || (one.length > 2 && word.includes(one)));
    if (stem) found.push({ start: match.index, length: word.length, stem });
  }
  return found;
}

/** The stretch of a text that begins shortly before a word and contains most of the different stems. */
function bestStretch(words) {
  let best = { start: 0, count: -1 };
  for (const { start } of words) {
    const inside = words.filter((word) => word.start >= start && word.start < start + PASSAGE_LENGTH - 80);
    const count = new Set(inside.map((word) => word.stem)).size;
    if (count > best.count) best = { start, count };
  }
  return best.start;
}

/** A paragraph with a part of a text, in which the words are marked. */
function excerpt(text, words) {
  const near = Math.max(bestStretch(words) - 80, 0);
  const from = near && text.indexOf(" ", near) + 1;
  const wanted = from + PASSAGE_LENGTH;
  const to = wanted >= text.length ? text.length : Math.max(text.lastIndexOf(" ", wanted), from + 1);
  const paragraph = document.createElement("p");
  paragraph.className = "context";
  let position = from;
  const add = (end) => paragraph.append(text.slice(position, end));
  if (from) paragraph.append("… ");
  for (const { start, length } of words) {
    if (start < position || start + length > to) continue;
    add(start);
    const mark = paragraph.appendChild(document.createElement("mark"));
    mark.textContent = text.slice(start, start + length);
    position = start + length;
  }
  add(to);
  if (to < text.length) paragraph.append(" …");
  return paragraph;
}

/** Add the passages to a result: those with most of the different words, in the order of the page. */
function addPassages(result, stems) {
  const link = result.querySelector("a");
  const address = new URL(link.href);
  const anchor = decodeURIComponent(address.hash.slice(1));
  const name = link.getAttribute("href").split("#")[0].replace(/\.html$/, "");
  const passages = (SEARCH_TEXTS[name] ?? []).filter((passage) => !anchor || passage.anchor === anchor);
  let shown = passages
    .map((passage, order) => {
      const words = findWords(passage.text, stems);
      return { passage, order, words, count: new Set(words.map((word) => word.stem)).size };
    })
    .sort((a, b) => b.count - a.count || a.order - b.order);
  const matching = shown.filter(({ count }) => count).slice(0, SHOWN_PASSAGES);
  shown = matching.length ? matching : shown.slice(0, 1); // the words may be in the title only
  for (const { passage, words } of shown) {
    const paragraph = excerpt(passage.text, words);
    if (!anchor && passage.title) {
      const title = document.createElement("a");
      title.href = `${link.getAttribute("href")}#${encodeURIComponent(passage.anchor)}`;
      title.textContent = passage.title;
      paragraph.prepend(title, ": ");
    }
    result.append(paragraph);
  }
}

document.addEventListener("DOMContentLoaded", () => {
  stemmer = new Stemmer();
  const stems = searchedStems();
  new MutationObserver((changes) => {
    for (const change of changes) {
      for (const node of change.addedNodes) if (node.matches?.("ul.search > li")) addPassages(node, stems);
    }
  }).observe(document.getElementById("search-results"), { childList: true, subtree: true });
});
