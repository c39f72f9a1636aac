// The review page: queue, prompt, pick, merge, undo, reload, submit, undo of a save, a lost server, an expired login, a second tab.
// Wants {image, prompt, count, unsure: an image without an orientation}. Returns what was accepted where, for the test to compare with the files on disk.

import { drive, press, proposed } from './driver.mjs';

const pixels = (page) => page.locator('#facts').evaluate((node) => Number(node.dataset.pixels));
/** As the server counts: from 0. */
const slice = (page) => page.locator('#corner-slice b').evaluate((node) => Number(node.textContent.match(/\d+/)[0]) - 1);
const picked = (page) => page.locator('#picked').textContent();
const measures = (page, name) =>
  page.evaluate((wanted) => performance.getEntriesByName(wanted).map(({ duration }) => Math.round(duration * 10) / 10), name);

/** Accept the slice that is shown; the page goes to the next one. */
async function accept(page) {
  await proposed(page);
  const accepted = { z: await slice(page), pixels: await pixels(page), pick: await picked(page) };
  await page.keyboard.press('Enter');
  await page.waitForFunction((z) => Number(document.querySelector('#corner-slice b').textContent.match(/\d+/)[0]) - 1 !== z, accepted.z);
  await proposed(page);
  return accepted;
}

async function submit(page) {
  await page.keyboard.press('Control+Enter');
  await page.locator('.toast', { hasText: 'Saved:' }).last().waitFor();
  await page.waitForFunction(() => document.querySelector('#decided').textContent === 'Nothing accepted yet.');
}

