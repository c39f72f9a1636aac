// Small things of the browser that several parts of the panel need.

const CLIENT = 'progidiff.client';

/** @param {number} ms @returns {Promise<void>} */
export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** 24 hexadecimal digits that nobody else has. */
export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, '0')).join('');

/** The name of this tab with the server: images are reserved for it. */
export function clientId() {
  const known = sessionStorage.getItem(CLIENT) || `ohif-${newId()}`;
  sessionStorage.setItem(CLIENT, known);
  return known;
}
