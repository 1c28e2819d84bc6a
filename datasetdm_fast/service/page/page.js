"use strict";
// One prompt to the service, and what comes back as pictures.
const by = (id) => document.getElementById(id);

async function describe() {
  const facts = await (await fetch("/healthz")).json();
  by("model").textContent = `${facts.model}, ${facts.size} × ${facts.size} pixels`;
  for (const name of facts.labels) {
    const label = document.createElement("label"), box = document.createElement("input");
    Object.assign(box, { type: "checkbox", value: name, checked: true });
    label.append(box, name);
    by("labels").append(label);
  }
}

function figure(png, text) {
  const figure = document.createElement("figure"), image = new Image(), caption = document.createElement("figcaption");
  image.src = `data:image/png;base64,${png}`;
  image.alt = caption.textContent = text;
  figure.append(image, caption);
  return figure;
}

function describeLabel(name, label) {
  if (!label.coco) return name;
  const names = Object.fromEntries(label.coco.categories.map((each) => [each.id, each.name]));
  return `${name}: ${label.coco.annotations.map((each) => names[each.category_id]).join(", ") || "none"}`;
}

async function generate(event) {
  event.preventDefault();
  const labels = [...by("labels").querySelectorAll("input:checked")].map((box) => box.value);
  const body = { prompt: by("prompt").value, negative_prompt: by("negative").value, labels, preview: true };
  if (by("seed").value) body.seed = Number(by("seed").value);
  const headers = { "Content-Type": "application/json" };
  if (by("token").value) headers.Authorization = `Bearer ${by("token").value}`;
  const begin = performance.now();
  by("status").textContent = "…";
  const answer = await fetch("/v1/images/generations", { method: "POST", headers, body: JSON.stringify(body) });
  const content = await answer.json();
  if (!answer.ok) {
    by("status").textContent = content.error.message;
    return;
  }
  const [sample] = content.data;
  const doubts = sample.doubts?.length ? `; doubtful: ${sample.doubts.join(", ")}` : "";
  by("status").textContent = `seed ${sample.seed}, ${((performance.now() - begin) / 1000).toFixed(1)} s${doubts}`;
  const shown = Object.entries(sample.labels).map(([name, label]) => figure(label.preview, describeLabel(name, label)));
  by("pictures").replaceChildren(figure(sample.b64_json, sample.prompt), ...shown);
}

by("form").addEventListener("submit", (event) => generate(event).catch((error) => { by("status").textContent = error; }));
describe();
