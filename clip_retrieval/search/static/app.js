"use strict";

const PAGE = 60; // results at a time
const MOST = 500;
const at = (id) => document.getElementById(id);
const [form, text, not, file, chip, grid, status, more, viewer] = ["form", "text", "not", "file", "chip", "grid", "status", "more", "viewer"].map(at);

let images = 0; // in the index
let upload = null; // the image file of the query
let results = [];
let count = PAGE;
let running = new AbortController();
let shown = 0; // index into results of the enlarged one

// The query is the part of the address behind #, so that the browser's buttons work; an uploaded image is not in it.
const read = () => new URLSearchParams(location.hash.slice(1));

function go(changes) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries({ q: text.value.trim(), not: not.value.trim(), like: read().get("like"), ...changes })) {
    if (value !== null && value !== "") query.set(name, value); // row 0 is a row
  }
  if (upload) query.set("file", upload.name);
  const hash = "#" + query;
  if (hash === (location.hash || "#")) search();
  else location.hash = hash;
}

async function search() {
  const query = read();
  if (!query.has("file")) upload = null;
  if (document.activeElement !== text || query.get("q")) text.value = query.get("q") || "";
  not.value = query.get("not") || "";
  showChip(query);
  running.abort();
  running = new AbortController();
  query.delete("file");
  query.set("k", count);
  grid.classList.add("busy");
  try {
    const reply = await fetch("/search?" + query, { signal: running.signal, method: upload ? "POST" : "GET", body: upload });
    const content = await reply.json();
    if (!reply.ok) throw new Error(content.error);
    show(content.results, query);
  } catch (error) {
    if (error.name === "AbortError") return;
    results = [];
    grid.replaceChildren();
    more.hidden = true;
    say(error instanceof TypeError ? "The server does not answer. Is search.py serve still running?" : error.message, true);
  }
  grid.classList.remove("busy");
}

function showChip(query) {
  const image = chip.querySelector("img");
  if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
  const like = query.get("like");
  chip.hidden = !upload && !like;
  if (chip.hidden) image.removeAttribute("src");
  else image.src = upload ? URL.createObjectURL(upload) : `/image/${encodeURIComponent(like)}/small`;
  text.placeholder = chip.hidden ? "Describe a photograph" : "Add a description";
}

function say(message, bad = false) {
  status.textContent = message;
  status.classList.toggle("bad", bad);
}

function show(found, query) {
  const grown = found.length > results.length && results.every((each, place) => each.row === found[place].row);
  const first = grown ? results.length : 0;
  results = found;
  const held = grid.contains(document.activeElement);
  if (!first) {
    grid.replaceChildren();
    scrollTo(0, 0);
  }
  grid.append(...found.slice(first).map((each, place) => card(each, first + place)));
  if (held && !first) grid.querySelector(".photo")?.focus();
  const number = images.toLocaleString();
  const searched = query.has("q") || query.has("like") || upload;
  if (!found.length) say("The index holds no images.");
  else if (searched) say(`The best ${found.length.toLocaleString()} of ${number} photographs`);
  else if (query.has("not")) say("Describe what to search for, too: “without” only leaves out.", true);
  else say(`Some of ${number} photographs. Describe one above, or choose one to see similar ones.`);
  more.hidden = found.length < count || count >= Math.min(MOST, images);
}

const id = (each) => each.row + (each.version && "-" + encodeURIComponent(each.version));
const source = (each, size) => `/image/${id(each)}/${size}`;
const name = (each) => each.name.split("/").pop();
const score = (each) => (each.score === null ? "" : each.score.toFixed(3));

function card(each, place) {
  const item = document.createElement("li");
  const ratio = Math.min(Math.max(each.width / each.height, 0.5), 2.5);
  item.style.flex = `${ratio} 1 calc(${ratio} * var(--row))`;
  item.style.aspectRatio = ratio;
  const photo = document.createElement("button");
  photo.className = each.score === null ? "photo plain" : "photo";
  photo.title = each.name;
  photo.setAttribute("aria-label", `Photographs similar to ${name(each)}`);
  const image = new Image();
  image.loading = "lazy";
  image.alt = "";
  image.onerror = () => photo.classList.add("gone");
  image.src = source(each, "small");
  const label = document.createElement("span");
  const value = document.createElement("b");
  value.textContent = score(each);
  const file = document.createElement("i");
  file.textContent = name(each);
  label.append(value, file);
  photo.append(image, label);
  photo.onclick = () => similar(each);
  const view = document.createElement("button");
  view.className = "view";
  view.tabIndex = -1; // the key v does the same
  view.setAttribute("aria-label", `Enlarge ${name(each)}`);
  view.innerHTML = '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M14 4h6v6M10 20H4v-6M20 4l-7 7M4 20l7-7"/></svg>';
  view.onclick = () => enlarge(place);
  item.append(photo, view);
  return item;
}

