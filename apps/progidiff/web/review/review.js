// The review page: keys and buttons change the state, and what is shown follows from it. Here is what follows from what.

import { countSeconds } from "./activity.js";
import { listenToDrops, onAdded } from "./adding.js";
import { watchConnection } from "./api.js";
import { chooseThumb, merge, toggleMember } from "./deciding.js";
import { find } from "./dom.js";
import { renderEmpty } from "./empty.js";
import { onBack, report } from "./failures.js";
import { listenToFingers } from "./fingers.js";
import { fillKeys, listenToButtons, listenToKeys, perform } from "./keyboard.js";
import { ModelPanel } from "./model.js";
import { goTo, selectStructure, toggleIncluded } from "./moving.js";
import { onChooseResult, renderKept } from "./kept.js";
import { addResult, askForSlices, openFromAddress, openImage, removeResult } from "./opening.js";
import { onDecide, renderHead, renderPanel } from "./panel.js";
import { leaveDrawing, openDrawing } from "./painting.js";
import { listenToPen } from "./pen.js";
import { listenToView } from "./pointer.js";
import { listenToSentence, openSentence, renderSentence } from "./picture.js";
import { askAgain, openEdits } from "./steering.js";
import { listenToSteering } from "./steering_pen.js";
import { fillPrompts, renderJob } from "./prompting.js";
import { Queue, renderLeftOut } from "./queue.js";
import { loadReadings, onReadings, renderReadings } from "./readings.js";
import { offerAgain, useQueue } from "./saving.js";
import { fetchMissing, refresh } from "./stage.js";
import { state, store } from "./state.js";
import { onChoose } from "./strip.js";
import { listenToTeaching, loadStructures } from "./teaching.js";
import { buildToolbar, renderToolbar } from "./toolbar.js";
import { buildViews, insertViews, renderViews } from "./views.js";
import { buildToolstrip, renderToolstrip } from "./toolstrip.js";

const queue = new Queue(openImage, goTo);
const model = new ModelPanel();

store.watch(["session"], openSentence);
store.watch(["session", "info", "typed", "notes", "isReadOnly"], renderSentence);
store.watch(["isReadOnly"], leaveDrawing);
store.watch(["session", "isReadOnly"], openDrawing);
store.watch(["session", "isReadOnly"], openEdits);
// What is drawn is decided with everything else, whatever work that hangs on.
store.watch(["work", "drawing"], () => void (state.work && (state.work.drawing = state.drawing)));
store.watch(["session", "job", "isReadOnly"], renderHead);
store.watch(["session", "result", "work", "structure", "tool", "settings", "drawing", "added", "folder", "drawn", "window", "preset", "opacity", "areViewsShown", "isReadOnly", "info", "edits"], renderToolbar);
store.watch(
  ["session", "info", "result", "work", "picks", "decisions", "z", "structure", "included", "scope", "isReadOnly", "isSubmitting", "drawing", "drawn", "added", "folder", "typed", "edits"],
  renderPanel,
);
store.watch(
  ["session", "info", "result", "work", "picks", "decisions", "z", "structure", "included", "mode", "compared", "window", "preset", "zoom", "center",
    "isHidden", "isSavedShown", "drawing", "drawn", "added", "folder", "opacity", "inked", "readings", "edits"],
  refresh,
);
store.watch(["session", "info", "result", "work", "decisions", "drawn"], () => queue.render());
store.watch(["session", "info", "result", "job", "isReadOnly"], renderKept);
store.watch(["worklist", "session", "scoring", "leftOut"], renderEmpty);
store.watch(["isHidden", "isSavedShown"], renderToolstrip);
store.watch(["session"], () => void loadReadings());
store.watch(["readings"], renderReadings);
store.watch(["leftOut"], renderLeftOut);
store.watch(["job"], renderJob);
store.watch(["job"], fetchMissing);

store.watch(
  ["session", "info", "result", "z", "structure", "window", "isHidden", "opacity", "drawing", "drawn", "areViewsShown", "cross", "zoom", "center"],
  () => void renderViews(),
);

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
onBack(() => (askAgain(), offerAgain()));
watchConnection((isReachable) => {
  const dot = find("connection");
  dot.classList.toggle("lost", !isReachable);
  dot.title = isReachable ? "The server answers" : "The server does not answer";
});
listenToFingers(); // before the pens, and those before all others: each takes what is for it
listenToSteering();
listenToPen();
listenToView();
listenToKeys();
listenToButtons();
listenToSentence();
listenToDrops();
listenToTeaching();
onAdded(() => queue.load());
onReadings(goTo, () => queue.load());
buildToolstrip(perform);
renderToolstrip();
renderEmpty();
find("versions-open").addEventListener("click", () => model.open());
window.addEventListener("hashchange", openFromAddress);
fillKeys();
buildToolbar();
insertViews();
buildViews();
renderHead();
renderPanel();
countSeconds();
model.watch();
await Promise.all([queue.load(), fillPrompts(), loadStructures()]);
openFromAddress();
