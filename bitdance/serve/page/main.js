// The page: the form asks, the stage shows what grows, the gallery keeps what is done.

import { Api, ApiError } from "./api.js";
import { change, openEditor } from "./editor.js";
import { fields, fit, forgetMore, restore, showDefaults, written } from "./form.js";
import * as gallery from "./gallery.js";
import { Job, cancelAll, saved, state } from "./jobs.js";
import { settingsOf } from "./png.js";

const $ = (id) => document.getElementById(id);
const PREVIEWS = 64; // as many as the server's share of time for them allows
const api = new Api("", sessionStorage.getItem("bitdance-key") ?? "");
let model = null;
let shown = null; // the picture of the detail dialog: {id, blob, said}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function complain(error) {
  const locked = error instanceof ApiError && error.status === 401;
  if (locked) {
    $("key-field").hidden = false;
    $("key").focus();
  }
  say(locked ? "This server wants an API key." : error instanceof ApiError ? error.message : "The server does not answer.", true);
}

async function connect() {
  try {
    model = await api.model();
  } catch (error) {
    return complain(error);
  }
  $("key-field").hidden = true;
  $("model").textContent = `${model.id}, ${model.kind.replaceAll("_", " ")}, ${model.dtype}`;
  fit(model);
  say("");
  for (const old of saved()) {
    const job = new Job(api, old, events);
    job.run(async function* () {}).catch(() => {}); // its stream is closed: it comes back, if the server still has it
  }
}

const events = {
  made: async (blob, note, id, seed) => {
    if (seed !== null && !$("lock").checked) $("seed").value = seed;
    await gallery.keep(id, blob, note);
    await draw();
  },
  changed: (text) => {
    const now = state();
    $("cancel").disabled = !now;
    if (text ?? now) say(text ?? now);
  },
};

/** Ask for pictures, and say how it ended. */
async function start(server, request, title, ask, into) {
  const [width, height] = (request.size ?? model.defaults.size).split(/[x×]/);
  const shape = width > 0 && height > 0 ? `${Number(width)} / ${Number(height)}` : "1";
  const job = new Job(server, { count: request.n ?? 1, title, shape, into }, events);
  try {
    await job.run(ask);
    say(job.cancelled ? "Cancelled." : `Done in ${((performance.now() - job.begun) / 1000).toFixed(1)} s.`);
  } catch (error) {
    complain(error);
  }
  events.changed();
}

function make() {
  if (!model) return connect();
  if (!$("lock").checked) $("seed").value = "";
  const request = fields();
  const asked = [[api, request, $("beside").value ? name(request.preset) : ""]];
  if ($("beside").value) {
    // Two pictures are compared at the same seed, so one is drawn here where none is given.
    request.seed ??= String(crypto.getRandomValues(new Uint32Array(1))[0]);
    if ($("beside").value === "other") {
      const { n, seed, size, prompt, class_label } = request;
      asked.push([new Api($("other").value), { n, seed, size, prompt, class_label }, "other server"]);
    } else asked.push([api, { ...request, preset: $("beside").value }, name($("beside").value)]);
  }
  let into;
  if (asked.length > 1) {
    into = document.createElement("div");
    into.className = "beside";
    $("stage").prepend(into);
  }
  for (const [server, one, title] of asked.reverse()) {
    start(server, one, title, (id) => server.generate({ ...one, job: id, stream: true, previews: PREVIEWS }), into);
  }
  say("Asking…");
}

function name(preset) {
  return preset ? `preset ${preset}` : "model's own";
}

async function draw() {
  const kept = await gallery.all().catch(() => []);
  const ticked = new Set(ticks().map((tick) => tick.value));
  document.querySelectorAll("#gallery img").forEach((image) => URL.revokeObjectURL(image.src));
  $("gallery").replaceChildren(...kept.map((picture) => item(picture, ticked.has(picture.id))));
  $("clear").disabled = !kept.length;
  countTicks();
}

function item({ id, blob, note }, ticked) {
  const [entry, button, image, tick] = ["li", "button", "img", "input"].map((tag) => document.createElement(tag));
  button.type = "button";
  button.append(image);
  button.addEventListener("click", () => open(id, blob));
  Object.assign(image, { src: URL.createObjectURL(blob), alt: note, loading: "lazy" });
  Object.assign(tick, { type: "checkbox", value: id, checked: ticked });
  tick.setAttribute("aria-label", `Compare: ${note}`);
  tick.addEventListener("change", countTicks);
  entry.append(button, tick);
  return entry;
}

