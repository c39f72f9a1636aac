// Adding images: files and folders that are dropped on the page or chosen, one after the other, with what became of each.

import { addImage, messageOf } from "./api.js";
import { element, find, findInput } from "./dom.js";
import { state } from "./state.js";
import { zipFiles } from "./zip.js";

/** @typedef {{name: string, files: File[], isFolder: boolean}} Bundle one image: a file, or the files of a folder */

/** @type {() => Promise<void>} */
let added = async () => {};
/**
 * Call back when an image was added.
 * @param {typeof added} callback
 */
export function onAdded(callback) {
  added = callback;
}

/** @param {FileSystemEntry} entry @returns {Promise<File[]>} the files of a dropped folder, however deep */
async function listFiles(entry) {
  if (entry.isFile) return [await new Promise((done, fail) => /** @type {FileSystemFileEntry} */ (entry).file(done, fail))];
  const reader = /** @type {FileSystemDirectoryEntry} */ (entry).createReader();
  const files = [];
  for (;;) {
    /** @type {FileSystemEntry[]} */
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) return files;
    for (const inner of some) files.push(...(await listFiles(inner)));
  }
}

/** @param {DataTransfer} transfer @returns {Promise<Bundle[]>} */
async function readDrop(transfer) {
  // The list is empty after the first await. What comes out of another program, as a mail's attachment does, is no entry of a disk.
  const dropped = [...transfer.items].flatMap((item) => item.webkitGetAsEntry() ?? item.getAsFile() ?? []);
  return Promise.all(
    dropped.map(async (one) => (one instanceof File ? { name: one.name, files: [one], isFolder: false } : { name: one.name, files: await listFiles(one), isFolder: one.isDirectory })),
  );
}

/**
 * What a folder holds as images: files of a served format each by itself, all others together as one series.
 * @param {Bundle} bundle
 * @returns {Bundle[]}
 */
function splitFolder(bundle) {
  if (!bundle.isFolder) return [bundle];
  const formats = state.worklist?.formats ?? [];
  /** @type {(file: File) => boolean} */
  const isImage = (file) => formats.some((suffix) => file.name.toLowerCase().endsWith(suffix));
  const others = bundle.files.filter((file) => !isImage(file));
  const images = bundle.files.filter(isImage).map((file) => ({ name: file.name, files: [file], isFolder: false }));
  return [...images, ...(others.length ? [{ ...bundle, files: others }] : [])];
}

/** @param {Bundle} bundle @returns {Promise<File>} */
async function packBundle({ name, files, isFolder }) {
  if (!isFolder) return files[0];
  const entries = await Promise.all(files.map(async (file, index) => ({ name: `${String(index).padStart(5, "0")}-${file.name}`, bytes: new Uint8Array(await file.arrayBuffer()) })));
  return new File(zipFiles(entries), `${name}.zip`, { type: "application/zip" });
}

/** @param {readonly Bundle[]} bundles */
async function addAll(bundles) {
  const list = find("adding-list");
  for (const bundle of bundles.flatMap(splitFolder)) {
    const bar = element("progress", { max: 1, value: 0 });
    const told = element("span", {}, "packing …");
    list.prepend(element("li", {}, element("strong", {}, bundle.name), bar, told));
    try {
      const file = await packBundle(bundle);
      const { image } = await addImage(file, (share) => {
        bar.value = share;
        told.textContent = share < 1 ? `${Math.round(100 * share)} %` : "checking …";
      });
      told.textContent = `added as ${image}`;
      await added();
    } catch (error) {
      told.className = "prompt-error";
      told.textContent = messageOf(error);
    }
    bar.hidden = true;
  }
}

export function listenToDrops() {
  const dialog = find("adding", HTMLDialogElement);
  const open = () => {
    find("adding-formats").textContent = `${(state.worklist?.formats ?? []).join(", ")}; a DICOM series as a folder or as a zip file.`;
    if (!dialog.open) dialog.showModal();
  };
  find("adding-open").addEventListener("click", open);
  for (const id of ["adding-files", "adding-folder"]) {
    const input = findInput(id);
    input.addEventListener("change", () => {
      const files = [...(input.files ?? [])];
      const folder = files[0]?.webkitRelativePath.split("/")[0];
      void addAll(folder ? [{ name: folder, files, isFolder: true }] : files.map((file) => ({ name: file.name, files: [file], isFolder: false })));
      input.value = "";
    });
  }
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", async (event) => {
    event.preventDefault();
    if (!event.dataTransfer?.items.length) return;
    const dropped = readDrop(event.dataTransfer);
    open();
    await addAll(await dropped);
  });
}
