// Several files as one ZIP, stored as they are: a folder of DICOM files is sent as one. The format is that of PKWARE's APPNOTE, without
// ZIP64, so that it holds less than 4 GiB and 65536 files.

/** @typedef {{name: string, bytes: Uint8Array<ArrayBuffer>}} Entry */

const MAX_BYTES = 0xffffffff;
const MAX_FILES = 0xffff;
const [LOCAL, CENTRAL, END] = [0x04034b50, 0x02014b50, 0x06054b50];
const UTF8_NAMES = 0x0800;
/** 1 January 1980: nobody needs the time, and the same files become the same archive. */
const DATE = 0x21;

const TABLE = Uint32Array.from({ length: 256 }, (_, value) => {
  for (let bit = 0; bit < 8; bit += 1) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

/** @param {Uint8Array} bytes @returns {number} CRC-32 */
export function computeCrc(bytes) {
  let crc = 0xffffffff;
  for (let i = 0; i < bytes.length; i += 1) crc = (crc >>> 8) ^ TABLE[(crc ^ bytes[i]) & 0xff];
  return (crc ^ 0xffffffff) >>> 0;
}

/**
 * A record of numbers.
 * @param {readonly [bytes: 2|4, value: number][]} fields
 * @returns {Uint8Array<ArrayBuffer>}
 */
function pack(fields) {
  const record = new Uint8Array(fields.reduce((sum, [bytes]) => sum + bytes, 0));
  const view = new DataView(record.buffer);
  let offset = 0;
  for (const [bytes, value] of fields) {
    if (bytes === 2) view.setUint16(offset, value, true);
    else view.setUint32(offset, value, true);
    offset += bytes;
  }
  return record;
}

/**
 * @param {readonly Entry[]} entries
 * @returns {Uint8Array<ArrayBuffer>[]} pieces of the archive, in order
 */
export function zipFiles(entries) {
  const total = entries.reduce((sum, { bytes }) => sum + bytes.length, 0);
  if (entries.length > MAX_FILES || total > MAX_BYTES - (1 << 26)) throw new Error("This folder is larger than 4 GB or 65535 files. Pack it into a zip file yourself and add that.");
  const [pieces, directory] = [/** @type {Uint8Array<ArrayBuffer>[]} */ ([]), /** @type {Uint8Array<ArrayBuffer>[]} */ ([])];
  let offset = 0;
  for (const { name, bytes } of entries) {
    const label = new TextEncoder().encode(name);
    /** @type {[2|4, number][]} */
    const common = [[2, 20], [2, UTF8_NAMES], [2, 0], [2, 0], [2, DATE], [4, computeCrc(bytes)], [4, bytes.length], [4, bytes.length], [2, label.length], [2, 0]];
    const head = pack([[4, LOCAL], ...common]);
    pieces.push(head, label, bytes);
    directory.push(pack([[4, CENTRAL], [2, 20], ...common, [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]]), label);
    offset += head.length + label.length + bytes.length;
  }
  const size = directory.reduce((sum, { length }) => sum + length, 0);
  const end = pack([[4, END], [2, 0], [2, 0], [2, entries.length], [2, entries.length], [4, size], [4, offset], [2, 0]]);
  return [...pieces, ...directory, end];
}
