"use strict";
// The page itself. Text only ever enters it as text: prompts are foreign.

const run = received.run, SVG = "http://www.w3.org/2000/svg";
const BONES = ["#ff5d5d", "#ffb454", "#ffe066", "#7bd88f", "#4cc9f0", "#9d8df1", "#f78fb3"];
const GAP = 16, SMALL = 150; // pixels: between cards, and the width below which they have no text
const SETTLED = 120; // milliseconds after which a card that is still in view gets its image and labels
const MADE_AT_ONCE = 48; // cards in one frame of a scroll: large windows fill over a few
const KEPT_DETAILS = 200; // groups of details in memory
const LOADED_AT_ONCE = 4;
const ASKED_AGAIN = 15000; // milliseconds between two looks at whether a run in progress has gone on
const MOST_BARS = 60; // classes of a chart
const MOST_LINES = 12; // classes of a legend that is folded
const root = document.documentElement, by = id => document.getElementById(id);
const grid = by("grid"), viewer = by("viewer"), frame = by("frame");
const leftOut = new Map(received.leftOut), hasDoubts = Boolean(run.doubtful || run.missing || leftOut.size);
const WORDS = hasDoubts ? 92 : 74; // pixels of a card's text: a third line where some cards say what is wrong with them
const quantities = quantitiesOf(run.figures), marks = new Map();
let everywhere = run.shown, inSet = run.shown; // samples that show each word, and those of them in the data set
let wish = { ...EMPTY }, layersOn = [], samples = [], shown = [], first = 0, opened = null, wanted = "";
let layout = layoutOf(1000, 232, GAP, WORDS, 0), cards = new Map(), settling = 0, filled = false;

