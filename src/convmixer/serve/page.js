// The page: a picture in by drop, paste, choice, camera or sample; answer and evidence out. The work is done by the
// global `classifier` of local.js (in this browser) or api.js (on the server that gave the page).
"use strict";

const $ = (id) => document.getElementById(id);
const GRID = 512; // canvas pixels; the style sets the size on screen
let model = null;
let latest = 0; // an answer to an older picture is dropped if it comes later
let shown = null; // {result, index} behind the evidence

async function start() {
  $("note").textContent = classifier.note;
  try {
    model = await classifier.load();
  } catch (error) {
    return startFailed(error);
  }
  $("login").hidden = true;
  $("problem").textContent = "";
  const { img_size: size } = model.preprocessing;
  $("name").textContent = title(model.name || model.about?.architecture || "ConvMixer");
  $("facts").textContent = `${model.classes.length} classes · ${size} × ${size} pixels`;
  $("prompt-text").textContent = "Drop a picture here";
  $("prompt-more").textContent = "or paste one, or click to choose";
  for (const id of ["file", "camera", "choose"]) $(id).disabled = false;
  model.samples.forEach(addSample);
  $("samples-block").hidden = model.samples.length === 0;
  document.body.dataset.ready = "true";
}

/** convmixer_256_8_p2_k5 -> ConvMixer-256/8, as the paper writes it. */
function title(name) {
  return name.replace(/^convmixer_(\d+)_(\d+).*$/, "ConvMixer-$1/$2");
}

function startFailed(error) {
  $("prompt-text").textContent = error.needsToken ? "This server asks for a token" : "The model cannot be loaded";
  $("prompt-more").textContent = "";
  $("login").hidden = !error.needsToken;
  $("problem").textContent = error.needsToken && !classifier.token ? "" : error.message;
}

function addSample(uri, number) {
  const button = document.createElement("button");
  const image = document.createElement("img");
  image.src = uri;
  image.alt = `Sample picture ${number + 1}`;
  button.type = "button";
  button.setAttribute("aria-pressed", "false");
  button.append(image);
  button.addEventListener("click", () => classify(blobOf(uri), image.alt, button));
  $("samples").append(button);
}

function blobOf(uri) {
  const [head, body] = uri.split(",");
  const bytes = Uint8Array.from(atob(body), (c) => c.charCodeAt(0));
  return new Blob([bytes], { type: head.slice(5).split(";")[0] });
}

async function classify(blob, name, sample = null) {
  if (!model || !blob) return;
  const ticket = ++latest;
  showPicture(blob, name, sample);
  document.body.classList.add("busy");
  await new Promise((done) => setTimeout(done, 0)); // let the picture be painted first
  try {
    const result = await classifier.classify(blob);
    if (ticket === latest) showResult(result);
  } catch (error) {
    if (ticket === latest) showProblem(error);
  }
  if (ticket === latest) document.body.classList.remove("busy");
}

