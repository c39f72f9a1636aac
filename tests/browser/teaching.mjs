// Teaching a structure on the review page: a name that is nearly known, a new one, the brush on two slices, a submission, a reload.
// Wants {image, name, words, color}. Returns what the page says is drawn, for the test to compare with the file on disk.

import { drive, settle, until } from './driver.mjs';

/** What is drawn by hand, and where the slice lies on the screen. */
const read = (page) =>
  page.evaluate(async () => {
    const { state, shown } = await import('/progidiff/static/state.js');
    const box = document.querySelector('#view').getBoundingClientRect();
    const drawn = state.drawing.list().map(({ structure, z, drawn: { box: at, runs } }) => ({ structure, z, box: at && [at.y0, at.y1, at.x0, at.x1], runs }));
    return { drawn, z: state.z, place: shown.place, left: box.left, top: box.top, ratio: window.devicePixelRatio, height: state.session.height, width: state.session.width };
  });

async function draw(page, points) {
  const { place, left, top, ratio } = await read(page);
  const locate = ([y, x]) => [left + (place.left + x * place.scaleX) / ratio, top + (place.top + y * place.scaleY) / ratio];
  await page.mouse.move(...locate(points[0]));
  await page.mouse.down();
  for (const point of points.slice(1)) await page.mouse.move(...locate(point), { steps: 4 });
  await page.mouse.up();
  await settle(page);
}

const ready = (page, image) =>
  until(
    page,
    async (wanted) => {
      const { state, shown } = await import('/progidiff/static/state.js');
      return Boolean(state.session?.image === wanted && state.drawing && state.folder && shown.place && shown.z === state.z);
    },
    image,
  );

const row = (page, name) => page.locator('#structures .structure', { hasText: name });

async function submit(page) {
  const { drawn } = await read(page);
  await page.keyboard.press('Control+Enter');
  await page.locator('.toast', { hasText: 'Saved:' }).last().waitFor();
  await page.waitForFunction(() => document.querySelector('#submit').disabled);
  return drawn;
}

drive(async (page, given, { shoot }) => {
  const said = {};
  await page.goto(`${given.url}/progidiff/#image=${given.image}`);
  await ready(page, given.image);

  // A slip of the keyboard is asked about, and nothing is added.
  await page.locator('#teach-open').click();
  await page.locator('#teach-name').fill('livr');
  await page.locator('#teach-name').press('Enter');
  await page.locator('#teach-problem').waitFor();
  said.asked = await page.locator('#teach-problem').textContent();
  await shoot('asked');

  // A new name, with further words and a colour, becomes the active structure.
  await page.locator('#teach-name').fill(given.name);
  await page.locator('#teach-words').fill(given.words);
  await page.locator('#teach-color').fill(given.color);
  await page.locator('#teach-name').press('Enter');
  await page.locator('#teach-form').waitFor({ state: 'hidden' });
  said.fresh = await row(page, given.name).textContent();
  said.isActive = await row(page, given.name).getAttribute('aria-pressed');

  // The brush on two slices.
  await page.locator('#view').focus();
  await page.keyboard.press('p');
  await settle(page);
  const { height, width } = await read(page);
  const [cy, cx] = [Math.round(height / 2), Math.round(width / 2)];
  await draw(page, [[cy, cx - 8], [cy, cx + 8]]);
  await page.keyboard.press('ArrowUp');
  await ready(page, given.image);
  await draw(page, [[cy - 6, cx], [cy + 6, cx]]);
  await shoot('drawn');
  said.drawn = await submit(page);
  await page.locator('#structures .structure', { hasText: /2 slices labelled/ }).waitFor();
  said.taught = await row(page, given.name).textContent();
  await shoot('taught');

  // Misspelt while it was drawn: the page asks which is meant before anything is saved.
  await page.locator('#draw-structure').selectOption({ label: 'another …' });
  await page.locator('#draw-name').fill('spleeen');
  await page.keyboard.press('Enter');
  await settle(page);
  await draw(page, [[cy + 14, cx], [cy + 14, cx + 4]]);
  await page.keyboard.press('Control+Enter');
  await page.locator('#notice-text', { hasText: 'nearly' }).waitFor();
  await page.locator('#notice').getByRole('button', { name: 'It is spleen' }).click();
  await page.locator('.toast', { hasText: 'Saved:' }).last().waitFor();
  await page.waitForFunction(() => document.querySelector('#submit').disabled);
  said.mended = (await read(page)).drawn;

  // It is there after a reload, and on a phone.
  await page.reload();
  await ready(page, given.image);
  said.again = await row(page, given.name).textContent();
  said.color = await row(page, given.name).locator('i').evaluate((node) => node.style.background);
  await page.setViewportSize({ width: 390, height: 844 });
  await page.locator('#teach-open').click();
  await page.locator('#teach-form').scrollIntoViewIfNeeded();
  await settle(page);
  said.targets = await page.locator('#teach').evaluate((node) => [...node.querySelectorAll('button, input')].filter((one) => one.offsetParent).map((one) => one.offsetHeight));
  said.overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  await shoot('phone');
  return said;
});
