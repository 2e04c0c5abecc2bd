"use strict";
// Shows below each result of Sphinx's search the passages with the words, and marks the words. The texts are those
// of search_texts.js; splitQuery, stopwords and Stemmer are those of Sphinx's search.

const SHOWN_PASSAGES = 2;
const PASSAGE_LENGTH = 220;

let stemmer; // created when the page has loaded: Sphinx loads its scripts after this one

/** The words that are searched for, as a map from stems to words. */
function searchedWords() {
  const query = new URLSearchParams(location.search).get("q") ?? "";
  const words = splitQuery(query.toLowerCase()).filter((word) => !stopwords.has(word));
  return new Map(words.map((word) => [stemmer.stemWord(word), word]));
}

/** The words of a text that match: their position, their length, the stem that they match, and whether exactly. */
function findWords(text, searched) {
  const found = [];
  for (const match of text.matchAll(/[\p{Letter}\p{Number}_]+/gu)) {
    const word = match[0].toLowerCase();
    const stem = [...searched.keys()].find(
      (one) => stemmer.stemWord(word) === one || (one.length > 2 && word.includes(one)),
    );
    if (stem) found.push({ start: match.index, length: word.length, stem, exact: word === searched.get(stem) });
  }
  return found;
}

/** How well words match: the number of different stems, plus a little for those that match exactly. */
function matchQuality(words) {
  const different = (chosen) => new Set(chosen.map((word) => word.stem)).size;
  return different(words) + different(words.filter((word) => word.exact)) / 100;
}

/** The position of the word at which the best stretch of a text begins. */
function bestStretch(words) {
  let best = { start: 0, quality: -1 };
  for (const { start } of words) {
    const inside = words.filter((word) => word.start >= start && word.start < start + PASSAGE_LENGTH - 80);
    const quality = matchQuality(inside);
    if (quality > best.quality) best = { start, quality };
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

/** Add the best passages to a result. */
function addPassages(result, searched) {
  const link = result.querySelector("a");
  const address = new URL(link.href);
  const anchor = decodeURIComponent(address.hash.slice(1));
  const name = link.getAttribute("href").split("#")[0].replace(/\.html$/, "");
  const passages = (SEARCH_TEXTS[name] ?? []).filter((passage) => !anchor || passage.anchor === anchor);
  let shown = passages
    .map((passage, order) => {
      const words = findWords(passage.text, searched);
      return { passage, order, words, quality: matchQuality(words) };
    })
    .sort((a, b) => b.quality - a.quality || a.order - b.order);
  const matching = shown.filter(({ words }) => words.length).slice(0, SHOWN_PASSAGES);
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
  const searched = searchedWords();
  new MutationObserver((changes) => {
    for (const change of changes) {
      for (const node of change.addedNodes) if (node.matches?.("ul.search > li")) addPassages(node, searched);
    }
  }).observe(document.getElementById("search-results"), { childList: true, subtree: true });
});
