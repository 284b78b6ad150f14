// The server's public API: what it serves, pictures as a stream of events, jobs.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** An id that nobody guesses: whoever knows it may fetch the pictures of the job. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(18));
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_");
}

export class Api {
  /** `base`: address of a server, "" for the one of this page. */
  constructor(base = "", key = "") {
    this.base = base.replace(/\/+$/, "");
    this.key = key;
  }

  /** What the server says of its model, with the names of its classes. */
  model() {
    return this.#json("/v1/models/served");
  }

  /** How far a job is, and its pictures once it is done. */
  job(id) {
    return this.#json(`/v1/jobs/${id}`);
  }

  /** End a job, or forget a finished one. */
  cancel(id) {
    return this.#json(`/v1/jobs/${id}`, { method: "DELETE" });
  }

  /** Events of new pictures: {type: "….partial_image" or "….completed", b64_json, index, seed, …}. */
  generate(fields) {
    // A seed may have more digits than a number holds here, so it is kept as text and written as it is.
    const body = JSON.stringify(fields).replace(/"seed":"(\d+)"/, '"seed":$1');
    return this.#events("/v1/images/generations", { body, headers: { "content-type": "application/json" } });
  }

  /** The same of a picture that is changed; `files` has image and perhaps mask. */
  edit(fields, files) {
    const body = new FormData();
    for (const [name, value] of Object.entries(fields)) body.append(name, String(value));
    for (const [name, blob] of Object.entries(files)) body.append(name, blob, `${name}.png`);
    return this.#events("/v1/images/edits", { body, headers: {} });
  }

  async *#events(path, { body, headers }) {
    const answer = await this.#fetch(path, { method: "POST", body, headers });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      const parts = text.split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").find((line) => line.startsWith("data: "));
        if (!data) continue;
        const event = JSON.parse(data.slice(6));
        if (event.type === "error") throw new ApiError(500, event.error.message);
        yield event;
      }
    }
  }

  async #json(path, options = {}) {
    return (await this.#fetch(path, options)).json();
  }

  async #fetch(path, options) {
    const headers = { ...options.headers, ...(this.key && { authorization: `Bearer ${this.key}` }) };
    const answer = await fetch(this.base + path, { ...options, headers });
    if (answer.ok) return answer;
    const said = await answer.json().catch(() => null);
    throw new ApiError(answer.status, said?.error?.message ?? `the server answered ${answer.status}`);
  }
}
