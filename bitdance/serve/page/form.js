// The form ↔ the fields of a request, and what a picture says of itself → the form.

const $ = (id) => document.getElementById(id);
let model = null; // what the server says of its model
let more = {}; // settings that have no field in the form, from a picture

/** Fit the form to a model. */
export function fit(found) {
  model = found;
  const classes = model.class_names;
  for (const [id, shown] of [
    ["prompt-field", !classes],
    ["class-field", classes],
    ["negative-field", model.takes_negative_prompt],
  ]) $(id).hidden = !shown;
  for (const id of ["class", "edit-class"]) $(id).replaceChildren(...(classes ?? []).map((name, i) => new Option(name, i)));
  $("sizes").replaceChildren(...model.sizes.map((size) => new Option(size)));
  $("size").value ||= model.defaults.size;
  const presets = model.presets.map((name) => new Option(name, name));
  $("preset").replaceChildren(new Option("model's own", ""), ...presets);
  const others = presets.map((option) => new Option(`preset ${option.text}`, option.value));
  $("beside").replaceChildren(new Option("nothing", ""), ...others, new Option("another server", "other"));
  showDefaults();
}

/** Say what guidance and steps are where they are left empty. */
export function showDefaults() {
  const own = !$("preset").value;
  for (const name of ["guidance", "steps"]) $(name).placeholder = own ? (model.defaults[name] ?? "") : "of the preset";
}

/** The fields of a request. Only what the form says: everything else is the model's own. */
export function fields() {
  const found = { n: Number($("count").value || 1), ...more };
  if (model.class_names) found.class_label = $("class").value === "" ? null : Number($("class").value); // null: of another model
  else found.prompt = $("prompt").value;
  if (model.takes_negative_prompt && $("negative").value) found.negative_prompt = $("negative").value;
  if ($("size").value) found.size = $("size").value;
  if ($("seed").value) found.seed = $("seed").value;
  if ($("preset").value) found.preset = $("preset").value;
  for (const name of ["guidance", "steps"]) if ($(name).value) found[name] = Number($(name).value);
  return found;
}

/** Whether somebody has written something that new settings would overwrite. */
export function written() {
  return Boolean($("prompt").value || $("negative").value || $("guidance").value || $("steps").value || $("lock").checked);
}

/** Fill the form with what a picture says → a sentence about it. */
export function restore(said) {
  if (model.class_names) $("class").value = String(said.class ?? "");
  else $("prompt").value = said.prompt ?? "";
  $("negative").value = said.negative_prompt ?? "";
  if (said.width && said.height) $("size").value = `${said.width}x${said.height}`;
  $("seed").value = String(said.seed ?? "");
  $("lock").checked = "seed" in said;
  $("preset").value = "";
  $("count").value = 1;
  for (const name of ["guidance", "steps"]) $(name).value = name in model.defaults ? (said[name] ?? "") : "";
  // What a picture does not say it has as published, whatever the model's own defaults are.
  const value = (table, name) => table[name] ?? model.settings[name] ?? false;
  const others = Object.keys(model.settings).filter((name) => same(value(said, name)) !== same(value(model.defaults, name)));
  more = Object.fromEntries(others.map((name) => [name, value(said, name)]));
  showMore();
  if ("edit" in said) return "This is a changed picture: its settings make a new one, not this one.";
  if ("lora_fingerprint" in said) return "This picture was made with an adapter, which is not served: it will be another one.";
  const other = said.model_fingerprint && said.model_fingerprint !== model.fingerprint;
  return other ? `These settings are of another model, ${said.model}: the picture will be another one.` : "The settings are those of the picture.";
}

/** Forget the settings that have no field. */
export function forgetMore() {
  more = {};
  showMore();
}

function showMore() {
  $("more").textContent = Object.entries(more).map(([name, value]) => `${name} = ${same(value)}`).join(", ");
  $("more-field").hidden = !Object.keys(more).length;
}

function same(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}
