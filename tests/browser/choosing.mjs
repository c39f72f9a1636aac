// Clicks on the review page with a model that does not draw by them: they choose among its proposals, and undo takes click and pick back.
// Wants {image, prompt, count}.

import { drive, press, proposed } from './driver.mjs';

drive(async (page, given, { shoot }) => {
  await page.goto(`${given.url}/progidiff/#image=${given.image}`);
  await page.waitForFunction(() => performance.getEntriesByName('first-pixels').length);
  await page.getByRole('spinbutton', { name: 'proposals' }).fill(String(given.count));
  await page.getByLabel('Find').fill(given.prompt);
  await page.getByRole('button', { name: 'Propose' }).click();
  await page.locator('#job').waitFor({ state: 'visible' });
  await page.locator('#job').waitFor({ state: 'hidden', timeout: 300000 });
  await proposed(page);
  await page.locator('#view').focus();

  const isDeaf = await page.locator('#draw-scribbleIn').isDisabled();
  await press(page, '2');
  await press(page, 'Shift+E');
  const note = await page.locator('#steer-note').textContent();
  // A pixel that every proposal has.
  const inside = await page.evaluate(async () => {
    const { look, shown, state } = await import('/progidiff/static/state.js');
    const { box, masks } = look(state.structure);
    const index = masks[0].findIndex((value, i) => value && masks.every((mask) => mask[i]));
    const width = box.x1 - box.x0;
    const area = document.querySelector('#view').getBoundingClientRect();
    const at = [box.x0 + (index % width) + 0.5, box.y0 + Math.floor(index / width) + 0.5];
    const { place } = shown;
    return [area.left + (place.left + at[0] * place.scaleX) / devicePixelRatio, area.top + (place.top + at[1] * place.scaleY) / devicePixelRatio];
  });
  await page.mouse.click(...inside);
  await page.locator('.toast', { hasText: 'proposals agree' }).last().waitFor();
  const chosen = await page.locator('#picked').textContent();
  await shoot('chosen');
  await press(page, 'z');
  return { isDeaf, note, chosen, after: await page.locator('#picked').textContent() };
});