function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}
function button(text, act, name = "chip") {
  const element = make("button", name, text);
  element.type = "button";
  if (act) element.addEventListener("click", act);
  return element;
}
function draw(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
function picture(path, name, alt) {
  const image = make("img", name);
  image.decoding = "async";
  image.draggable = false;
  image.alt = alt;
  image.src = path;
  return image;
}
function count(number) { return number.toLocaleString("en"); }
function several(number, one, many = `${one}s`) { return `${count(number)} ${number === 1 ? one : many}`; }
function portion(number, whole) { return number === whole ? several(whole, "sample") : `${count(number)} of ${several(whole, "sample")}`; }
function percent(score) { return `${Math.round(score * 100)} %`; }
function spotted(tag, name, colour, text) {
  const element = make(tag, name), dot = make("span", "dot");
  dot.style.background = colour;
  element.append(dot, text);
  return element;
}
function dotted(tag, name, word) { return spotted(tag, name, run.colours[word], run.words[word]); }

// ---- what a browser remembers

const STORE = "datasetdm gallery";
function remembered(name) {
  try { return JSON.parse(localStorage.getItem(`${STORE} ${name}`)); } catch { return null; }
}
function remember(name, value) {
  try { localStorage.setItem(`${STORE} ${name}`, JSON.stringify(value)); } catch { /* a page without a store forgets */ }
}
function keepAddress() {
  const names = run.layers.map(layer => layer.name).filter(name => layersOn.includes(name));
  const address = addressOf(wish, names, opened ? opened.id : "", run.words);
  try { history.replaceState(null, "", address); } catch { /* a page that may not change its address */ }
}

// ---- data that lies in scripts beside the page

const asked = new Set();
function load(path, isCompared = false, onFault = fault) {
  if (asked.has(path)) return Promise.resolve(true);
  asked.add(path);
  return new Promise(done => {
    const script = make("script");
    if (isCompared) script.dataset.compared = "yes";
    script.onload = () => { script.remove(); done(true); };
    script.onerror = () => { script.remove(); onFault(path); done(false); };
    script.src = path;
    document.body.append(script);
  });
}
const troubles = new Map(); // what went wrong, by what it happened to
function trouble(about, text) {
  if (text) troubles.set(about, text);
  else troubles.delete(about);
  summarise();
}
function fault(path) { trouble("files", `${path} could not be read; audit says more`); }
function named(folder, number) { return `${folder}/${String(number).padStart(6, "0")}.js`; }

async function loadPages() {
  const parts = new Array(run.pages.length), waiting = run.pages.map((page, k) => [k, page[0]]);
  let last = 0, isMixed = false;
  const work = async () => {
    for (let next = waiting.shift(); next; next = waiting.shift()) {
      const [k, number] = next;
      if (!(await load(named("pages", number)))) continue;
      parts[k] = samplesOf(received.pages.get(number), leftOut);
      isMixed ||= parts[k].length !== run.pages[k][1];
      received.pages.delete(number);
      if (performance.now() - last > 400 || !filled) {
        const end = parts.findIndex(part => !part);
        samples = parts.slice(0, end < 0 ? parts.length : end).flat();
        if (samples.length) refresh(true);
        last = performance.now();
      }
    }
  };
  await Promise.all(Array.from({ length: LOADED_AT_ONCE }, work));
  samples = parts.filter(Boolean).flat();
  filled = true;
  countWords();
  refresh(true);
  if (isMixed) readAgain();
}
// The page of a run in progress was written anew between its scripts: those of one time are read together.
function readAgain() {
  if (performance.getEntriesByType("navigation")[0]?.type !== "reload") location.reload();
  else tellNews("Read the page again");
}
function tellNews(text) {
  by("newer").textContent = text;
  by("newer").hidden = !text;
}
async function lookForNews() {
  if (document.hidden || !received.run.is_in_progress) return;
  const path = `run.js?${Date.now()}`; // another address, or the browser would give what it has
  await load(path, false, () => {});
  asked.delete(path);
  if (received.run !== run) tellNews(newsOf(run, received.run));
}

function detailsOf(sample) {
  const number = Math.floor(sample.index / run.group);
  if (!received.details.has(number)) {
    load(named("details", number));
    return null;
  }
  return received.details.get(number).get(sample.index) ?? {};
}
received.on = (kind, number) => {
  if (kind !== "details") return;
  for (const old of [...received.details.keys()].slice(0, -KEPT_DETAILS)) {
    received.details.delete(old);
    asked.delete(named("details", old));
  }
  for (const [place, element] of cards) if (Math.floor(shown[place].index / run.group) === number) overlay(element, shown[place]);
  if (opened && Math.floor(opened.index / run.group) === number) drawOpened();
};

// ---- pictures and what is drawn over them

function placeOf(sample) { return sample.aside ? "../doubtful/" : "../"; }
function imageOf(sample, alt = "") { return picture(`${placeOf(sample)}images/${sample.id}.${run.format}`, "image", alt); }
function file(layer, sample) {
  return [picture((layer.is_drawn ? "" : placeOf(sample)) + layer.file.replace("ID", sample.id), `layer ${layer.drawing}`, "")];
}
function canvas(sample) { return draw("svg", { viewBox: `0 0 ${sample.sides[1]} ${sample.sides[0]}`, class: "layer", "aria-hidden": "true" }); }

const DRAWINGS = {
  map: file,
  picture: file,
  uncertainty: file,
  outlines: (layer, sample, values) => {
    const svg = canvas(sample), before = new Map();
    for (const [word, score, path] of correctedThings(layer, sample, values)) {
      const number = before.get(word) ?? 0, colour = shade(run.colours[run.words.indexOf(word)], number);
      before.set(word, number + 1);
      svg.append(draw("path", { class: "halo", d: path }));
      const shape = draw("path", { class: "shape", d: path, fill: colour, stroke: colour });
      shape.told = `${word} ${percent(score)}`;
      svg.append(shape);
    }
    return [svg];
  },
  skeletons: (layer, sample, values) => {
    const svg = canvas(sample);
    for (const joints of values) {
      const at = k => joints.slice(3 * k, 3 * k + 3);
      const bones = layer.limbs.map(([a, b]) => [...at(a), ...at(b)]).filter(bone => bone[2] && bone[5]);
      for (const [x, y, , u, v] of bones) svg.append(draw("line", { class: "bone-halo", x1: x, y1: y, x2: u, y2: v }));
      bones.forEach(([x, y, , u, v], k) => svg.append(draw("line", { class: "bone", x1: x, y1: y, x2: u, y2: v, stroke: BONES[k % BONES.length] })));
      for (let k = 0; 3 * k < joints.length; k++) {
        const [x, y, seen] = at(k);
        if (seen) svg.append(draw("circle", { class: seen === 1 ? "joint hidden" : "joint", cx: x, cy: y, r: Math.max(...sample.sides) / 95 }));
      }
    }
    return [svg];
  },
};
function drawn(layer, sample) {
  const isFile = Boolean(layer.file), values = isFile ? null : detailsOf(sample)?.[layer.name];
  if (!isFile && !values) return [];
  const elements = DRAWINGS[layer.drawing](layer, sample, values);
  for (const element of elements) element.dataset.layer = layer.name;
  return elements;
}
function active() { return run.layers.filter(layer => layersOn.includes(layer.name)); }
function overlay(element, sample) {
  const box = element.querySelector(".stack");
  if (element === frame && beside === "difference") return;
  for (const old of box.querySelectorAll(".layer")) old.remove();
  for (const layer of active()) box.append(...drawn(layer, sample));
  if (correctionOf(sample).ignored.length) box.append(unjudged(sample));
}
function thumbnail(sample) {
  const place = thumbnailOf(sample, run.sheet), { side, columns, rows } = run.sheet, element = make("span", "thumbnail");
  const longest = Math.max(place.width, place.height), share = (value, rest) => (rest ? `${(100 * value) / rest}%` : "0");
  element.style.width = `${(100 * place.width) / longest}%`;
  element.style.height = `${(100 * place.height) / longest}%`;
  element.style.backgroundImage = `url("sheets/${String(place.sheet).padStart(6, "0")}.jpg")`;
  element.style.backgroundSize = `${(100 * columns * side) / place.width}% ${(100 * rows * side) / place.height}%`;
  element.style.backgroundPosition = `${share(place.x, columns * side - place.width)} ${share(place.y, rows * side - place.height)}`;
  return element;
}

// ---- corrections of labels, where the page is served: instances removed or renamed, regions that nobody can judge

const corrections = new Map(), uncorrected = new Map(); // by id; those that are not sent yet
let isMarking = false, corner = null; // of a region that is being drawn
function correctionOf(sample) { return { removed: [], renamed: [], ignored: [], ...corrections.get(sample.id) }; }
function isOf(layer, place) { return ([label, other]) => label === layer.label && other === place; }
// The instances of a layer as they were corrected: class, score and outline.
function correctedThings(layer, sample, values) {
  const { removed, renamed } = correctionOf(sample);
  return values
    .map(([word, score, path], place) => [renamed.find(isOf(layer, place))?.[2] ?? word, score, path, place])
    .filter(thing => !removed.some(isOf(layer, thing[3])));
}
function unjudged(sample, boxes = correctionOf(sample).ignored) {
  const svg = canvas(sample);
  for (const [x0, y0, x1, y1] of boxes) svg.append(draw("rect", { class: "unjudged", x: x0, y: y0, width: x1 - x0, height: y1 - y0 }));
  return svg;
}
function correct(change) {
  changes++;
  const found = { ...correctionOf(opened), ...change };
  corrections.set(opened.id, found);
  uncorrected.set(opened.id, found);
  send();
  for (const [place, element] of cards) if (shown[place] === opened) overlay(element, opened);
  drawOpened();
}
function correctingRow(name, isRemoved, ...actions) {
  const row = make("div", "correcting");
  row.append(make("span", isRemoved ? "removed" : "", name), ...actions);
  return row;
}
function showCorrecting() {
  const rows = [], found = correctionOf(opened), details = detailsOf(opened) ?? {};
  for (const layer of run.layers.filter(each => each.drawing === "outlines" && details[each.name])) {
    details[layer.name].forEach(([word, score], place) => {
      const isThis = isOf(layer, place), isRemoved = found.removed.some(isThis), others = list => list.filter(each => !isThis(each));
      const remove = button(isRemoved ? "Restore" : "Delete", () => correct({ removed: isRemoved ? others(found.removed) : [...found.removed, [layer.label, place]] }));
      const select = make("select");
      for (const name of new Set(Object.values(layer.classes).map(number => run.words[number]))) select.append(new Option(name, name));
      select.value = found.renamed.find(isThis)?.[2] ?? word;
      select.setAttribute("aria-label", `Class of instance ${place + 1}`);
      select.addEventListener("change", () => correct({ renamed: [...others(found.renamed), ...(select.value === word ? [] : [[layer.label, place, select.value]])] }));
      rows.push(correctingRow(`${place + 1}: ${word} ${percent(score)}`, isRemoved, select, remove));
    });
  }
  for (const box of found.ignored) rows.push(correctingRow(`Ignored: ${box.join(", ")}`, false, button("Remove", () => correct({ ignored: found.ignored.filter(each => each !== box) }))));
  const region = button("Ignore a region", () => { isMarking = !isMarking; showCorrecting(); });
  press(region, isMarking);
  region.title = "Then drag a box over what nobody can judge";
  frame.classList.toggle("marking", isMarking);
  by("correcting").hidden = !served;
  by("correcting").replaceChildren(...rows, region);
}
function placeIn(event) {
  const box = frame.firstChild.getBoundingClientRect(), [height, width] = opened.sides, within = (value, most) => Math.round(Math.min(Math.max(value, 0), most));
  return [within((event.clientX - box.left) / box.width * width, width), within((event.clientY - box.top) / box.height * height, height)];
}
function regionTo(event) {
  const [x, y] = placeIn(event);
  return [Math.min(corner[0], x), Math.min(corner[1], y), Math.max(corner[0], x), Math.max(corner[1], y)];
}
function endRegion(event) {
  const box = regionTo(event);
  leaveMarking();
  if (box[0] < box[2] && box[1] < box[3]) correct({ ignored: [...correctionOf(opened).ignored, box] });
}
function leaveMarking() {
  frame.firstChild?.querySelector(".layer.drawing")?.remove();
  corner = null;
  isMarking = false;
  showCorrecting();
}

// ---- review: marks of samples, kept by the browser or, where the page is served, written into the run folder

let served = null; // what the server tells of the run, null where the page was opened from a disk
const unsent = new Map();
let isSending = false, changes = 0; // marks that were set or removed here

async function askServer() {
  if (!location.protocol.startsWith("http")) return null;
  try {
    const answer = await fetch("../review");
    if (answer.ok && answer.headers.get("Content-Type") === "application/json") return await answer.json();
  } catch { /* served by something that only gives out files */ }
  return null;
}
async function startReview() {
  served = await askServer();
  startComparing();
  takeMarks(served ? served.marks : Object.entries(remembered(run.key) ?? {}));
  takeCorrections();
  if (opened) open(opened);
}
function takeMarks(found) {
  marks.clear();
  for (const [id, mark] of found) marks.set(id, mark);
  showReview();
  if (wish.flags.some(flag => ["good", "bad", "unmarked"].includes(flag))) refresh();
  for (const [place, element] of cards) showMark(element, shown[place]);
}
function takeCorrections() {
  corrections.clear();
  for (const [id, found] of Object.entries(served?.corrections ?? {})) corrections.set(id, found);
  for (const [place, element] of cards) overlay(element, shown[place]);
}
// Takes over the marks of others who review the same run, unless one was set here in the meantime.
async function renewMarks() {
  const before = changes, answer = served && (await askServer());
  if (!answer || changes !== before || isSending || unsent.size || uncorrected.size) return;
  served.corrections = answer.corrections;
  takeMarks(answer.marks);
  takeCorrections();
  if (opened) {
    showOpenedMark();
    drawOpened();
  }
}
function mark(sample, name) {
  changes++;
  const now = marks.get(sample.id) === name ? "" : name;
  if (now) marks.set(sample.id, now);
  else marks.delete(sample.id);
  if (served) {
    unsent.set(sample.id, now);
    send();
  } else remember(run.key, Object.fromEntries(marks));
  showReview();
  for (const [place, element] of cards) if (shown[place] === sample) showMark(element, sample);
  if (opened === sample) showOpenedMark();
}
async function send() {
  if (isSending) return;
  isSending = true;
  while (unsent.size || uncorrected.size) {
    const some = [...unsent].slice(0, 5000), corrected = [...uncorrected];
    for (const [id] of some) unsent.delete(id);
    uncorrected.clear();
    const before = Object.fromEntries(corrected.map(([id]) => [id, served.corrections[id] ?? {}])); // so that what others correct stays
    try {
      const body = JSON.stringify({ marks: some, corrections: Object.fromEntries(corrected), before });
      const answer = await fetch("../review", { method: "PUT", body, headers: { "Content-Type": "application/json" } });
      if (!answer.ok) throw new Error(String(answer.status));
      Object.assign(served.corrections, Object.fromEntries(corrected));
      trouble("marks", "");
    } catch {
      for (const [id, name] of some) if (!unsent.has(id)) unsent.set(id, name);
      for (const [id, found] of corrected) if (!uncorrected.has(id)) uncorrected.set(id, found);
      trouble("marks", `${several(unsent.size + uncorrected.size, "mark")} could not be written; the next one tries again`);
      break;
    }
  }
  isSending = false;
}
function showMark(element, sample) {
  element.querySelector(".mark")?.remove();
  const name = marks.get(sample.id);
  if (name) element.prepend(make("span", `mark ${name}`, name));
}
function showOpenedMark() {
  for (const element of viewer.querySelectorAll("[data-mark]")) press(element, marks.get(opened.id) === element.dataset.mark);
}
function showReview() {
  for (const name of ["good", "bad"]) {
    const number = [...marks.values()].filter(other => other === name).length;
    by(`save-${name}`).hidden = !number;
    by(`save-${name}`).textContent = `Save ${name}.txt (${count(number)})`;
  }
  by("dropping").hidden = by("save-bad").hidden;
  by("dropping").textContent = `python -m datasetdm_fast.drop ${quoted(folderOfRun())} --file ${quoted(listOfBad())}`;
}
function save(name) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([listOf(marks, name)], { type: "text/plain" }));
  link.download = `${name}.txt`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
