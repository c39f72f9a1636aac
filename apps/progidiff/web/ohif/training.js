// Where the training stands, beside the version, without holding up the labelling.

import { sleep } from './browser.js';
import { getTraining } from './server.js';

const POLL_MS = 3000;

/** @param {import('./view.js').View} view */
export async function followTraining(view) {
  for (;;) {
    const { running, state, step, total, message } = await getTraining();
    if (!running) {
      view.training.textContent = '';
      view.say(message || `Training: ${state}`, state === 'done' ? 'done' : 'warning');
      return;
    }
    view.training.textContent = total ? `training ${step} of ${total}` : 'training';
    view.training.title = message || '';
    await sleep(POLL_MS);
  }
}
