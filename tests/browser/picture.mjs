// The picture of the review page for the documents. Wants {image, prompt}: proposals are asked for as a person does, a slice is shown that
// they differ on, one is picked, and the structure is accepted there.

import { drive, proposed } from './driver.mjs';

drive(async (page, given, { shoot }) => {
  await page.goto(`${given.url}/progidiff/#image=${given.image}`);
  await page.waitForFunction(() => performance.getEntriesByName('first-pixels').length);
  await page.getByLabel('Find').fill(given.prompt);
  await page.getByRole('button', { name: 'Propose' }).click();
  await page.locator('#job').waitFor({ state: 'visible' });
  await page.locator('#job').waitFor({ state: 'hidden', timeout: 300000 });
  await proposed(page);
  await page.locator('#view').focus();
  await page.keyboard.press('g');
  await page.waitForTimeout(1500);
  await proposed(page);
  await page.keyboard.press('2');
  await page.keyboard.press('a');
  await page.waitForTimeout(3000);
  await proposed(page);
  await shoot('review');
  return {};
});
