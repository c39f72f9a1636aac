// The review page: keys and buttons change the state, and what is shown follows from it. Here is what follows from what.

import { countSeconds } from "./activity.js";
import { watchConnection } from "./api.js";
import { chooseThumb, merge, toggleMember } from "./deciding.js";
import { find } from "./dom.js";
import { onBack, report } from "./failures.js";
import { fillKeys, listenToButtons, listenToKeys } from "./keyboard.js";
import { ModelPanel } from "./model.js";
import { goTo, selectStructure, toggleIncluded } from "./moving.js";
import { onChooseResult, renderKept } from "./kept.js";
import { addResult, askForSlices, openFromAddress, openImage, removeResult } from "./opening.js";
import { onDecide, renderHead, renderPanel } from "./panel.js";
import { listenToView } from "./pointer.js";
import { fillPrompts, renderJob } from "./prompting.js";
import { Queue, renderLeftOut } from "./queue.js";
import { offerAgain, useQueue } from "./saving.js";
import { fetchMissing, refresh } from "./stage.js";
import { state, store } from "./state.js";
import { onChoose } from "./strip.js";

const queue = new Queue(openImage, goTo);
const model = new ModelPanel();

store.watch(["session", "job", "isReadOnly"], renderHead);
store.watch(
  ["session", "info", "result", "work", "picks", "decisions", "z", "structure", "included", "scope", "isReadOnly", "isSubmitting"],
  renderPanel,
);
store.watch(
  ["session", "info", "result", "work", "picks", "decisions", "z", "structure", "included", "mode", "compared", "window", "preset", "zoom", "center",
    "isHidden", "isSavedShown"],
  refresh,
);
store.watch(["session", "info", "result", "work", "decisions"], () => queue.render());
store.watch(["session", "info", "result", "job", "isReadOnly"], renderKept);
store.watch(["leftOut"], renderLeftOut);
store.watch(["job"], renderJob);
store.watch(["job"], fetchMissing);

useQueue(queue);
askForSlices((image) => queue.slicesOf(image));
onChooseResult((key, isShown) => {
  const { session } = state;
  if (!session) return;
  if (isShown) addResult(session, key, true).catch(report);
  else removeResult(session, key);
});
onChoose(chooseThumb);
onDecide({ selectStructure, toggleIncluded, toggleMember, merge });
onBack(offerAgain);
watchConnection((isReachable) => {
  const dot = find("connection");
  dot.classList.toggle("lost", !isReachable);
  dot.title = isReachable ? "The server answers" : "The server does not answer";
});
listenToView();
listenToKeys();
listenToButtons();
find("versions-open").addEventListener("click", () => model.open());
window.addEventListener("hashchange", openFromAddress);
fillKeys();
renderHead();
renderPanel();
countSeconds();
model.watch();
await Promise.all([queue.load(), fillPrompts()]);
openFromAddress();
