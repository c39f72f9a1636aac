// A picture and its sentence: the field, what the model knows, what is not saved yet, and how it is saved. A sentence that was typed and not
// saved is kept in the browser, with the one that stood there when it was typed: nobody's sentence is replaced unseen.

import * as api from "./api.js";
import { clearNotice, element, find, findButton, findInput, notice, toast } from "./dom.js";
import { report } from "./failures.js";
import { describeHead, describeSentence, listWords, tidy } from "./sentences.js";
import { listStructures, state, store } from "./state.js";

/** @typedef {import("./session.js").ImageSession} ImageSession */
/** @typedef {import("./sentences.js").Typed} Typed */

const PREFIX = "progidiff.sentence.";

/** @param {string} image @returns {Typed|null} */
function recall(image) {
  try {
    const kept = JSON.parse(localStorage.getItem(PREFIX + image) ?? "null");
    return typeof kept?.text === "string" && typeof kept.former === "string" ? kept : null;
  } catch {
    return null;
  }
}

/**
 * @param {string} image
 * @param {Typed|null} typed
 */
function keep(image, typed) {
  try {
    if (typed) localStorage.setItem(PREFIX + image, JSON.stringify(typed));
    else localStorage.removeItem(PREFIX + image);
  } catch {
    // Private windows may refuse storage: the sentence is in the field until the tab is closed.
  }
}

/** Fill the field for the image that was opened. */
export function openSentence() {
  const { session } = state;
  document.body.dataset.kind = session?.picture ? "picture" : "volume";
  if (!session?.picture) {
    store.set({ typed: null, notes: [] });
    return;
  }
  const { sentence } = session.picture.sentence;
  const kept = recall(session.image);
  const typed = kept && kept.text !== sentence ? kept : null;
  if (!typed) keep(session.image, null);
  findInput("sentence").value = typed?.text ?? sentence;
  store.set({ typed, notes: session.picture.notes });
}

/** What was typed is kept at once. */
function readTyped() {
  const { session } = state;
  if (!session?.picture) return;
  const text = tidy(findInput("sentence").value);
  const former = state.typed?.former ?? session.picture.sentence.sentence;
  const typed = text === session.picture.sentence.sentence ? null : { text, former };
  keep(session.image, typed);
  store.set({ typed });
}

/** Whether there is a sentence to save. */
export const isSentenceTyped = () => Boolean(state.session?.picture && state.typed && !state.isReadOnly);

/** What to ask the server for proposals of a picture. @returns {Record<string, unknown>} */
export function readQuestion() {
  const text = tidy(findInput("sentence").value);
  const version = state.session?.head?.name;
  return { ...(text ? { sentence: text } : { without_sentence: true }), ...(version ? { version } : {}) };
}

/**
 * Save the sentence that was typed, if one was.
 * @param {boolean} isRemoval whether an empty field is meant
 * @returns {Promise<boolean>} false if it is not saved, and why is on the screen
 */
export async function saveSentence(isRemoval = false) {
  const { session, typed } = state;
  if (!session?.picture || !typed || !isSentenceTyped()) return true;
  if (!typed.text && !isRemoval) {
    notice("The sentence is empty. Take it away from this picture?", "", [
      ["Take it away", () => (clearNotice(), void saveSentence(true))],
      ["Put it back", () => (clearNotice(), putBack())],
    ]);
    return false;
  }
  try {
    session.picture = { ...session.picture, sentence: await api.saveSentence(session.image, typed.text || null, typed.former) };
    keep(session.image, null);
    if (state.session === session) store.set({ typed: null });
    toast(typed.text ? "The sentence is saved." : "The sentence is taken away.", "good", 3);
    return true;
  } catch (error) {
    await tellRefused(error, session, typed);
    return false;
  }
}

/**
 * @param {unknown} error
 * @param {ImageSession} session
 * @param {Typed} typed
 */
async function tellRefused(error, session, typed) {
  if (api.kindOf(error) !== "conflict") {
    report(error);
    return;
  }
  const picture = await api.describePicture(session.image).catch(() => null);
  if (!picture || state.session !== session) {
    report(error);
    return;
  }
  session.picture = picture;
  store.touch("info");
  notice(api.messageOf(error), "bad", [
    ["Take that one", () => (clearNotice(), putBack())],
    ["Save mine", () => (clearNotice(), replaceWith(typed.text))],
  ]);
}

/** @param {string} text now that it is known what it replaces */
function replaceWith(text) {
  const { session } = state;
  if (!session?.picture) return;
  const typed = { text, former: session.picture.sentence.sentence };
  keep(session.image, typed);
  store.set({ typed });
  void saveSentence(!text);
}

/** The saved sentence again. */
export function putBack() {
  const { session } = state;
  if (!session?.picture) return;
  findInput("sentence").value = session.picture.sentence.sentence;
  keep(session.image, null);
  store.set({ typed: null });
}

function chooseHead() {
  const { session } = state;
  if (!session) return;
  session.headName = find("head", HTMLSelectElement).value;
  if (!listStructures().includes(state.structure)) store.set({ structure: session.classes[0] ?? "", compared: null });
  store.touch("info", "result");
}

export function listenToSentence() {
  findInput("sentence").addEventListener("input", readTyped);
  find("head").addEventListener("change", chooseHead);
  find("sentence-save").addEventListener("click", () => void saveSentence());
  find("sentence-back").addEventListener("click", putBack);
}

/** Show what is known of the sentence and of the model. */
export function renderSentence() {
  const { session, typed, notes } = state;
  const picture = session?.picture;
  if (!session || !picture) return;
  const { head } = session;
  const input = findInput("sentence");
  input.maxLength = picture.sentence.most_letters;
  const heads = find("head", HTMLSelectElement);
  heads.replaceChildren(...picture.heads.map(({ name, version, classes }) => element("option", { value: name }, `${version}: ${classes.join(", ")}`)));
  heads.value = head?.name ?? "";
  heads.hidden = picture.heads.length < 2;
  find("sentence-list").replaceChildren(...listWords(head).map((value) => element("option", { value })));
  find("class-list").replaceChildren(...session.classes.map((value) => element("option", { value })));
  find("sentence-state").textContent = describeSentence(picture.sentence, typed);
  find("sentence-about").textContent = describeHead(picture, head);
  for (const id of ["sentence-save", "sentence-back"]) find(id).hidden = !isSentenceTyped();
  findButton("sentence-save").disabled = Boolean(picture.sentence.problem);
  find("picture-notes").textContent = notes.join(" ");
  renderChanges(picture.sentence.changes);
}

/** @param {readonly import("../answers.d.ts").SentenceChange[]} changes */
function renderChanges(changes) {
  find("sentence-changes").hidden = changes.length === 0;
  find("sentence-changes-title").textContent = changes.length === 1 ? "changed once" : `changed ${changes.length} times`;
  find("sentence-changes-list").replaceChildren(
    ...changes.map(({ time, user, former }) => {
      const take = () => ((findInput("sentence").value = former), readTyped());
      const who = `${new Date(time).toLocaleString()}${user ? `, ${user}` : ""}; before: `;
      return element("li", {}, who, element("q", {}, former || "nothing"), former && element("button", { type: "button", className: "small", on: { click: take } }, "Take it again"));
    }),
  );
}
