// Points and directions in LPS mm.

/** @typedef {ArrayLike<number>} Vector */

/** @param {Vector} values @returns {number[]} numbers, whatever DICOM's texts were */
export const toNumbers = (values) => Array.from(values, Number);

/** @param {Vector} a @param {Vector} b */
export const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];

/** @param {Vector} a @param {Vector} b @returns {number[]} */
export const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];

/** @param {number[]} a @param {number} factor */
export const scale = (a, factor) => a.map((value) => value * factor);
