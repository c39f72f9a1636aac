// The panel below the viewer: a prompt, its proposals to step through, slices to accept, the next sample, training.
// Loaded by /ohif/app-config.js. If the viewer has changed, the panel stays away and says so in the console.

import { sleep } from './browser.js';
import { Panel } from './controller.js';
import { mendExport } from './exports.js';
import { getInfo, listPrompts, listStructures } from './server.js';
import { findActive, findMissing } from './viewer.js';

const WATCH_MS = 700;
const GIVE_UP_MS = 60000;

async function start() {
  const deadline = performance.now() + GIVE_UP_MS;
  while (findMissing().length) {
    if (performance.now() > deadline) {
      console.warn(`ProGiDiff panel: this viewer lacks ${findMissing().join(', ')}; the panel stays away.`);
      return;
    }
    await sleep(WATCH_MS);
  }
  mendExport();
  /** @type {Panel|null} */
  let panel = null;
  for (;;) {
    try {
      const series = findActive();
      if (series && !panel) panel = new Panel(await listPrompts(), await getInfo(), (await listStructures()).structures);
      panel?.follow(series);
    } catch (error) {
      console.warn('ProGiDiff panel', error);
    }
    await sleep(WATCH_MS);
  }
}

start();