drive(async (page, given, { shoot }) => {
  // Nothing may come from anywhere else.
  const foreign = [];
  page.on('request', (request) => { if (!request.url().startsWith(given.url)) foreign.push(request.url()); });

  await page.goto(`${given.url}/progidiff/`);
  // What lies in the folder and is not served is named.
  await page.locator('#left-out summary').click();
  const leftOut = await page.locator('#left-out-list li').allTextContents();
  await page.locator('.case', { hasText: given.image }).click();
  await page.waitForFunction(() => performance.getEntriesByName('first-pixels').length);

  // A misspelt prompt is answered with suggestions, and the right one with proposals that stream in.
  await page.getByLabel('Find').fill('livr');
  await page.getByRole('button', { name: 'Propose' }).click();
  await page.locator('#prompt-error button', { hasText: given.prompt }).first().waitFor();
  await page.getByRole('spinbutton', { name: 'proposals' }).fill(String(given.count));
  await page.getByLabel('Find').fill(given.prompt);
  await page.getByRole('button', { name: 'Propose' }).click();
  await page.locator('#job').waitFor({ state: 'visible' });
  await page.locator('#job').waitFor({ state: 'hidden', timeout: 300000 });
  await proposed(page);
  const firstProposal = await measures(page, 'first-proposal');
  await page.locator('#view').focus();

  // Every proposal, the consensus and the maps, by keys.
  const counts = {};
  for (const key of [...Array.from({ length: given.count }, (_, k) => String(k + 1)), 'c']) {
    await press(page, key);
    counts[key] = await pixels(page);
  }
  const counted = { z: await slice(page), counts };
  await press(page, 'h');
  await shoot('agreement');
  await press(page, 'd');
  await shoot('difference');
  await press(page, 'd');

  // Pick, merge, mark as absent, take that back.
  await press(page, '2');
  const first = await accept(page);
  await press(page, 'u');
  await shoot('merge');
  const second = await accept(page);
  await press(page, '0');
  const third = await accept(page);
  await press(page, 'z');
  const decided = await page.locator('#decided').textContent();

  // A closed tab loses nothing.
  await page.reload();
  await page.locator('#notice-text', { hasText: 'were not sent' }).waitFor();
  await page.getByRole('button', { name: 'Keep' }).click();
  const restored = await page.locator('#decided').textContent();
  await page.locator('#view').focus();
  await submit(page);
  await press(page, 'l');
  await shoot('saved');

  // The whole volume, and back.
  await press(page, 'v');
  await press(page, 'c');
  await press(page, 'Shift+Enter');
  await submit(page);
  await page.getByRole('button', { name: 'Undo last save' }).click();
  await page.locator('.toast', { hasText: 'is in force again' }).waitFor();
  const undone = await (await page.request.get(`${given.url}/progidiff/annotations?image=${given.image}`)).json();

  // The server goes away between deciding and sending.
  await proposed(page);
  await press(page, 'v');
  await press(page, 'g');
  await proposed(page);
  await press(page, 'i');
  await page.locator('#members button', { hasText: '2' }).click();
  await page.locator('#view').focus();
  const fourth = await accept(page);
  await page.context().setOffline(true);
  await page.keyboard.press('Control+Enter');
  await page.locator('#notice-text', { hasText: 'does not answer' }).waitFor();
  const kept = await page.locator('#decided').textContent();
  await shoot('offline');
  await page.context().setOffline(false);
  await page.locator('#notice-text', { hasText: 'is back' }).waitFor();

  // The login has expired when it is.
  await page.route('**/progidiff/review/*', (route) =>
    route.request().method() === 'POST' ? route.fulfill({ status: 401, json: { error: 'LoginError', detail: 'Log in.' } }) : route.continue(),
  );
  await page.getByRole('button', { name: 'Submit now' }).click();
  await page.locator('#notice-text', { hasText: 'login has expired' }).waitFor();
  await page.unroute('**/progidiff/review/*');
  await page.locator('#view').focus();
  await submit(page);

  // A second tab on the same image may look.
  const [other] = await Promise.all([
    page.waitForEvent('popup'),
    page.evaluate((address) => void window.open(address), `${given.url}/progidiff/#image=${given.image}`),
  ]);
  await other.locator('#notice-text', { hasText: 'another tab' }).waitFor();
  const isReadOnly = await other.locator('#accept-slice').isDisabled();
  await other.getByRole('button', { name: 'Use it here' }).click();
  await page.locator('#notice-text', { hasText: 'another tab' }).waitFor();
  const isTaken = await page.locator('#accept-slice').isDisabled();
  await other.close();

  // An inline script does not run here.
  await page.evaluate(() => {
    const script = document.createElement('script');
    script.textContent = 'window.injected = true';
    document.body.append(script);
  });
  const isInjected = await page.evaluate(() => Boolean(window.injected));

  await page.setViewportSize({ width: 390, height: 844 });
  await page.goto(`${given.url}/progidiff/#image=${given.image}`);
  await page.reload();
  await proposed(page);
  await shoot('phone');
  const overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);

  await page.setViewportSize({ width: 1400, height: 860 });
  await page.reload();
  await proposed(page);
  const opened = await measures(page, 'first-pixels');
  for (let step = 0; step < 5; step += 1) await press(page, 'ArrowUp');
  for (const key of ['1', '2', 'c', '1', 'u']) await press(page, key);
  const times = { slices: await measures(page, 'slice-switch'), switches: await measures(page, 'proposal-switch') };

  // An image whose header does not say where it lies: told when it is opened, and again on request.
  const isPlainQuiet = await page.locator('#header-warning').isHidden();
  await page.locator('.case', { hasText: given.unsure }).click();
  await page.locator('#notice-text', { hasText: 'orientation' }).waitFor();
  await shoot('unsure');
  await page.getByRole('button', { name: 'Understood' }).click();
  await page.locator('#header-warning').click();
  const warning = await page.locator('#notice-text').textContent();
  return {
    leftOut, isPlainQuiet, warning, counted, first, second, third, fourth, decided, restored, kept, undone, isReadOnly, isTaken, isInjected, foreign, overflow,
    firstPixels: opened, firstProposal, ...times,
  };
});
