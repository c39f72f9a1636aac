// Failures that a person has to know about: what happened, what is kept, and what to do.

import { isAborted, kindOf, listJobs, loginAddress, messageOf } from "./api.js";
import { clearNotice, notice } from "./dom.js";
import { state } from "./state.js";

const RETRY_MS = 4000;

let back = () => {};
/**
 * Call back when the server answers again after it did not.
 * @param {() => void} callback
 */
export function onBack(callback) {
  back = callback;
}

/** @param {unknown} error */
export function report(error) {
  if (isAborted(error)) return;
  const kind = kindOf(error);
  if (!kind) console.error(error);
  const pending = state.work?.hasDecisions ? " Your decisions are kept in this browser." : "";
  if (kind === "offline") {
    notice(messageOf(error), "bad", [["Try now", retry]]);
    scheduleRetry();
  } else if (kind === "login") {
    notice(`Your login has expired.${pending} Log in, then go on here.`, "bad", [["Log in", () => void window.open(loginAddress(), "_blank", "noopener")]]);
  } else {
    notice(messageOf(error) + (kind === "forbidden" ? pending : ""), "bad", [["Close", clearNotice]]);
  }
}

/** @type {ReturnType<typeof setTimeout>|undefined} */
let retryTimer;
function scheduleRetry() {
  clearTimeout(retryTimer);
  retryTimer = setTimeout(retry, RETRY_MS);
}

async function retry() {
  clearTimeout(retryTimer);
  try {
    await listJobs();
  } catch (error) {
    if (kindOf(error) === "offline") scheduleRetry();
    else report(error);
    return;
  }
  clearNotice();
  back();
}
