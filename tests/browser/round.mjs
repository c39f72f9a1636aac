// A round of several organs on one image of the review page, as a person would go about it; what the page measured of it comes back.
// Wants {image, prompts: one structure each, slices: how many of each are looked at}.

import { drive, press, until } from './driver.mjs';

/** The masks of the slice in view are there. */
const ready = (page) =>
  until(page, async () => {
    const { areMasksShown, shown, state } = await import('/progidiff/static/state.js');
    return !state.job && areMasksShown() && !shown.isPartial;
  });

drive(async (page, given, { shoot }) => {
  await page.goto(`${given.url}/progidiff/#image=${given.image}`);
  await page.waitForFunction(() => performance.getEntriesByName('first-pixels').length);
  await page.locator('#prompt').fill(given.prompts.join(', '));
  await page.locator('#prompt').press('Enter');
  await page.locator('#job').waitFor({ state: 'visible' });
  await page.locator('#job').waitFor({ state: 'hidden', timeout: 600000 });
  const started = Date.now();
  for (const name of given.prompts) {
    // The slices on which the proposals differ most, one by one, each with the most typical proposal; then the rest as it is proposed.
    await page.locator('button.structure', { hasText: name }).first().click();
    await page.locator('#view').focus();
    await ready(page);
    await press(page, 'g');
    for (let step = 0; step < given.slices; step += 1) {
      await ready(page);
      await page.waitForTimeout(1000);
      await press(page, 'b');
      await press(page, 'Enter'); // goes on to the next one
    }
    await press(page, 'Shift+Enter');
  }
  await shoot('round');
  const decided = await page.locator('#decided').textContent();
  await page.keyboard.press('Control+Enter');
  await page.locator('.toast', { hasText: 'Saved:' }).last().waitFor();
  return { seconds: (Date.now() - started) / 1000, decided };
});
