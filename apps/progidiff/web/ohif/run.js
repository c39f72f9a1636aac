// One prompt on its way: what the server says of it, and the slices that are ready, until the answer is here.

import { clientId, newId, sleep } from './browser.js';
import { CONSENSUS } from './proposals.js';
import { cancelJob, getJob, getMask, propose } from './server.js';

/** @typedef {import('../answers.d.ts').Job} Job */

const POLL_MS = 400;

/** @param {Job} job what a job does, or what it waits for */
export function describeJob(job) {
  if (job.state === 'queued' && job.waiting_for) return `Waiting for ${job.waiting_for}`;
  return job.position > 0 ? `${job.position} before you` : `${job.slices_done} of ${job.slices_total} slices`;
}

export class Run {
  #id = newId();
  #isOver = false;

  /**
   * @param {import('./labelling.js').Labelling} labelling
   * @param {() => boolean} isWanted whether the viewer still shows its series
   * @param {(job: Job) => void} onProgress
   */
  constructor(labelling, isWanted, onProgress) {
    this.labelling = labelling;
    this.isWanted = isWanted;
    this.onProgress = onProgress;
  }

  /**
   * Send the prompt. While it runs the slices that are ready are shown; they go again if it fails.
   * @param {string} prompt
   * @param {string} count
   * @param {readonly import('../answers.d.ts').Edit[]} edits what the proposals are drawn given
   */
  async start(prompt, count, edits) {
    const { labelling } = this;
    const params = { prompt, ...(edits.length ? { edits } : {}), num_proposals: count, job_id: this.#id, client_id: clientId(), first_slice: labelling.currentAxial };
    labelling.begin();
    const answer = propose(labelling.series.uid, params).finally(() => (this.#isOver = true));
    const watching = this.#watch();
    try {
      const result = await answer;
      await watching;
      return result;
    } catch (error) {
      await watching.catch(() => undefined); // The error of the answer is told.
      if (this.isWanted()) labelling.dropUnfinished();
      throw error;
    }
  }

  cancel() {
    return cancelJob(this.#id);
  }

  async #watch() {
    let drawn = 0;
    while (!this.#isOver) {
      await sleep(POLL_MS);
      if (this.#isOver) return;
      const job = await getJob(this.#id).catch(() => null); // Not there yet, or the server is gone: the answer says so.
      if (!job) continue;
      this.onProgress(job);
      if (job.slices_done > drawn && job.state === 'running' && (await this.#showReady(!drawn))) drawn = job.slices_done;
    }
  }

  /** @param {boolean} isFirst */
  async #showReady(isFirst) {
    const { labelling } = this;
    const mask = await getMask(labelling.series.uid, { job: this.#id, show: CONSENSUS }).catch(() => null); // Tried again with the next slices.
    if (!mask || this.#isOver || !this.isWanted()) return false;
    await labelling.showUnfinished(mask);
    if (isFirst) performance.measure('progidiff:first', { start: labelling.started });
    return true;
  }
}