function reviewButtons() {
  for (const name of ["good", "bad"]) {
    const element = button("", () => save(name));
    element.id = `save-${name}`;
    element.title = `The ids of the samples marked ${name}, one a line`;
    by("review").append(element);
  }
  by("review").append(make("code"));
  by("review").lastChild.id = "dropping";
  by("review").lastChild.title = "This line takes the samples marked bad out of the run; the command restore brings them back";
  for (const element of viewer.querySelectorAll("[data-mark]")) element.addEventListener("click", () => mark(opened, element.dataset.mark));
}

// ---- another run beside this one: its source, or one of the same plan

let beside = ""; // how the opened sample is compared: "two" pictures, their "difference", or not at all
async function startComparing() {
  if (!served?.against || !(await load(`${served.against}gallery/run.js`, true))) return;
  compared.on = () => { if (opened && beside) open(opened); };
  by("beside").hidden = false;
  const name = decodeURIComponent(served.against.split("/").at(-2));
  served.other = name;
  by("beside").append(...[["two", `Beside ${name}`], ["difference", "Difference"]].map(([way, text]) => {
    const element = button(text, () => {
      beside = beside === way ? "" : way;
      for (const each of by("beside").children) press(each, each.dataset.way === beside);
      open(opened);
    });
    element.dataset.way = way;
    press(element, false);
    return element;
  }));
}
// A file of the other run, which may have set the sample aside.
function comparedPicture(file, name, alt) {
  const image = picture(served.against + file, name, alt);
  image.addEventListener("error", () => { image.src = `${served.against}doubtful/${file}`; }, { once: true });
  return image;
}
function comparedImage(sample) {
  return comparedPicture(`images/${idOf(sample.source)}.${compared.run.format}`, "image compared", `The same in the other run`);
}
// The other run's picture of a sample, with the layers that both runs have.
function comparedStack(sample) {
  const box = make("span", "stack"), number = Math.floor(sample.source / compared.run.group);
  box.append(comparedImage(sample));
  for (const layer of active().map(each => compared.run.layers.find(other => other.name === each.name)).filter(Boolean)) {
    if (layer.file) {
      box.append(comparedPicture((layer.is_drawn ? "gallery/" : "") + layer.file.replace("ID", idOf(sample.source)), `layer ${layer.drawing}`, ""));
      continue;
    }
    if (!compared.details.has(number)) load(`${served.against}gallery/${named("details", number)}`, true);
    const values = compared.details.get(number)?.get(sample.source)?.[layer.name];
    if (values) box.append(...DRAWINGS[layer.drawing](layer, sample, values));
  }
  return box;
}

// ---- values under the cursor, where the page is served: a browser lets no page read the pixels of files on a disk

