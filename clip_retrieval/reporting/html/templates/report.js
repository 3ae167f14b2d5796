"use strict";
const byId = (id) => document.getElementById(id);

// Each picture is embedded once; its copies refer to it.
for (const image of document.querySelectorAll("img[data-of]")) image.src = byId(image.dataset.of).src;

// Light, dark, or as the system.
const themes = ["auto", "light", "dark"];
const setTheme = (theme) => {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
  try { localStorage.setItem("theme", theme); } catch { /* a file may have no storage */ }
};
let theme = "auto";
try { theme = localStorage.getItem("theme") ?? theme; } catch { /* the same */ }
setTheme(themes.includes(theme) ? theme : "auto");
byId("theme").addEventListener("click", () => {
  setTheme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length]);
});

// Search and filters: a card is shown if it has every word, and the chosen values.
const cards = [...byId("cards").children].map((card) => {
  const pictures = [...card.querySelectorAll("img")].map((image) => `${image.alt} ${image.title}`);
  return { card, text: [card.textContent, ...pictures].join(" ").toLowerCase() };
});
const search = byId("search");
const filter = () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const [direction, outcome, group] = ["direction", "outcome", "group"].map((id) => byId(id).value);
  let shown = 0;
  for (const { card, text } of cards) {
    const data = card.dataset;
    card.hidden = !(
      (!direction || data.direction === direction) &&
      (!outcome || data.outcome === outcome) &&
      (!group || data.groups.split(" ").includes(group)) &&
      words.every((word) => text.includes(word))
    );
    shown += !card.hidden;
  }
  byId("count").textContent = `${shown} of ${cards.length} queries`;
};
for (const id of ["search", "direction", "outcome", "group"]) byId(id).addEventListener("input", filter);
filter();

// Keys.
const move = (step) => {
  const visible = cards.map(({ card }) => card).filter((card) => !card.hidden);
  const next = visible[visible.indexOf(document.activeElement.closest("article")) + step] ?? visible[0];
  next?.focus({ preventScroll: true });
  next?.scrollIntoView({ block: "center" });
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const isTyping = event.target.matches("input, select");
  if (event.key === "Escape" && event.target === search) {
    search.value = "";
    filter();
  } else if (event.key === "/" && !isTyping) {
    event.preventDefault();
    search.focus();
  } else if (event.key === "j" && !isTyping) move(1);
  else if (event.key === "k" && !isTyping) move(-1);
});
