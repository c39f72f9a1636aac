// OHIF where things go wrong: a drawn change, the next sample, two tabs, a session that ends, a cancelled run, a server that is gone, a training.
// Wants {name, password, first, second: patient ids, stroke: [z, row, column, label], heavy: how many proposals make a long run, rounds: how often every proposal is shown}.

import { drive } from './driver.mjs';
import { list, measure, open, propose, readMask, settle, show, start, waitUntilReady } from './viewer.mjs';

async function logIn(page, given) {
  await page.goto(`${given.url}/progidiff/login?next=/ohif/`);
  await page.getByLabel('Name').fill(given.name);
  await page.getByLabel('Password or token').fill(given.password);
  await page.getByRole('button', { name: 'Log in' }).click();
  await page.waitForURL('**/ohif/**');
}

/** Accept the n-th of the most disputed slices; its axial index. */
async function acceptDisputed(page, panel, n) {
  const button = panel.locator('button[style*="--heat"]').nth(n);
  const z = Number(await button.textContent()) - 1;
  await button.click();
  await page.waitForTimeout(500);
  await panel.getByRole('button', { name: 'Accept this slice' }).click();
  await panel.getByText(`Slice ${z + 1} accepted`).waitFor();
  return z;
}

async function submit(panel) {
  await panel.getByRole('button', { name: 'Submit 1 slices' }).click();
  await panel.getByText(/Saved 1 slices/).waitFor();
}

const message = (panel) => panel.locator('output').textContent();
const hash = (slices) => slices.flat().reduce((sum, value, i) => (value ? (sum * 31 + i * value) % 2147483647 : sum), 7);

drive(async (page, given, { shoot, act }) => {
  await logIn(page, given);

  // A proposal with a voxel drawn by hand is saved as it is shown, and called edited.
  let panel = await open(page, given.url, given.first);
  await propose(panel, 'liver', 2);
  await show(panel, '1');
  const drawn = await readMask(page, given.stroke);
  await show(panel, '2');
  await show(panel, 'edited');
  await panel.getByRole('button', { name: 'Accept volume' }).click();
  await panel.getByText(/Saved the volume/).waitFor();

  // That image is done; the next sample is the other one.
  await Promise.all([page.waitForURL((url) => url.pathname.endsWith('/viewer'), { waitUntil: 'commit' }), panel.getByRole('button', { name: 'Next sample' }).click()]);
  await page.waitForFunction((uid) => !location.search.includes(uid), new URL(page.url()).searchParams.get('StudyInstanceUIDs'), { timeout: 5000 }).catch(() => undefined);
  panel = await settle(page);
  await panel.getByText(given.second).first().waitFor();
  const next = await message(panel);

  // Every proposal is on the screen at once when its data is here.
  await propose(panel, 'liver', 4);
  await waitUntilReady(panel);
  await page.waitForTimeout(500);
  await page.evaluate(() => performance.clearMeasures('progidiff:switch'));
  for (let round = 0; round < given.rounds; round += 1) for (const name of await list(panel)) await show(panel, name);
  await page.waitForTimeout(500);
  const switches = await measure(page, 'switch');
  await show(panel, '2');

  // Two tabs on one image: what both accept is saved.
  const mine = await acceptDisputed(page, panel, 0);
  const tab = await page.context().newPage();
  const other = await open(tab, given.url, given.second);
  await propose(other, 'liver', 4);
  const theirs = await acceptDisputed(tab, other, 1);
  await submit(other);
  await tab.close();
  await submit(panel);

  // The session ends between accepting and submitting.
  const late = await acceptDisputed(page, panel, 2);
  await page.context().clearCookies();
  await panel.getByRole('button', { name: 'Submit 1 slices' }).click();
  await panel.getByText(/session has ended/).waitFor();
  await shoot('session');
  const again = await page.context().newPage();
  await logIn(again, given);
  await again.close();
  await submit(panel);

  // A cancelled run leaves what was shown.
  const before = hash(await readMask(page));
  const run = async () => {
    await start(panel, 'spleen', given.heavy);
    await panel.getByText(/[1-9]\d* of \d+ slices/).waitFor();
  };
  await run();
  await panel.getByRole('button', { name: 'Cancel' }).click();
  await panel.locator('output[data-kind=error]').waitFor();
  const cancelled = await message(panel);
  const afterCancel = hash(await readMask(page));

  // The server goes away in the middle of a run; what is accepted then waits for it to come back.
  await run();
  await act('kill');
  await panel.getByText(/server does not answer/).waitFor();
  const afterKill = hash(await readMask(page));
  const kept = await acceptDisputed(page, panel, 3);
  await panel.getByRole('button', { name: 'Submit 1 slices' }).click();
  await panel.getByText(/server does not answer/).waitFor();
  await shoot('gone');
  await act('restart');
  await panel.getByRole('button', { name: 'Submit 1 slices' }).click();
  await panel.getByText(/Saved 1 slices|session has ended/).waitFor();
  if ((await message(panel)).includes('session has ended')) {
    const third = await page.context().newPage();
    await logIn(third, given);
    await third.close();
    await submit(panel);
  }

  // A training is started and followed; labelling goes on.
  await panel.getByRole('button', { name: 'Train' }).click();
  await panel.getByText(/Training has started/).waitFor();
  const isFree = await panel.getByRole('button', { name: 'Next sample' }).isEnabled();
  await page.request.delete(`${given.url}/train/`, { timeout: 120000 });
  return { drawn, next, switches, mine, theirs, late, kept, cancelled, before, afterCancel, afterKill, isFree };
});