const PIXELS = new Map(); // path -> pixels of a file, or that they are on their way
const KEPT_PIXELS = 40;
let pointed = null; // the last move over the picture: pixels may arrive while the cursor rests
async function pixelsAt(path) {
  PIXELS.set(path, null);
  for (const old of [...PIXELS.keys()].slice(0, -KEPT_PIXELS)) PIXELS.delete(old);
  try { PIXELS.set(path, await pixelsOf(await (await fetch(path)).arrayBuffer())); } catch { PIXELS.set(path, null); }
  if (pointed && opened) point(pointed);
}
function valueAt(layer, sample, x, y) {
  const path = placeOf(sample) + layer.file.replace("ID", sample.id);
  if (!PIXELS.has(path)) pixelsAt(path);
  const pixels = PIXELS.get(path);
  if (!pixels || x >= pixels.width || y >= pixels.height) return "";
  const value = pixels.at(x, y);
  if (layer.drawing === "map") return `${layer.title}: ${run.words[layer.classes[value]] ?? (value === 255 ? "ignored" : value)}`;
  if (layer.drawing === "uncertainty") return `sure by ${percent(value / 255)}`;
  return layer.steps ? `${(value / layer.steps).toFixed(2)} ${layer.unit}` : "";
}

// ---- the grid: only the cards in view are part of the page

function card(place) {
  const sample = shown[place], element = button(undefined, () => open(sample), "card"), box = make("span", "stack"), words = make("span", "words");
  const item = make("div");
  element.dataset.id = sample.id;
  item.setAttribute("role", "listitem");
  item.setAttribute("aria-setsize", shown.length);
  item.setAttribute("aria-posinset", place + 1);
  item.append(element);
  if (run.sheet) box.append(thumbnail(sample));
  const value = wish.sort === "number" || wish.sort === "seed" ? null : quantities.get(wish.sort)?.(sample);
  const told = [sample.id, sample.picture || `seed ${sample.seed}`, ...(value == null ? [] : [`${wish.sort} ${short(value)}`])].join(" · ");
  words.append(make("span", sample.prompt ? "prompt" : "prompt told", sample.prompt || "No prompt"), make("span", "told", told));
  const doubt = sample.reasons.length ? `Doubtful: ${sample.reasons.join("; ")}` : sample.missing.length ? `Not in the labels: ${sample.missing.map(word => run.words[word]).join(", ")}` : "";
  const reason = [sample.leftOut && `Left out: ${sample.leftOut}`, doubt].filter(Boolean).join(". ");
  if (reason) words.append(make("span", "told doubts", reason));
  element.append(box, words);
  element.title = [sample.prompt, reason].filter(Boolean).join("\n");
  showMark(element, sample);
  return element;
}
function short(value) { return Number.isInteger(value) ? count(value) : value.toPrecision(3); }
function position(element, place) {
  const at = place - first;
  element.style.width = `${layout.side}px`;
  element.style.height = `${layout.row - layout.gap}px`;
  element.style.left = `${(at % layout.columns) * (layout.side + layout.gap)}px`;
  element.style.top = `${Math.floor(at / layout.columns) * layout.row}px`;
}
function draft(most = Infinity) {
  const top = -grid.getBoundingClientRect().top, part = Math.min(shown.length - first, layout.most);
  const [from, to] = visible(layout, top, top + innerHeight, part);
  for (const [place, element] of cards) {
    if ((place < first + from || place >= first + to) && element !== document.activeElement) {
      element.parentNode.remove();
      cards.delete(place);
    }
  }
  let before = null;
  for (let place = first + from; place < first + to; place++) {
    let element = cards.get(place);
    if (!element) {
      if (most-- <= 0) {
        requestAnimationFrame(() => draft(MADE_AT_ONCE));
        break;
      }
      element = card(place);
      cards.set(place, element);
      position(element, place);
      if (before) before.after(element.parentNode);
      else grid.prepend(element.parentNode);
    }
    before = element.parentNode;
  }
  clearTimeout(settling);
  settling = setTimeout(settle, run.sheet ? SETTLED : 0);
}
function settle() {
  const isLarge = !run.sheet || layout.side * devicePixelRatio > 1.25 * run.sheet.side;
  for (const [place, element] of cards) {
    if (element.dataset.settled) continue;
    element.dataset.settled = "yes";
    if (isLarge) {
      const image = imageOf(shown[place]), small = element.querySelector(".thumbnail");
      if (small) small.after(image);
      else element.querySelector(".stack").prepend(image);
    }
    overlay(element, shown[place]);
  }
}
function arrange() {
  const tile = Number(by("size").value), words = tile < SMALL ? 0 : WORDS;
  grid.classList.toggle("with-doubts", hasDoubts);
  grid.classList.toggle("small", tile < SMALL);
  layout = layoutOf(grid.clientWidth, Math.min(tile, grid.clientWidth), words ? GAP : 6, words, shown.length);
  first = Math.min(first, Math.floor(Math.max(shown.length - 1, 0) / layout.most) * layout.most);
  const part = Math.min(shown.length - first, layout.most);
  grid.style.height = `${shown.length ? Math.ceil(part / layout.columns) * layout.row : 160}px`;
  by("parts").hidden = shown.length <= layout.most;
  by("part").textContent = `Samples ${count(first + 1)} to ${count(first + part)} of ${count(shown.length)}`;
  by("earlier").setAttribute("aria-disabled", String(first === 0));
  by("later").setAttribute("aria-disabled", String(first + part >= shown.length));
  for (const [place, element] of cards) position(element, place);
  draft();
}
function refresh(isGrowing = false) {
  const focused = document.activeElement?.dataset?.id, before = shown;
  shown = chosen(samples, wish, quantities, marks);
  for (const [place, element] of cards) {
    if (isGrowing && shown[place]?.index === before[place].index) {
      element.parentNode.setAttribute("aria-setsize", shown.length);
      continue;
    }
    element.parentNode.remove();
    cards.delete(place);
  }
  grid.querySelector(".nothing")?.remove();
  if (!shown.length && filled) showNothing();
  arrange();
  if (focused) [...cards.values()].find(element => element.dataset.id === focused)?.focus({ preventScroll: true });
  if (opened) tellPlace();
  const found = wanted && shown.find(sample => sample.id === wanted);
  trouble("sample", filled && wanted && !found ? `No sample ${wanted} is among these` : "");
  if (found) open(found);
}
function summarise() {
  const number = portion(shown.length, Math.max(run.samples, samples.length)) + (run.is_in_progress ? " so far" : "");
  const rest = run.samples < run.planned ? `${count(run.planned)} planned` : "";
  const loading = filled ? "" : `${percent(samples.length / Math.max(run.samples, 1))} loaded`;
  by("summary").textContent = [...troubles.values(), number, rest, run.pixels, run.summary, loading].filter(Boolean).join(" · ");
}
function showNothing() {
  const out = samples.filter(sample => passes(sample, { ...wish, flags: [...wish.flags, "left-out"] }, quantities, marks)).length;
  const told = make("p", "nothing", run.samples ? `No sample matches${out ? `, except ${several(out, "sample")} that a filter left out` : ""}. ` : "No sample yet.");
  if (run.samples) told.append(button("Reset", () => { reset(); grid.focus({ preventScroll: true }); }));
  grid.append(told);
}
function reset() {
  wish = { ...EMPTY };
  changed();
  showFilters();
}
function changed() {
  first = 0;
  wanted = "";
  refresh();
  countFilters();
  keepAddress();
}
function reveal(place) {
  if (place < first || place >= first + layout.most) {
    first = Math.floor(place / layout.most) * layout.most;
    arrange();
  }
  const top = grid.getBoundingClientRect().top + scrollY + Math.floor((place - first) / layout.columns) * layout.row;
  const bar = getComputedStyle(document.querySelector(".bar")).position === "sticky" ? document.querySelector(".bar").offsetHeight + 8 : 8;
  if (top - bar < scrollY) scrollTo(0, top - bar);
  else if (top + layout.row > scrollY + innerHeight) scrollTo(0, top + layout.row - innerHeight);
  draft();
  return cards.get(place);
}

