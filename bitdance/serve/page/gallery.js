// Pictures that were made here, kept in this browser: PNG files, which say themselves how they were made.

const MOST = 300;
const NAME = "bitdance";

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Do something with the store of pictures, and return what that gives. */
async function withStore(mode, action) {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction("pictures", mode);
      const request = action(transaction.objectStore("pictures"));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = transaction.onerror = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

/** Keep a picture under its id, once. */
export function keep(id, blob, note) {
  return withStore("readwrite", (store) => store.put({ id, blob, note, time: Date.now() }));
}

/** All pictures, the newest first. Beyond the most that are kept, the oldest are forgotten. */
export async function all() {
  const found = (await withStore("readonly", (store) => store.getAll())).sort((a, b) => b.time - a.time);
  for (const old of found.splice(MOST)) await forget(old.id);
  return found;
}

export function forget(id) {
  return withStore("readwrite", (store) => store.delete(id));
}

export function forgetAll() {
  return withStore("readwrite", (store) => store.clear());
}