function similar(each) {
  upload = null;
  text.value = not.value = "";
  count = PAGE;
  go({ like: id(each) });
}

function use(chosen) {
  if (!chosen) return;
  upload = chosen;
  text.value = "";
  count = PAGE;
  go({ like: null });
}

function enlarge(place) {
  if (!results[place]) return;
  shown = place;
  const each = results[place];
  const image = viewer.querySelector("img");
  image.alt = name(each);
  image.src = source(each, "large");
  at("caption").textContent = [each.name, score(each)].filter(Boolean).join("  ·  ");
  if (!viewer.open) viewer.showModal();
}

form.onsubmit = (event) => {
  event.preventDefault();
  count = PAGE;
  go({});
};
file.onchange = () => {
  use(file.files[0]);
  file.value = "";
};
chip.querySelector("button").onclick = () => {
  upload = null;
  go({ like: null });
  text.focus();
};
more.onclick = () => {
  count = Math.min(count + PAGE, MOST);
  search();
};
at("similar").onclick = () => {
  viewer.close();
  similar(results[shown]);
};
viewer.querySelector(".close").onclick = () => viewer.close();
for (const button of viewer.querySelectorAll(".step")) button.onclick = () => enlarge(shown + Number(button.dataset.step));
viewer.onclick = (event) => {
  if (event.target === viewer || event.target.tagName === "IMG") viewer.close();
};
viewer.onclose = () => grid.children[shown]?.querySelector(".photo").focus();
addEventListener("hashchange", () => {
  count = PAGE;
  search();
});

// drop or paste an image
let depth = 0;
const holdsFile = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragenter", (event) => {
  if (holdsFile(event) && ++depth === 1) at("drop").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (holdsFile(event) && --depth <= 0) at("drop").hidden = true;
});
addEventListener("dragover", (event) => holdsFile(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (!holdsFile(event)) return;
  event.preventDefault();
  depth = 0;
  at("drop").hidden = true;
  use(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) use(event.clipboardData.files[0]);
});

// keys
function neighbour(item, key) {
  const items = [...grid.children];
  const place = items.indexOf(item);
  if (key === "ArrowLeft") return items[place - 1];
  if (key === "ArrowRight") return items[place + 1];
  const middle = item.offsetLeft + item.offsetWidth / 2;
  const down = key === "ArrowDown";
  const other = items.filter((each) => (down ? each.offsetTop > item.offsetTop : each.offsetTop < item.offsetTop));
  const row = other.filter((each) => each.offsetTop === (down ? other[0] : other[other.length - 1]).offsetTop);
  const distance = (each) => Math.abs(each.offsetLeft + each.offsetWidth / 2 - middle);
  return row.sort((a, b) => distance(a) - distance(b))[0];
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const arrow = event.key.startsWith("Arrow");
  if (viewer.open) {
    if (event.key === "ArrowLeft") enlarge(shown - 1);
    if (event.key === "ArrowRight") enlarge(shown + 1);
    return;
  }
  const item = document.activeElement.closest("#grid li");
  const typing = document.activeElement.tagName === "INPUT";
  if (event.key === "/" && !typing) {
    event.preventDefault();
    text.focus();
    text.select();
  } else if (event.key === "v" && item) {
    enlarge([...grid.children].indexOf(item));
  } else if (arrow && item) {
    event.preventDefault();
    neighbour(item, event.key)?.querySelector(".photo").focus();
  } else if (event.key === "ArrowDown" && (!typing || document.activeElement === text)) {
    event.preventDefault();
    grid.querySelector(".photo")?.focus();
  } else if (event.key === "Escape" && item) {
    text.focus();
  }
});

fetch("/info")
  .then((reply) => reply.json())
  .then((info) => {
    images = info.images;
    at("folder").textContent = info.folder;
    document.title = `${info.folder} – photo search`;
    at("folder").title = `${images.toLocaleString()} photographs, model ${info.model}`;
  })
  .finally(search);