// ---- one sample at a time

let zoom = { x: 0, y: 0, scale: 1 };
function open(sample) {
  opened = sample;
  wanted = "";
  trouble("sample", "");
  by("prompt").textContent = opened.prompt || "No prompt";
  const ratio = opened.sides[1] / opened.sides[0], box = make("span", "stack");
  box.append(imageOf(opened, opened.prompt || opened.picture || `Sample ${opened.id}`));
  if (beside === "difference") box.append(comparedImage(opened));
  frame.replaceChildren(box, ...(beside === "two" ? [comparedStack(opened)] : []));
  if (beside === "two") [title, served.other].forEach((name, k) => { frame.children[k].dataset.name = name; });
  frame.classList.toggle("two", beside === "two");
  frame.classList.toggle("difference", beside === "difference");
  for (const each of frame.children) {
    each.style.setProperty("--ratio", ratio);
    each.style.aspectRatio = String(ratio);
    each.style.width = `min(100cqw, 100cqh * ${ratio})`;
  }
  look({ x: 0, y: 0, scale: 1 });
  drawOpened();
  showOpenedMark();
  tellPlace();
  by("line").textContent = lineOf(opened);
  by("line").parentElement.hidden = !run.command;
  by("pointed").textContent = "";
  pointed = null;
  if (!viewer.open) {
    viewer.showModal();
    frame.focus({ preventScroll: true });
  }
  by("side").scrollTop = 0;
  viewer.scrollTop = 0;
  keepAddress();
}
function drawOpened() {
  overlay(frame, opened);
  tellFacts();
  showCorrecting();
  const strip = [null, ...run.layers].map(layer => {
    const figure = make("figure"), box = make("span", "stack");
    box.append(imageOf(opened), ...(layer ? drawn(layer, opened) : []));
    figure.append(box, make("figcaption", "", layer ? layer.title : "Image"));
    return figure;
  });
  by("strip").replaceChildren(...strip);
}
function tellPlace() {
  const place = shown.indexOf(opened);
  by("place").textContent = place < 0 ? `of ${count(shown.length)}` : `${count(place + 1)} of ${count(shown.length)}`;
  by("previous").setAttribute("aria-disabled", String(place <= 0));
  by("next").setAttribute("aria-disabled", String(place < 0 || place + 1 >= shown.length));
}
function step(way) {
  const place = shown.indexOf(opened) + way;
  if (shown.includes(opened) && shown[place]) open(shown[place]);
}
function folderOfRun() { return (served ? served.path : folderOf(location)) || "RUN"; }
function listOfBad() { return served && !served.path.includes("://") ? `${served.path}/review/bad.txt` : "bad.txt"; }
function lineOf(sample) {
  return `${run.command} --out ${quoted(folderOfRun())} --only ${sample.id}`;
}
function tellFacts() {
  const facts = [["Sample", opened.id], ...(opened.picture ? [["Picture", opened.picture]] : []), ["Seed", opened.seed]], details = detailsOf(opened) ?? {}, legend = [];
  if (opened.leftOut) facts.push(["Left out", opened.leftOut]);
  if (opened.reasons.length) facts.push(["Doubtful", opened.reasons.join("; ")]);
  for (const layer of run.layers) {
    const values = details[layer.name];
    if (values && layer.drawing === "outlines") facts.push([layer.title, values.map(([word, score]) => `${word} ${percent(score)}`).join(", ") || "none"]);
    if (values && layer.unit && layersOn.includes(layer.name)) legend.push(scale("near-to-far", `${values[0].toFixed(2)} ${layer.unit}`, `${values[1].toFixed(2)} ${layer.unit}`));
    if (layer.drawing === "uncertainty" && layersOn.includes(layer.name)) legend.push(scale("sure-to-unsure", "sure", "unsure"));
  }
  run.figures.forEach((name, k) => { if (opened.figures[k] != null) facts.push([name, short(opened.figures[k])]); });
  const words = new Set([...opened.missing, ...opened.shown, ...opened.named]), lines = [], others = [];
  for (const word of words) {
    const things = opened.things.filter(thing => thing[0] === word), line = dotted("span", "", word);
    const ofMap = shareOf(word, details), isMapShown = active().some(layer => layer.drawing === "map");
    const share = things.length && !(isMapShown && ofMap) ? sum(things.map(thing => thing[2])) / 1000 : ofMap;
    const told = [things.length ? `× ${things.length}` : "", share ? `${(100 * share).toFixed(1)} % of the picture` : "", opened.missing.includes(word) ? "in the prompt, not in all labels" : opened.shown.includes(word) ? "" : "in the prompt"];
    line.append(make("small", opened.missing.includes(word) ? "doubts" : "", told.filter(Boolean).join(", ")));
    lines.push(line);
  }
  for (const layer of active().filter(each => each.drawing === "map")) others.push(...unclassed(layer, details[layer.name] ?? [0, 0]));
  by("legend").replaceChildren(...legend, ...folded(lines), ...others);
  by("facts").replaceChildren(...[...facts, ...run.facts].flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
}
// How much of the picture a class fills in the first map that tells it; maps that are shown come first.
function shareOf(word, details) {
  for (const layer of [...active(), ...run.layers].filter(each => each.drawing === "map")) {
    const found = Object.entries(details[layer.name]?.[2] ?? {}).find(([number]) => layer.classes[number] === word);
    if (found) return found[1];
  }
  return 0;
}
// Lines of the legend for what a map shows besides its classes: background and ignored pixels.
function unclassed(layer, [background, ignored]) {
  const line = (share, colour, text) => {
    const element = spotted("span", "", colour, text);
    element.append(make("small", "", `${(100 * share).toFixed(1)} % of the picture`));
    return share ? [element] : [];
  };
  const name = `${active().filter(each => each.drawing === "map").length > 1 ? `${layer.title}: ` : ""}ignored`;
  return [...line(background, run.colours[run.words.indexOf("background")], "background"), ...line(ignored, layer.ignored, name)];
}
// The first lines of a legend, the rest under a line that unfolds them.
let isUnfolded = false;
function folded(lines) {
  if (lines.length <= MOST_LINES + 1) return lines;
  const rest = make("details"), box = make("div", "legend");
  box.append(...lines.slice(MOST_LINES));
  rest.open = isUnfolded;
  rest.append(make("summary", "", `${count(lines.length - MOST_LINES)} more classes`), box);
  rest.addEventListener("toggle", () => { isUnfolded = rest.open; });
  return [...lines.slice(0, MOST_LINES), rest];
}
function scale(name, low, high) {
  const element = make("div", "scale");
  element.append(make("span", "", low), make("span", `ramp ${name}`), make("span", "", high));
  return element;
}
function look({ x, y, scale }) {
  const box = frame.firstChild, larger = Math.min(Math.max(scale, 1), 40);
  const most = [(larger - 1) * box.offsetWidth, (larger - 1) * box.offsetHeight];
  zoom = { scale: larger, x: Math.min(0, Math.max(x, -most[0])), y: Math.min(0, Math.max(y, -most[1])) };
  for (const each of frame.children) {
    each.style.setProperty("--zoom", larger);
    each.style.transform = larger === 1 ? "" : `translate(${zoom.x}px, ${zoom.y}px) scale(${larger})`;
    // Two pictures are each cut off where the other one begins.
    const [left, top] = [-zoom.x / larger, -zoom.y / larger], { offsetWidth: wide, offsetHeight: high } = box;
    each.style.clipPath = frame.children.length < 2 || larger === 1 ? "" : `inset(${top}px ${wide - left - wide / larger}px ${high - top - high / larger}px ${left}px)`;
  }
  frame.classList.toggle("near", larger * box.offsetWidth > 2 * (opened?.sides[1] ?? 1));
}
function zoomed(factor, clientX, clientY) {
  const box = frame.firstChild, around = frame.getBoundingClientRect();
  const left = around.left + box.offsetLeft, top = around.top + box.offsetTop, scale = Math.min(Math.max(zoom.scale * factor, 1), 40);
  const [x, y] = [(clientX ?? around.left + around.width / 2) - left, (clientY ?? around.top + around.height / 2) - top];
  look({ scale, x: x - (x - zoom.x) * scale / zoom.scale, y: y - (y - zoom.y) * scale / zoom.scale });
}
function point(event) {
  const box = frame.firstChild?.getBoundingClientRect();
  if (!box || !opened) return;
  pointed = event;
  const x = Math.floor((event.clientX - box.left) / box.width * opened.sides[1]), y = Math.floor((event.clientY - box.top) / box.height * opened.sides[0]);
  if (x < 0 || y < 0 || x >= opened.sides[1] || y >= opened.sides[0]) { by("pointed").textContent = ""; return; }
  const things = document.elementsFromPoint(event.clientX, event.clientY).map(element => element.told).filter(Boolean);
  const values = served ? run.layers.filter(layer => layer.file).map(layer => valueAt(layer, opened, x, y)) : [];
  by("pointed").textContent = [`${x}, ${y}`, ...things, ...values.filter(Boolean)].join(" · ");
}

// ---- statistics of the samples that are shown

function bars(title, rows) {
  const box = make("section"), list = make("div", "bars"), most = Math.max(...rows.map(([, value]) => value), 1);
  for (const [name, value] of rows) {
    const bar = make("i");
    bar.style.width = `${(100 * value) / most}%`;
    bar.style.minWidth = value ? "" : "0";
    list.append(name instanceof Node ? name : make("span", "", String(name)), bar, make("span", "", count(value)));
  }
  box.append(make("h3", "", title), rows.length ? list : make("p", "", "none"));
  return box;
}
// Bars of a histogram, each named by its step; `isWhole` where values are whole numbers.
function spans(counts, isWhole = false) {
  const width = counts.length > 1 ? counts[1][0] - counts[0][0] : 1;
  return counts.map(([from, number], k) => {
    const next = counts[k + 1]?.[0];
    if (isWhole) return [width > 1 ? `${from} to ${from + width - 1}` : from, number];
    return [next === undefined ? `${from} and more` : `${from} to ${next}`, number];
  });
}
function centres(cells) {
  const box = make("section"), most = Math.max(...cells, 1), svg = draw("svg", { viewBox: `0 0 ${CELLS} ${CELLS}`, class: "cells", role: "img", "aria-label": "Where the middles of things lie" });
  cells.forEach((number, k) => {
    if (!number) return;
    const cell = draw("rect", { x: k % CELLS, y: Math.floor(k / CELLS), width: 1, height: 1, fill: "var(--accent)", "fill-opacity": Math.sqrt(number / most) });
    cell.append(draw("title", {}));
    cell.firstChild.textContent = count(number);
    svg.append(cell);
  });
  box.append(make("h3", "", "Middles of things in the picture"), svg);
  return box;
}
function together(found) {
  const box = make("section", "wide"), table = make("table"), head = make("tr");
  head.append(make("th"), ...found.related.map(word => make("th", "", run.words[word])));
  table.append(head, ...found.related.map((word, row) => {
    const line = make("tr"), whole = found.pairs[row][row] || 1;
    line.append(make("th", "", run.words[word]), ...found.pairs[row].map((number, column) => {
      const cell = make("td", "", row === column ? count(number) : percent(number / whole));
      cell.style.background = `color-mix(in srgb, var(--accent) ${row === column ? 0 : Math.round((60 * number) / whole)}%, transparent)`;
      return cell;
    }));
    return line;
  }));
  box.append(make("h3", "", "Of the samples that show the class of a row, the share that shows that of a column too"), table);
  return box;
}
function showStatistics() {
  const found = statisticsOf(shown, run.figures), charts = [];
  const isShowing = found.classes.some(each => each.samples);
  const chart = (title, name, classes) => {
    const most = classes.length > MOST_BARS ? `, the ${MOST_BARS} most frequent of ${count(classes.length)}` : "";
    const order = [...classes].sort((a, b) => b[name] - a[name] || a.word - b.word).slice(0, MOST_BARS);
    if (classes.length) charts.push(bars(`${title}${most}`, order.map(each => [dotted("span", "", each.word), each[name]])));
  };
  if (isShowing) chart("Samples that show a class", "samples", found.classes);
  chart("Samples whose prompt names a class", "named", found.classes.filter(each => each.named));
  chart("Things of a class", "things", found.classes.filter(each => each.things));
  if (found.areas.length) {
    charts.push(bars("Sizes of things, % of the picture", spans(found.areas)), bars("Things in a sample", spans(found.things, true)), centres(found.cells));
  }
  if (found.nearest.length) charts.push(bars("Nearest depth in a sample, m", spans(found.nearest)), bars("Farthest depth in a sample, m", spans(found.farthest)));
  charts.push(bars("Words in a prompt", spans(found.lengths, true)));
  const repeats = make("section"), near = found.duplicates === null ? "Near duplicates are known once the command filter has scored the run." : `${several(found.duplicates, "picture is nearly that", "pictures are nearly those")} of an earlier sample.`;
  repeats.append(make("h3", "", "Repetitions"), make("p", "", `${several(found.repeated, "prompt repeats", "prompts repeat")} an earlier one. ${near}`));
  charts.push(repeats);
  if (isShowing) charts.push(together(found));
  by("counted").textContent = `Statistics of ${portion(shown.length, run.samples)}`;
  by("charts").replaceChildren(...charts);
  by("statistics").showModal();
}

// ---- bars and keys

function press(element, is) { element.setAttribute("aria-pressed", String(is)); }
function toggleLayer(name) {
  layersOn = layersOn.includes(name) ? layersOn.filter(other => other !== name) : [...layersOn, name];
  showLayers();
  for (const [place, element] of cards) overlay(element, shown[place]);
  if (opened) beside === "two" ? open(opened) : drawOpened();
  remember("layers", layersOn);
  keepAddress();
}
function showLayers() {
  for (const place of ["layers", "viewer-layers"]) {
    [...by(place).children].forEach((element, k) => press(element, layersOn.includes(run.layers[k].name)));
  }
}
function layerButtons(place) {
  by(place).append(...run.layers.map((layer, k) => {
    const element = button(layer.title, () => toggleLayer(layer.name));
    if (k < 9) element.title = `Key ${k + 1}`;
    return element;
  }));
}
const FLAG_BUTTONS = [
  ["doubtful", "Doubtful", "Samples whose labels do not fit their prompt or one another", run.doubtful],
  ["missing", "Named, not labelled", "Samples whose prompt names a class that their labels lack", run.missing],
  ["aside", "Set aside", "Doubtful samples that lie beside the data set", run.aside],
  ["left-out", "Left out", "Samples that a filter left out", leftOut.size],
  ["good", "Marked good", "Samples that you marked with key g"],
  ["bad", "Marked bad", "Samples that you marked with key b"],
  ["unmarked", "Unmarked", "Samples that you have not marked"],
];
function filterButtons() {
  const flag = ([name, title, told, number]) => {
    const element = button(title, () => {
      wish.flags = wish.flags.includes(name) ? wish.flags.filter(other => other !== name) : [...wish.flags, name];
      changed();
      showFilters();
    });
    element.dataset.flag = name;
    element.title = told;
    if (number !== undefined) element.append(make("small", "", count(number)));
    return element;
  };
  by("flags").append(...FLAG_BUTTONS.filter(([, , , number]) => number !== 0).map(flag), button("All of these", () => {
    wish.any = !wish.any;
    changed();
    showFilters();
  }), button("Reset", reset));
  by("flags").children[by("flags").children.length - 2].id = "any";
}
function classButton(word) {
  const element = dotted("button", "chip", word);
  element.type = "button";
  element.dataset.word = word;
  element.append(make("small"));
  element.addEventListener("click", () => {
    const [had, ruled] = [wish.has.includes(word), wish.not.includes(word)];
    wish.has = had ? wish.has.filter(other => other !== word) : ruled ? wish.has : [...wish.has, word];
    wish.not = had ? [...wish.not, word] : wish.not.filter(other => other !== word);
    changed();
    showFilters();
  });
  return element;
}
function showFilters() {
  for (const element of by("flags").querySelectorAll("[data-flag]")) press(element, wish.flags.includes(element.dataset.flag));
  showClasses();
  by("any").hidden = wish.has.length < 2;
  by("any").textContent = wish.any ? "Any of these" : "All of these";
  by("search").value = wish.search;
  by("sort").value = quantities.has(wish.sort) ? wish.sort : EMPTY.sort;
  by("direction").textContent = wish.down ? "↓ falling" : "↑ rising";
  countFilters();
  by("ranges").replaceChildren(...wish.ranges.map(range => rangeRow(range)), button("+ Limit", () => {
    wish.ranges = [...wish.ranges, [quantities.has("score") ? "score" : "things", null, null]];
    showFilters();
    by("ranges").querySelector("label:last-of-type select")?.focus();
  }));
}
// A button of a class counts the samples of the data set, once it is known which lie beside it.
function countWords() {
  everywhere = countsOf(samples, run.words.length);
  inSet = countsOf(samples.filter(sample => !isBeside(sample)), run.words.length);
  showClasses();
}
function showClasses() {
  const order = run.words.map((word, k) => k).filter(k => everywhere[k]).sort((a, b) => everywhere[b] - everywhere[a] || a - b);
  const box = by("classes"), before = [...box.children].map(element => Number(element.dataset.word));
  if (String(order) !== String(before)) box.replaceChildren(...order.map(classButton));
  for (const element of box.children) showClass(element);
}
function showClass(element) {
  const word = Number(element.dataset.word), [had, ruled] = [wish.has.includes(word), wish.not.includes(word)];
  element.querySelector("small").textContent = count(inSet[word]);
  element.setAttribute("aria-pressed", had ? "true" : ruled ? "mixed" : "false");
  element.setAttribute("aria-label", `${run.words[word]}, ${several(inSet[word], "sample")}: ${had ? "asked for" : ruled ? "ruled out" : "not asked for"}`);
}
function countFilters() {
  const number = wish.ranges.filter(isBound).length + wish.has.length + wish.not.length + wish.flags.length;
  by("filtering").textContent = number ? `Filters (${number})` : "Filters";
}
function rangeRow(range) {
  const row = make("label"), select = quantitySelect(range[0]);
  const limit = (at, told) => {
    const input = make("input");
    Object.assign(input, { type: "number", step: "any", placeholder: told, value: range[at] ?? "" });
    input.setAttribute("aria-label", `${range[0]}, ${told}`);
    input.addEventListener("change", () => {
      range[at] = input.value === "" ? null : Number(input.value);
      changed();
    });
    return input;
  };
  select.setAttribute("aria-label", "Quantity");
  select.addEventListener("change", () => {
    range[0] = select.value;
    changed();
  });
  const gone = button("×", () => {
    wish.ranges = wish.ranges.filter(other => other !== range);
    changed();
    showFilters();
  });
  gone.setAttribute("aria-label", "Remove this limit");
  row.append(select, limit(1, "at least"), limit(2, "at most"), gone);
  return row;
}
function quantitySelect(value) {
  const select = make("select");
  for (const name of quantities.keys()) {
    const option = make("option", "", name);
    option.value = name;
    select.append(option);
  }
  select.value = value;
  return select;
}
function theme(name) {
  root.dataset.theme = name;
  by("theme").textContent = name === "dark" ? "Light" : "Dark";
  by("theme").title = `${by("theme").textContent} colours`;
}
// Sliders of one value, which begins with `value` where that is known.
function slide(name, act, value, ids = [name]) {
  const take = now => {
    for (const id of ids) by(id).value = now;
    act(by(name).value);
  };
  take(value ?? by(name).value);
  for (const id of ids) {
    by(id).addEventListener("input", () => {
      take(by(id).value);
      remember(name, by(name).value);
    });
  }
}
function applyAddress() {
  const found = wishOf(location.hash, run.words);
  wish = found.wish;
  if (!quantities.has(wish.sort)) wish = { ...wish, sort: EMPTY.sort };
  wanted = found.id;
  const known = run.layers.map(layer => layer.name), before = found.layers ?? remembered("layers")?.filter(name => known.includes(name));
  const unknown = (found.layers ?? []).filter(name => !known.includes(name));
  trouble("layer", unknown.length ? `No layer is called ${unknown.join(", ")}; there are ${known.join(", ")}` : "");
  layersOn = before?.length || found.layers ? before.filter(name => known.includes(name)) : [run.first].filter(Boolean);
  showLayers();
  showFilters();
}
function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const isTyping = event.target.matches?.("input:not([type=range]), select, textarea");
  if (event.key === "Escape" && event.target === by("search")) {
    event.preventDefault(); // which would empty it
    grid.focus({ preventScroll: true });
  }
  if (isTyping || by("statistics").open) return;
  const isSliding = event.target.matches?.("input[type=range]");
  if (event.key === "/" && !viewer.open) {
    event.preventDefault();
    by("search").focus();
  }
  const layer = /^[1-9]$/.test(event.key) ? run.layers[Number(event.key) - 1] : null;
  if (layer && !event.repeat) toggleLayer(layer.name);
  const place = [...cards].find(([, element]) => element === event.target)?.[0];
  const marked = viewer.open ? opened : shown[place], name = { g: "good", b: "bad", u: marks.get(marked?.id) }[event.key];
  if (marked && name && !event.repeat) mark(marked, name);  // a key held down would mark, unmark, mark ...
  if (viewer.open) {
    if (event.key === "ArrowRight" && !isSliding) step(1);
    if (event.key === "ArrowLeft" && !isSliding) step(-1);
    if (event.key === "+" || event.key === "=") zoomed(1.5);
    if (event.key === "-") zoomed(1 / 1.5);
    if (event.key === "0") look({ x: 0, y: 0, scale: 1 });
    return;
  }
  const ways = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: layout.columns, ArrowUp: -layout.columns, Home: -Infinity, End: Infinity };
  if (place !== undefined && event.key in ways) {
    event.preventDefault();
    reveal(Math.min(Math.max(place + ways[event.key], 0), shown.length - 1))?.focus({ preventScroll: true });
  } else if (event.key.startsWith("Arrow") && [document.body, grid].includes(event.target)) {
    const inView = [...cards].filter(([, element]) => element.getBoundingClientRect().bottom > 0).map(([each]) => each);
    if (inView.length) {
      event.preventDefault();
      cards.get(Math.min(...inView)).focus({ preventScroll: true });
    }
  }
}