function ticks() {
  return [...document.querySelectorAll("#gallery input:checked")];
}

function countTicks() {
  $("compare").disabled = ticks().length !== 2;
}

/** Show a picture and how it was made. `id`: in the gallery, null for a file. */
async function open(id, blob) {
  const said = await settingsOf(blob);
  shown = { id, blob, said };
  $("detail-picture").src = $("save").href = URL.createObjectURL(blob);
  $("detail-picture").alt = said?.prompt ?? "The picture";
  $("save").download = `bitdance-${said?.seed ?? "picture"}.png`;
  $("detail-settings").replaceChildren(...Object.entries(said ?? { settings: "This picture says nothing of how it was made." }).flatMap(([key, value]) => {
    const [term, text] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = key.replaceAll("_", " ");
    text.textContent = typeof value === "string" ? value : JSON.stringify(value);
    return [term, text];
  }));
  $("use").hidden = !said;
  $("forget").hidden = id === null;
  $("edit").hidden = !model?.can_edit;
  $("detail").showModal();
}

/** Fill the form from a picture; what somebody has written there is not overwritten unasked. */
async function use(said) {
  if (written() && !(await ask("Replace what the form says by the settings of this picture?"))) return;
  say(restore(said));
  $("make").focus();
}

async function dropped(file) {
  const said = file && (await settingsOf(file));
  if (said) return use(said);
  if (file && model?.can_edit) return openEditor(file, null, model);
  say(file ? "This file holds no settings; a PNG that bitdance made does." : "Drop a file.", true);
}

/** A question with yes and no → whether the answer was yes. */
function ask(question) {
  $("ask-text").textContent = question;
  $("ask").returnValue = "";
  $("ask").showModal();
  return new Promise((resolve) => $("ask").addEventListener("close", () => resolve($("ask").returnValue === "yes"), { once: true }));
}

async function compare() {
  const ids = new Set(ticks().map((tick) => tick.value));
  const [over, under] = (await gallery.all()).filter((picture) => ids.has(picture.id));
  for (const [id, { blob, note }] of [["over", over], ["under", under]]) {
    $(id).src = URL.createObjectURL(blob);
    $(id).alt = note;
  }
  $("slider-names").textContent = `Left: ${under.note}. Right: ${over.note}.`;
  $("slider").showModal();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  make();
});
$("cancel").addEventListener("click", cancelAll);
$("preset").addEventListener("change", showDefaults);
$("beside").addEventListener("change", () => ($("other-field").hidden = $("other").disabled = $("beside").value !== "other"));
$("forget-more").addEventListener("click", forgetMore);
$("lock").addEventListener("change", () => $("lock").checked && !$("seed").value && say("The seed of the next pictures will be kept."));
$("seed").addEventListener("input", () => ($("lock").checked = Boolean($("seed").value)));
$("key").addEventListener("change", () => {
  api.key = $("key").value;
  sessionStorage.setItem("bitdance-key", api.key);
  connect();
});
$("file").addEventListener("change", async () => {
  await dropped($("file").files[0]);
  $("file").value = "";
});
$("split").addEventListener("input", () => $("slider").style.setProperty("--split", `${$("split").value}%`));
$("compare").addEventListener("click", compare);
$("clear").addEventListener("click", async () => {
  if (await ask("Forget all pictures that were made here?")) await gallery.forgetAll().then(draw);
});
$("use").addEventListener("click", async () => {
  $("detail").close();
  await use(shown.said);
});
$("forget").addEventListener("click", async () => {
  $("detail").close();
  await gallery.forget(shown.id).then(draw);
});
$("edit").addEventListener("click", async () => {
  $("detail").close();
  await openEditor(shown.blob, shown.said, model);
});
$("change").addEventListener("click", async () => {
  if (!$("strength").reportValidity()) return;
  const { fields: said, files } = await change(model);
  $("editor").close();
  const { naturalWidth, naturalHeight } = $("edit-picture");
  const size = `${naturalWidth}x${naturalHeight}`;
  start(api, { size }, "changed", (id) => api.edit({ ...said, job: id, stream: true, previews: PREVIEWS }, files));
});
$("ask-yes").addEventListener("click", () => $("ask").close("yes"));
document.querySelectorAll("dialog .close").forEach((button) => button.addEventListener("click", () => button.closest("dialog").close()));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) $("form").requestSubmit(); // which checks the fields
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) cancelAll();
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  dropped(event.dataTransfer.files[0]);
});

draw();
connect();
