// Seconds of work on an image: those in which somebody uses the page.

import { state } from "./state.js";

const IDLE_MS = 60000;

let lastActive = Date.now();

/** Somebody is here. */
export function noteActivity() {
  lastActive = Date.now();
}

/** Somebody clicked, or pressed a key that means something: for the structure that is worked on. */
export function noteClick() {
  noteActivity();
  state.work?.addClick(state.structure);
}

export function countSeconds() {
  setInterval(() => {
    const isActive = document.visibilityState === "visible" && Date.now() - lastActive < IDLE_MS;
    if (isActive) state.work?.addSeconds(1, state.structure);
  }, 1000);
}
