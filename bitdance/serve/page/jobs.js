// Jobs of the server: pictures that grow on the stage, their place in the queue and the time that is left, cancelling, coming back.

import { ApiError, newId } from "./api.js";

const POLL = 500; // milliseconds between questions about a job
const PENDING = "bitdance-pending"; // jobs of this server that were begun here and not seen to their end
const running = new Set();

/** A job on the stage. `made(blob, note, id, seed)` is told each finished picture (the seed of the first alone), `changed()` that something is new to say. */
export class Job {
  constructor(api, { count, title, shape, id = newId(), into = document.getElementById("stage") }, { made, changed }) {
    Object.assign(this, { api, count, title, id, made, changed, begun: performance.now(), place: null, wait: null, progress: 0, finished: 0 });
    this.started = null; // when its first picture was begun
    this.row = document.createElement("div");
    this.row.className = "job";
    this.row.style.setProperty("--shape", shape);
    this.cards = Array.from({ length: count }, () => new Card(this.row));
    into.prepend(this.row);
  }

  /** Ask for the pictures and show them as they come. Raises ApiError; a job that was cancelled raises nothing. */
  async run(ask) {
    running.add(this);
    this.#remember();
    const polling = setInterval(() => this.#poll(), POLL);
    try {
      try {
        for await (const event of ask(this.id)) this.#take(event);
      } catch (error) {
        if (error instanceof ApiError) throw error;
        this.changed("The connection was lost; asking for the pictures again.");
      }
      if (this.finished < this.count && !this.cancelled) await this.comeBack();
    } catch (error) {
      if (!this.cancelled) {
        this.row.remove();
        throw error;
      }
    } finally {
      clearInterval(polling);
      running.delete(this);
      this.#forget();
      this.cards.filter((card) => !card.blob).forEach((card) => card.remove());
      this.changed();
    }
  }

  /** Fetch the pictures of a job whose stream is closed. */
  async comeBack() {
    while (!this.cancelled) {
      let state = null;
      try {
        state = await this.api.job(this.id);
      } catch (error) {
        if (error instanceof ApiError) throw error; // gone: the server answers, and does not know it
      }
      if (state?.error) throw new ApiError(500, state.error.message);
      if (state?.result) {
        state.result.data.forEach((one, index) => this.#finish(index, one.b64_json, state.result.seeds[index]));
        return;
      }
      await new Promise((resolve) => setTimeout(resolve, POLL));
    }
  }

  cancel() {
    this.cancelled = true;
    this.api.cancel(this.id).catch(() => {});
  }

  /** Where it stands, in words. */
  say() {
    const name = this.title ? `${this.title}: ` : "";
    if (this.place !== null) return `${name}waiting, ${this.place} ${this.place === 1 ? "picture goes" : "pictures go"} first, about ${this.wait} s`;
    const left = this.progress > 0 ? ((performance.now() - this.started) / 1000) * (1 / this.progress - 1) : null;
    return `${name}${Math.round(this.progress * 100)} % drawn${left === null ? "" : `, about ${Math.max(1, Math.round(left))} s left`}`;
  }

  async #poll() {
    const state = await this.api.job(this.id).catch(() => null);
    if (!state || !running.has(this)) return;
    [this.place, this.wait, this.progress] = [state.position, state.estimated_seconds, state.progress];
    if (state.status === "running") this.started ??= performance.now();
    this.cards.forEach((card) => card.bar && (card.bar.value = this.progress));
    this.changed();
  }

  #take(event) {
    this.started ??= performance.now();
    if (event.type.endsWith(".completed")) this.#finish(event.index, event.b64_json, event.seed);
    else this.cards[event.index].show(blobOf(event.b64_json));
  }

  #finish(index, text, seed) {
    const card = this.cards[index];
    if (card.blob) return;
    const seconds = ((performance.now() - this.begun) / 1000).toFixed(1);
    const note = [this.title, `seed ${seed}`, `${seconds} s`].filter(Boolean).join(", ");
    card.finish(blobOf(text), note);
    this.finished += 1;
    this.made(card.blob, note, `${this.id}-${index}`, index ? null : seed);
  }

  #remember() {
    if (!this.api.base) save([...saved().filter((one) => one.id !== this.id), { id: this.id, count: this.count, title: this.title, shape: this.row.style.getPropertyValue("--shape") }]);
  }

  #forget() {
    save(saved().filter((one) => one.id !== this.id));
  }
}

/** A picture that grows. */
class Card {
  constructor(row) {
    this.figure = document.createElement("figure");
    this.figure.innerHTML = '<div class="blank"></div><figcaption><progress max="1" value="0" aria-label="Finished share"></progress></figcaption>';
    this.bar = this.figure.querySelector("progress");
    row.append(this.figure);
  }

  show(blob, alt = "An unfinished picture") {
    let image = this.figure.querySelector("img");
    if (!image) {
      image = document.createElement("img");
      this.figure.querySelector(".blank").replaceWith(image);
    }
    const old = image.src;
    image.src = URL.createObjectURL(blob);
    image.alt = alt;
    if (old) URL.revokeObjectURL(old);
    this.previews = (this.previews ?? 0) + 1;
    this.figure.dataset.previews = this.previews;
  }

  finish(blob, note) {
    this.show(blob, `A finished picture, ${note}`);
    this.blob = blob;
    this.bar.remove();
    this.bar = null;
    this.figure.querySelector("figcaption").textContent = note;
  }

  remove() {
    this.figure.remove();
  }
}

/** Cancel all that is not finished. */
export function cancelAll() {
  running.forEach((job) => job.cancel());
}

/** What runs, in words, "" for nothing. */
export function state() {
  return [...running].map((job) => job.say()).join("; ");
}

/** Jobs of an earlier visit, whose pictures can be fetched. */
export function saved() {
  try {
    return JSON.parse(localStorage.getItem(PENDING)) ?? [];
  } catch {
    return [];
  }
}

function save(jobs) {
  localStorage.setItem(PENDING, JSON.stringify(jobs.slice(-20)));
}

function blobOf(text) {
  return new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type: "image/png" });
}
