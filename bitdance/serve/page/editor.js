// The dialog that changes a picture: a brush for what is drawn anew, prompt or class, strength.

const $ = (id) => document.getElementById(id);
let blob = null;
let painting = null; // the last place of the brush

/** Open the dialog on a picture. `said`: its settings. */
export async function openEditor(picture, said, model) {
  blob = picture;
  const image = $("edit-picture");
  image.src = URL.createObjectURL(blob);
  await image.decode();
  const canvas = $("mask");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const has = (name) => model.edit_fields.includes(name);
  $("brush-part").hidden = $("brush-tools").hidden = canvas.hidden = !has("mask");
  $("strength-field").hidden = !has("strength");
  $("edit-prompt-field").hidden = Boolean(model.class_names);
  $("edit-class-field").hidden = !model.class_names;
  $("edit-prompt").value = said?.prompt ?? "";
  $("edit-class").value = String(said?.class ?? 0);
  $("editor").showModal();
}

/** The fields and files of the request: {fields, files}. */
export async function change(model) {
  const fields = model.class_names ? { class_label: $("edit-class").value } : { prompt: $("edit-prompt").value };
  if (!$("strength-field").hidden && $("strength").value) fields.strength = $("strength").value;
  const mask = await painted();
  return { fields, files: { image: blob, ...(mask && { mask }) } };
}

/** OpenAI's mask of the paint: transparent where the picture is drawn anew. null without paint. */
async function painted() {
  const { width, height } = $("mask");
  const paint = $("mask").getContext("2d").getImageData(0, 0, width, height);
  if (!paint.data.some((value, i) => i % 4 === 3 && value > 127)) return null;
  const file = new OffscreenCanvas(width, height);
  for (let i = 3; i < paint.data.length; i += 4) paint.data[i] = paint.data[i] > 127 ? 0 : 255;
  file.getContext("2d").putImageData(paint, 0, 0);
  return file.convertToBlob({ type: "image/png" });
}

function brush(event) {
  const canvas = $("mask");
  const box = canvas.getBoundingClientRect();
  const scale = canvas.width / box.width;
  const here = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  const context = canvas.getContext("2d");
  context.strokeStyle = "#2557d6";
  context.lineWidth = (canvas.width * Number($("brush").value)) / 100;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  context.moveTo(...(painting ?? here));
  context.lineTo(...here);
  context.stroke();
  painting = here;
}

$("mask").addEventListener("pointerdown", (event) => {
  $("mask").setPointerCapture(event.pointerId);
  brush(event);
});
$("mask").addEventListener("pointermove", (event) => painting && brush(event));
for (const name of ["pointerup", "pointercancel"]) $("mask").addEventListener(name, () => (painting = null));
$("wipe").addEventListener("click", () => {
  const canvas = $("mask");
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
});
$("paint-all").addEventListener("click", () => {
  const context = $("mask").getContext("2d");
  context.fillStyle = "#2557d6";
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
});
