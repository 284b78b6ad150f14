// The settings in a PNG: JSON in its iTXt chunk `bitdance`.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

/** The settings of a PNG file, null where it holds none or is no PNG. The seed is a text, for it may have more digits than a number. */
export async function settingsOf(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (bytes.length < 8 || SIGNATURE.some((value, i) => bytes[i] !== value)) return null;
  const view = new DataView(bytes.buffer);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const end = at + 8 + length;
    const type = latin(bytes.subarray(at + 4, at + 8));
    if (type === "IEND" || end > bytes.length) return null;
    if (type === "iTXt") {
      const text = await international(bytes.subarray(at + 8, end), "bitdance");
      if (text !== null) return parsed(text);
    }
    at = end + 4;
  }
  return null;
}

function parsed(text) {
  try {
    const found = JSON.parse(text.replace(/"seed": ?(\d+)/, '"seed": "$1"'));
    return found !== null && typeof found === "object" && !Array.isArray(found) ? found : null;
  } catch {
    return null;
  }
}

/** The text of an iTXt chunk: keyword, 0, compressed?, method, language, 0, translated keyword, 0, text. */
async function international(chunk, keyword) {
  const zero = chunk.indexOf(0);
  if (zero < 0 || latin(chunk.subarray(0, zero)) !== keyword) return null;
  const language = chunk.indexOf(0, zero + 3);
  const translated = chunk.indexOf(0, language + 1);
  if (language < 0 || translated < 0) return null;
  let text = new Blob([chunk.subarray(translated + 1)]);
  if (chunk[zero + 1] === 1) {
    text = await new Response(text.stream().pipeThrough(new DecompressionStream("deflate"))).blob().catch(() => new Blob());
  }
  return text.text();
}

function latin(bytes) {
  return String.fromCharCode(...bytes);
}
