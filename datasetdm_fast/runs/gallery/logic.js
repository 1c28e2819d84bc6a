"use strict";
// What the page decides without a look at itself: which samples it shows, in which order, and where they lie.

const received = { run: null, leftOut: [], pages: new Map(), details: new Map(), on: () => {} };
const compared = { run: null, details: new Map(), on: () => {} }; // of the run that this one is compared with

// Every script that holds data calls this; `number` tells which part it is.
function receive(kind, number, value) {
  const into = document.currentScript?.dataset.compared ? compared : received;
  if (kind === "page") into.pages.set(number, value);
  else if (kind === "details") into.details.set(number, new Map(value));
  else into[kind] = value;
  into.on(kind, number);
}

function idOf(index) { return String(index).padStart(8, "0"); }
function sum(values) { return values.reduce((total, value) => total + value, 0); }

// Samples of an index page: one object each out of its columns.
function samplesOf(columns, leftOut) {
  return columns.index.map((index, k) => ({
    index, id: idOf(index), prompt: columns.prompt[k], text: columns.prompt[k].toLowerCase(), seed: String(columns.seed[k]),
    picture: columns.picture?.[k] ?? "", sides: columns.sides[k], named: columns.named[k], shown: columns.shown[k], missing: columns.missing[k],
    reasons: columns.reasons[k], source: columns.source[k], aside: columns.aside[k] === 1, things: columns.things[k], figures: columns.figures[k],
    leftOut: leftOut.get(index) ?? "",
  }));
}

const HIGH_IS_BAD = new Set(["doubts", "disagreeing", "domain", "missing classes"]);
const UNRANKED = new Set(["number", "seed", "things", "people", "prompt letters", "nearest, m", "farthest, m", "largest thing, %"]);

// What samples are sorted by and limited to: name -> the value of a sample, null where it has none.
function quantitiesOf(figures) {
  const found = new Map([["number", sample => sample.index], ["seed", sample => Number(sample.seed)]]);
  figures.forEach((name, k) => found.set(name, sample => sample.figures[k] ?? null));
  const extreme = (call, place, scale) => sample => (sample.things.length ? call(...sample.things.map(thing => thing[place])) / scale : null);
  found.set("doubts", sample => sample.reasons.length);
  found.set("missing classes", sample => sample.missing.length);
  found.set("things", sample => sample.things.length);
  found.set("least sure thing", extreme(Math.min, 1, 100));
  found.set("largest thing, %", extreme(Math.max, 2, 10));
  found.set("smallest thing, %", extreme(Math.min, 2, 10));
  found.set("prompt letters", sample => sample.prompt.length);
  return found;
}

const EMPTY = { search: "", has: [], not: [], any: false, flags: [], ranges: [], sort: "number", down: false };
// Samples that one of these flags chooses; without one, those of the data set that no filter left out.
const FLAGS = {
  doubtful: sample => sample.reasons.length > 0,
  missing: sample => sample.missing.length > 0,
  aside: sample => sample.aside,
  "left-out": sample => sample.leftOut !== "",
  good: (sample, marks) => marks.get(sample.id) === "good",
  bad: (sample, marks) => marks.get(sample.id) === "bad",
  unmarked: (sample, marks) => !marks.has(sample.id),
};

const BESIDE = ["doubtful", "missing", "aside", "left-out"]; // flags that also choose samples beside the data set
function isBound([, least, most]) { return least !== null || most !== null; }
function isBeside(sample) { return Boolean(sample.leftOut || sample.aside); }
function passes(sample, wish, quantities, marks) {
  if (isBeside(sample) && !wish.flags.some(flag => BESIDE.includes(flag))) return false;
  if (!wish.flags.every(flag => FLAGS[flag](sample, marks))) return false;
  if (wish.has.length && !wish.has[wish.any ? "some" : "every"](word => sample.shown.includes(word))) return false;
  if (wish.not.some(word => sample.shown.includes(word))) return false;
  for (const [name, least, most] of wish.ranges.filter(isBound)) {
    const value = quantities.get(name)?.(sample) ?? null;
    if (value === null || (least !== null && value < least) || (most !== null && value > most)) return false;
  }
  const text = wish.search.trim().toLowerCase();
  return !text || sample.text.includes(text) || sample.picture.toLowerCase().includes(text) || sample.id.includes(text) || sample.seed === text;
}

