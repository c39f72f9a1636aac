// Failures that a person has to know about: what happened, what is kept, and what to do.

import * as api from "./api.js";
import { clearNotice, notice } from "./dom.js";
import { state } from "./state.js";

const RETRY_MS = 4000;

let back = () => {};
/** Call back when the server answers again after it did not. */
export function onBack(callback) {
  back = callback;
}

export function report(error) {
  if (error.name === "AbortError") return;
  if (!error.kind) console.error(error);
  const pending = state.work?.hasDecisions ? " Your decisions are kept in this browser." : "";
  if (error.kind === "offline") {
    notice(error.message, "bad", [["Try now", retry]]);
    scheduleRetry();
  } else if (error.kind === "login") {
    notice(`Your login has expired.${pending} Log in, then go on here.`, "bad", [["Log in", () => window.open(api.loginAddress(), "_blank", "noopener")]]);
  } else {
    notice(error.message + (error.kind === "forbidden" ? pending : ""), "bad", [["Close", clearNotice]]);
  }
}

let retryTimer = 0;
function scheduleRetry() {
  clearTimeout(retryTimer);
  retryTimer = setTimeout(retry, RETRY_MS);
}

async function retry() {
  clearTimeout(retryTimer);
  try {
    await api.getJson("progidiff/jobs");
  } catch (error) {
    if (error.kind === "offline") scheduleRetry();
    else report(error);
    return;
  }
  clearNotice();
  back();
}