const names = decoded(location.pathname).split("/");
const title = names.length > 2 ? names[names.length - 3] : "Gallery";
document.title = `${title} · labelled images`;
by("title").textContent = title;
theme(remembered("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
by("theme").addEventListener("click", () => {
  theme(root.dataset.theme === "dark" ? "light" : "dark");
  remember("theme", root.dataset.theme);
});
layerButtons("layers");
layerButtons("viewer-layers");
filterButtons();
reviewButtons();
by("sort").append(...quantitySelect("number").children);
by("sort").addEventListener("change", () => {
  const name = by("sort").value;
  wish = { ...wish, sort: name, down: worstIsHigh(name) };
  changed();
  showFilters();
});
by("direction").addEventListener("click", () => {
  wish.down = !wish.down;
  changed();
  showFilters();
});
by("search").addEventListener("input", () => {
  wish.search = by("search").value;
  changed();
});
function unfold(isOpen) {
  by("filters").classList.toggle("open", isOpen);
  by("filtering").setAttribute("aria-expanded", String(isOpen));
  arrange();
}
by("filtering").addEventListener("click", () => {
  unfold(!by("filters").classList.contains("open"));
  remember("filters", by("filters").classList.contains("open"));
});
unfold(remembered("filters") ?? (innerWidth > 760 && innerHeight > 700));
document.querySelector(".skip").addEventListener("click", event => {
  event.preventDefault(); // the part of the address behind # tells the filters
  grid.focus();
});
by("counting").addEventListener("click", showStatistics);
by("uncount").addEventListener("click", () => by("statistics").close());
by("earlier").addEventListener("click", () => { if (first > 0) reveal(first - layout.most); });
by("later").addEventListener("click", () => { if (first + layout.most < shown.length) { reveal(first + layout.most); scrollTo(0, 0); } });
by("previous").addEventListener("click", () => step(-1));
by("next").addEventListener("click", () => step(1));
by("close").addEventListener("click", () => viewer.close());
by("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(by("line").textContent);
    by("copy").textContent = "Copied";
  } catch { getSelection().selectAllChildren(by("line")); }
  setTimeout(() => { by("copy").textContent = "Copy"; }, 1500);
});
viewer.addEventListener("click", event => { if (event.target === viewer) viewer.close(); });
viewer.addEventListener("cancel", event => {
  if (!isMarking) return;
  event.preventDefault(); // Escape ends the marking of a region first
  leaveMarking();
});
viewer.addEventListener("close", () => {
  if (isMarking) leaveMarking();
  if (viewer.open) return; // with the next sample of the address
  const place = shown.indexOf(opened);
  opened = null;
  keepAddress();
  (place >= 0 ? reveal(place) : grid)?.focus({ preventScroll: true });
});
const pointers = new Map();
frame.addEventListener("wheel", event => {
  event.preventDefault();
  zoomed(Math.exp(-event.deltaY * .0015), event.clientX, event.clientY);
}, { passive: false });
frame.addEventListener("pointerdown", event => {
  frame.setPointerCapture(event.pointerId);
  if (isMarking) corner = placeIn(event);
  else pointers.set(event.pointerId, event);
});
frame.addEventListener("pointerup", event => { if (corner) endRegion(event); });
frame.addEventListener("pointermove", event => {
  if (corner) {
    frame.firstChild.querySelector(".layer.drawing")?.remove();
    const svg = unjudged(opened, [regionTo(event)]);
    svg.classList.add("drawing");
    frame.firstChild.append(svg);
  }
  const before = pointers.get(event.pointerId);
  if (before && pointers.size === 1) look({ ...zoom, x: zoom.x + event.clientX - before.clientX, y: zoom.y + event.clientY - before.clientY });
  if (before && pointers.size === 2) {
    const other = [...pointers.values()].find(each => each.pointerId !== event.pointerId);
    const apart = each => Math.max(Math.hypot(each.clientX - other.clientX, each.clientY - other.clientY), 1);
    zoomed(apart(event) / apart(before), (event.clientX + other.clientX) / 2, (event.clientY + other.clientY) / 2);
  }
  if (before) pointers.set(event.pointerId, event);
  point(event);
});
for (const end of ["pointerup", "pointercancel"]) frame.addEventListener(end, event => pointers.delete(event.pointerId));
frame.addEventListener("dblclick", event => (zoom.scale > 1 ? look({ x: 0, y: 0, scale: 1 }) : zoomed(3, event.clientX, event.clientY)));
addEventListener("keydown", keys);
addEventListener("scroll", () => requestAnimationFrame(() => draft(MADE_AT_ONCE)), { passive: true });
addEventListener("hashchange", () => {
  if (viewer.open) viewer.close();
  applyAddress();
  first = 0;
  refresh();
});
new ResizeObserver(() => arrange()).observe(grid);
slide("opacity", value => root.style.setProperty("--overlay", value / 100), remembered("opacity"), ["opacity", "viewer-opacity"]);
slide("size", () => arrange(), remembered("size") ?? (innerWidth < 500 ? 160 : 232));
applyAddress();
startReview();
loadPages();
by("newer").addEventListener("click", () => location.reload());
addEventListener("focus", renewMarks);
if (run.is_in_progress) setInterval(lookForNews, ASKED_AGAIN);