function showPicture(blob, name, sample) {
  const preview = $("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.onload = () => preview.classList.toggle("pixels", preview.naturalWidth <= 128);
  preview.src = URL.createObjectURL(blob);
  preview.alt = name;
  preview.hidden = false;
  $("prompt").hidden = true;
  $("drop").classList.add("full");
  $("problem").textContent = "";
  for (const button of $("samples").children) button.setAttribute("aria-pressed", String(button === sample));
}

function showProblem(error) {
  const decoding = error.name === "InvalidStateError" || error.name === "EncodingError";
  $("problem").textContent = decoding ? "This file is not a picture that the browser can read." : error.message;
  $("preview").hidden = true;
  $("prompt").hidden = false;
  $("drop").classList.remove("full");
  $("answer").replaceChildren(paragraph("No answer."));
  if (error.needsToken) $("login").hidden = false;
  $("time").textContent = "";
  $("evidence").hidden = true;
  $("evidence-empty").hidden = false;
  delete document.body.dataset.answer;
}

function paragraph(text) {
  const p = document.createElement("p");
  p.className = "empty";
  p.textContent = text;
  return p;
}

const percent = (p) => `${(100 * p).toFixed(1)}%`;

function showResult(result) {
  $("problem").textContent = "";
  const list = document.createElement("ol");
  list.className = "classes";
  list.append(...result.top.map((entry, index) => classRow(entry, index, result)));
  $("answer").replaceChildren(list);
  requestAnimationFrame(() => {
    for (const bar of list.querySelectorAll(".bar")) bar.style.width = bar.dataset.width;
  });
  const ms = result.milliseconds;
  $("time").textContent = ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(1)} s`;
  const spoken = result.top.map((entry) => `${entry.name} ${percent(entry.probability)}`);
  $("announce").textContent = `Answer: ${spoken.join(", ")}. Took ${$("time").textContent}.`;
  $("evidence").hidden = false;
  $("evidence-empty").hidden = true;
  showSeen(result);
  showMap(result, 0);
  document.body.dataset.answer = result.top[0].name;
  if ($("answer").getBoundingClientRect().bottom > innerHeight) {
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    $("answer").closest(".card").scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
  }
}

function classRow(entry, index, result) {
  const row = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  const bar = document.createElement("span");
  bar.className = "bar";
  bar.dataset.width = percent(entry.probability);
  const name = document.createElement("span");
  name.textContent = entry.name;
  const value = document.createElement("span");
  value.className = "percent";
  value.textContent = percent(entry.probability);
  button.append(bar, name, value);
  if (entry.map) button.addEventListener("click", () => showMap(result, index));
  else button.disabled = true;
  row.append(button);
  return row;
}

/** Pixels of the network's input that one value of a map stands for; 0 without maps. */
function patchSide(result) {
  return result.columns ? Math.floor(model.preprocessing.img_size / result.columns) : 0;
}

/** Draw what the network saw, with the patches it cut it into. */
function showSeen(result) {
  const size = model.preprocessing.img_size;
  const patch = patchSide(result);
  const context = $("seen").getContext("2d");
  context.imageSmoothingEnabled = size > 128;
  context.drawImage(result.seen, 0, 0, GRID, GRID);
  if (patch > 1) drawGrid(context, result.columns, result.rows, (patch * GRID) / size);
  const count = result.rows ? `${result.rows} × ${result.columns} patches of ${patch} × ${patch} pixels` : "";
  $("seen-text").textContent = count || `${size} × ${size} pixels`;
  $("seen").setAttribute("aria-label", `The picture as the network saw it: ${size} by ${size} pixels, ${count}`);
}

function drawGrid(context, columns, rows, step) {
  context.lineWidth = 1;
  for (const [offset, colour] of [[0, "#ffffff59"], [1, "#00000040"]]) {
    context.strokeStyle = colour;
    context.beginPath();
    for (let i = 1; i < columns; i++) context.rect(Math.round(i * step) + offset, 0, 0, GRID);
    for (let i = 1; i < rows; i++) context.rect(0, Math.round(i * step) + offset, GRID, 0);
    context.stroke();
  }
}

/** Lay the class-activation map of one of the top classes over the picture. */
function showMap(result, index) {
  shown = { result, index };
  const { name, map } = result.top[index];
  $("map-figure").hidden = $("explanation").hidden = !map;
  document.querySelectorAll(".classes button").forEach((b, i) => b.setAttribute("aria-pressed", String(i === index && !!map)));
  if (!map) return;
  const context = $("map").getContext("2d");
  const size = model.preprocessing.img_size;
  const step = (patchSide(result) * GRID) / size;
  context.imageSmoothingEnabled = size > 128;
  context.filter = "grayscale(1)";
  context.drawImage(result.seen, 0, 0, GRID, GRID);
  context.filter = "none";
  context.fillStyle = matchMedia("(prefers-color-scheme: dark)").matches ? "#00000066" : "#ffffff66";
  context.fillRect(0, 0, GRID, GRID);
  context.imageSmoothingEnabled = false; // one value per patch, and nothing in between
  context.drawImage(heat(map, result.columns, result.rows), 0, 0, step * result.columns, step * result.rows);
  describeMap(name, map, result);
}

/** A rows x columns canvas: orange speaks for the class, blue against, clear is nothing. */
function heat(map, columns, rows) {
  const most = Math.max(...map.map(Math.abs)) || 1;
  const pixels = new ImageData(columns, rows);
  map.forEach((value, i) => {
    pixels.data.set(value >= 0 ? [240, 106, 18] : [31, 111, 224], 4 * i);
    pixels.data[4 * i + 3] = Math.round(225 * Math.abs(value / most) ** 0.8);
  });
  const canvas = document.createElement("canvas");
  canvas.width = columns;
  canvas.height = rows;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

function describeMap(name, map, { columns, rows }) {
  const best = map.indexOf(Math.max(...map));
  const third = (at, count, names) => names[Math.min(2, Math.floor((3 * (at + 0.5)) / count))];
  const vertical = third(Math.floor(best / columns), rows, ["top", "middle", "bottom"]);
  const horizontal = third(best % columns, columns, ["left", "centre", "right"]);
  const bold = document.createElement("b");
  bold.textContent = name;
  $("map-text").replaceChildren("Evidence for ", bold);
  $("map").setAttribute("aria-label", `Class-activation map for ${name}: strongest at the ${vertical} ${horizontal}`);
  $("explanation").textContent =
    `Orange patches speak for ${name}, blue ones against. The map is exact: its mean plus a constant is the score of ` +
    "the class. Choose another class above to see its map.";
}

function imageIn(transfer) {
  return [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/")) ?? transfer?.files?.[0];
}

for (const id of ["file", "camera"]) {
  $(id).addEventListener("change", (event) => {
    const file = event.target.files[0];
    if (file) classify(file, file.name);
    event.target.value = ""; // so that the same file can be chosen again
  });
}
$("choose").addEventListener("click", () => $("file").click());
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const file = imageIn(event.dataTransfer);
  if (file) classify(file, file.name);
  else $("problem").textContent = "That was not a picture file.";
});
document.addEventListener("paste", (event) => {
  const file = imageIn(event.clipboardData);
  if (file) classify(file, "Pasted picture");
});
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  classifier.token = $("token").value;
  start();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (shown) showMap(shown.result, shown.index);
});
start();