// The samples to show, in their order; those without a value come last, whatever the direction.
function chosen(samples, wish, quantities, marks) {
  const found = samples.filter(sample => passes(sample, wish, quantities, marks));
  const value = quantities.get(wish.sort);
  if (!value || (wish.sort === "number" && !wish.down)) return found;
  const sign = wish.down ? -1 : 1;
  const keyed = found.map(sample => [value(sample), sample]);
  keyed.sort(([a, first], [b, second]) => {
    if (a === null || b === null) return (a === null) - (b === null) || first.index - second.index;
    return sign * (a - b) || first.index - second.index;
  });
  return keyed.map(([, sample]) => sample);
}

// How many samples show each of so many words.
function countsOf(samples, number) {
  const counts = new Array(number).fill(0);
  for (const sample of samples) for (const word of sample.shown) counts[word]++;
  return counts;
}

// Whether the worst samples come first when this quantity falls.
function worstIsHigh(name) { return HIGH_IS_BAD.has(name); }

// The part of an address behind #: all that decides what the page shows. Words stand there as they are, not as numbers.
function addressOf(wish, layers, opened, words) {
  const parts = new URLSearchParams();
  if (opened) parts.set("id", opened);
  parts.set("layer", layers.join(","));
  if (wish.search) parts.set("search", wish.search);
  for (const word of wish.has) parts.append("has", words[word]);
  for (const word of wish.not) parts.append("not", words[word]);
  if (wish.any) parts.set("any", "1");
  for (const flag of wish.flags) parts.append("only", flag);
  for (const [name, least, most] of wish.ranges) parts.append("range", `${least ?? ""}~${most ?? ""}~${name}`);
  if (wish.sort !== EMPTY.sort || wish.down) parts.set("sort", (wish.down ? "-" : "") + wish.sort);
  return "#" + parts;
}
function wishOf(address, words) {
  const parts = new URLSearchParams(address.replace(/^#/, ""));
  const numbers = name => parts.getAll(name).map(word => words.indexOf(word)).filter(number => number >= 0);
  const sort = parts.get("sort") ?? EMPTY.sort;
  const limit = text => (text === "" || Number.isNaN(Number(text)) ? null : Number(text));
  return {
    wish: {
      search: parts.get("search") ?? "", has: numbers("has"), not: numbers("not"), any: parts.get("any") === "1",
      flags: parts.getAll("only").filter(flag => Object.hasOwn(FLAGS, flag)),
      ranges: parts.getAll("range").map(text => text.split("~")).filter(found => found.length > 2)
        .map(([least, most, ...name]) => [name.join("~"), limit(least), limit(most)]),
      sort: sort.replace(/^-/, ""), down: sort.startsWith("-"),
    },
    layers: parts.has("layer") ? parts.get("layer").split(",").filter(Boolean) : null,
    id: parts.get("id") ?? "",
  };
}

// What there is to see of a run that has gone on since its page was read: `newer` is what is now told of it.
function newsOf(run, newer) {
  const more = newer.samples - run.samples;
  if (more > 0) return `Show ${more.toLocaleString("en")} more ${more === 1 ? "sample" : "samples"}`;
  return run.is_in_progress && !newer.is_in_progress ? "Show the finished run" : "";
}

// Where cards lie: columns of equal width, rows of equal height, so that any card's place is known without the others.
const LARGEST_HEIGHT = 12e6; // pixels: browsers lose lines of a page that is much higher
function layoutOf(width, tile, gap, words, count) {
  const columns = Math.max(1, Math.floor((width + gap) / (tile + gap)));
  const side = (width - gap * (columns - 1)) / columns;
  const row = side + words + gap;
  const most = Math.max(1, Math.floor(LARGEST_HEIGHT / row)) * columns; // cards of one part of the grid
  return { columns, side, row, gap, most, height: Math.ceil(Math.min(count, most) / columns) * row };
}
// First and last + 1 of the cards between two heights of the grid, with some more around them.
function visible(layout, top, bottom, count) {
  const first = Math.max(0, Math.floor((top - layout.row) / layout.row));
  const last = Math.ceil((bottom + layout.row) / layout.row);
  return [Math.min(first * layout.columns, count), Math.min(Math.max(last, 0) * layout.columns, count)];
}

// Where a sample's thumbnail lies in its sheet, as the writer of the sheets computes it.
function thumbnailOf(sample, sheet) {
  const [height, width] = sample.sides, longest = Math.max(height, width, sheet.side);
  const count = sheet.columns * sheet.rows, place = sample.index % count;
  return {
    sheet: Math.floor(sample.index / count),
    x: (place % sheet.columns) * sheet.side, y: Math.floor(place / sheet.columns) * sheet.side,
    width: Math.max(Math.floor(width * sheet.side / longest), 1), height: Math.max(Math.floor(height * sheet.side / longest), 1),
  };
}

// A colour of its own for each thing of a class: that of the class, turned and made lighter or darker by turns.
function shade(colour, k) {
  if (!k) return colour;
  const [r, g, b] = [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16) / 255);
  const most = Math.max(r, g, b), least = Math.min(r, g, b), range = most - least, light = (most + least) / 2;
  const hue = range === 0 ? 0 : most === r ? ((g - b) / range + 6) % 6 : most === g ? (b - r) / range + 2 : (r - g) / range + 4;
  const strength = range === 0 ? 0 : range / (1 - Math.abs(2 * light - 1));
  const step = Math.ceil(k / 2), way = k % 2 ? 1 : -1;
  const turned = (hue * 60 + way * 16 * step + 720) % 360;
  const other = Math.min(.88, Math.max(.22, light + way * .17 * ((step - 1) % 2 + 1)));
  return `hsl(${turned.toFixed(1)} ${(100 * Math.max(strength, .25)).toFixed(1)}% ${(100 * other).toFixed(1)}%)`;
}

// A word of a shell's command line.
function quoted(text) { return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`; }

// An address as text; where names of files are no UTF-8, a mark stands for what is not ASCII.
const MARK = "\ufffd";
function decoded(address) {
  try { return decodeURIComponent(address); } catch { return decodeURIComponent(address.replace(/(%[89a-f][0-9a-f])+/gi, MARK)); }
}
// The folder of a page's address: PATH/gallery/index.html -> PATH, as the file system of the page spells it; empty where
// no text does.
function folderOf(location) {
  const path = decoded(location.pathname).replace(/\/gallery\/[^/]*$/, "");
  if (location.protocol !== "file:" || path.includes(MARK)) return "";
  return /^\/[A-Za-z]:/.test(path) ? path.slice(1) : path;
}

// Counts of values between steps: [begin of the step, count], from the first that has any to the last.
function histogramOf(values, steps) {
  const counts = steps.map(() => 0);
  for (const value of values) {
    let place = 0;
    while (place + 1 < steps.length && value >= steps[place + 1]) place++;
    counts[place]++;
  }
  const first = counts.findIndex(Boolean), last = counts.findLastIndex(Boolean);
  return first < 0 ? [] : counts.map((count, k) => [steps[k], count]).slice(first, last + 1);
}
// As many equal, round steps as there are at most, none smaller than `narrowest`, from the least value to the largest.
function stepsOf(values, most, narrowest = 0) {
  let least = Infinity, largest = -Infinity;
  for (const value of values) [least, largest] = [Math.min(least, value), Math.max(largest, value)];
  if (least > largest) return [0];
  const rough = Math.max((largest - least) / most || 1, narrowest), power = 10 ** Math.floor(Math.log10(rough));
  const width = [1, 2, 5, 10].map(times => times * power).find(step => step >= rough * .999);
  const first = Math.floor(least / width), last = Math.floor(largest / width);
  return Array.from({ length: last - first + 1 }, (_, k) => Number(((first + k) * width).toPrecision(9)));
}

const AREAS = [0, .1, .2, .5, 1, 2, 5, 10, 20, 50]; // per cent of a picture
const CELLS = 24, RELATED = 12; // of a side of the map of centres, classes in the table of pairs
const NEAR_DUPLICATE = 2; // bits by which the pictures of near duplicates differ at most
// What the statistics tell of some samples; `figures` are the names of their figures.
function statisticsOf(samples, figures) {
  const classes = new Map(), pairs = new Map(), cells = new Array(CELLS * CELLS).fill(0), prompts = new Map();
  const about = word => {
    if (!classes.has(word)) classes.set(word, { word, samples: 0, named: 0, things: 0, area: 0 });
    return classes.get(word);
  };
  const areas = [], things = [], lengths = [];
  for (const sample of samples) {
    for (const word of sample.shown) about(word).samples++;
    for (const word of sample.named) about(word).named++;
    for (const [word, , area, x, y] of sample.things) {
      const found = about(word), cell = share => Math.min(Math.max(Math.floor(share * CELLS / 1000), 0), CELLS - 1);
      found.things++;
      found.area += area / 10;
      areas.push(area / 10);
      cells[cell(y) * CELLS + cell(x)]++;
    }
    for (const a of sample.shown) for (const b of sample.shown) pairs.set(`${a} ${b}`, (pairs.get(`${a} ${b}`) ?? 0) + 1);
    things.push(sample.things.length);
    lengths.push(sample.prompt.split(/\s+/).filter(Boolean).length);
    if (sample.text) prompts.set(sample.text, (prompts.get(sample.text) ?? 0) + 1);
  }
  const order = [...classes.values()].sort((a, b) => b.samples - a.samples || a.word - b.word);
  const related = order.slice(0, RELATED).map(found => found.word);
  const column = name => samples.map(sample => sample.figures[figures.indexOf(name)]).filter(value => value != null);
  const distances = column("distance"), depths = [...column("nearest, m"), ...column("farthest, m")];
  return {
    classes: order, related, pairs: related.map(a => related.map(b => pairs.get(`${a} ${b}`) ?? 0)), cells,
    areas: histogramOf(areas, AREAS), things: histogramOf(things, stepsOf(things, 16, 1)), lengths: histogramOf(lengths, stepsOf(lengths, 16, 1)),
    nearest: histogramOf(column("nearest, m"), stepsOf(depths, 20)), farthest: histogramOf(column("farthest, m"), stepsOf(depths, 20)),
    repeated: sum([...prompts.values()]) - prompts.size, duplicates: distances.length ? distances.filter(bits => bits <= NEAR_DUPLICATE).length : null,
  };
}

// Ids of the samples that bear a mark, one a line: what a list of samples for other commands looks like.
function listOf(marks, mark) { return [...marks].filter(([, other]) => other === mark).map(([id]) => `${id}\n`).sort().join(""); }

// The pixels of a PNG file of one channel, 8 or 16 bits: browsers draw them, but do not tell values beyond 8 bits.
async function pixelsOf(buffer) {
  const view = new DataView(buffer), parts = [], names = new TextDecoder("latin1");
  let place = 8, width = 0, height = 0, size = 0;
  while (place < buffer.byteLength) {
    const length = view.getUint32(place), kind = names.decode(new Uint8Array(buffer, place + 4, 4));
    if (kind === "IHDR") {
      [width, height] = [view.getUint32(place + 8), view.getUint32(place + 12)];
      const [bits, colour] = [view.getUint8(place + 16), view.getUint8(place + 17)];
      if (![8, 16].includes(bits) || ![0, 3].includes(colour) || view.getUint8(place + 20)) return null;
      size = bits / 8;
    }
    if (kind === "IDAT") parts.push(new Uint8Array(buffer, place + 8, length));
    place += 12 + length;
  }
  const raw = await new Response(new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
  const bytes = new Uint8Array(raw), wide = width * size, lines = new Uint8Array(wide * height);
  for (let y = 0; y < height; y++) {
    const filter = bytes[y * (wide + 1)];
    for (let x = 0; x < wide; x++) {
      const left = x >= size ? lines[y * wide + x - size] : 0, up = y ? lines[(y - 1) * wide + x] : 0;
      const corner = x >= size && y ? lines[(y - 1) * wide + x - size] : 0;
      const away = [Math.abs(up - corner), Math.abs(left - corner), Math.abs(left + up - 2 * corner)];
      const nearest = away[0] <= away[1] && away[0] <= away[2] ? left : away[1] <= away[2] ? up : corner;
      lines[y * wide + x] = bytes[y * (wide + 1) + 1 + x] + [0, left, up, (left + up) >> 1, nearest][filter];
    }
  }
  const at = (x, y) => (size === 1 ? lines[y * width + x] : 256 * lines[y * wide + 2 * x] + lines[y * wide + 2 * x + 1]);
  return { width, height, at };
}
