// Steering on the review page: clicks, a scribble, a box and a loop, undo, a reload, a click while the server is gone, submission.
// Wants {image, name: of a structure that the model does not know, prompt: of one that it knows}.

import { drive, settle, until } from './driver.mjs';

/** Where the slice lies on the screen, and what is known of the edits and the result. */
const read = (page) =>
  page.evaluate(async () => {
    const { state, shown } = await import('/progidiff/static/state.js');
    const box = document.querySelector('#view').getBoundingClientRect();
    const { session, edits, z } = state;
    return {
      place: shown.place, left: box.left, top: box.top, ratio: window.devicePixelRatio, height: session.height, width: session.width, z,
      edits: edits.all, key: session.keyOf(state.structure), keys: session.keys, structure: state.structure, job: Boolean(state.job),
    };
  });

const locate = ({ place, left, top, ratio }, [y, x]) => [left + (place.left + (x + 0.5) * place.scaleX) / ratio, top + (place.top + (y + 0.5) * place.scaleY) / ratio];

async function draw(page, points, modifier) {
  await settle(page); // a tool may have moved the picture
  const where = await read(page);
  if (modifier) await page.keyboard.down(modifier);
  await page.mouse.move(...locate(where, points[0]));
  await page.mouse.down();
  for (const point of points.slice(1)) await page.mouse.move(...locate(where, point), { steps: 4 });
  await page.mouse.up();
  if (modifier) await page.keyboard.up(modifier);
  await settle(page);
}

/** Wait until the last edit is answered, by another result than before, and nothing is asked any more. */
async function answered(page, before) {
  let key = '';
  do {
    await change(page, before);
    ({ key } = await read(page));
    await page.waitForTimeout(700); // longer than the page waits for more edits
  } while (await read(page).then((now) => now.job || now.key !== key));
  await change(page, before);
  return key;
}

async function change(page, before) {
  await until(page, async (key) => {
    const { state, shown } = await import('/progidiff/static/state.js');
    const { session } = state;
    return session && !state.job && session.keyOf(state.structure) && session.keyOf(state.structure) !== key && shown.masks && shown.masksOf === session.source && shown.z === state.z;
  }, before);
  await settle(page);
}

/** Of every proposal on the slice, whether it draws a pixel. */
const draws = (page, [y, x]) =>
  page.evaluate(async ([row, column]) => {
    const { look, state } = await import('/progidiff/static/state.js');
    const { box, masks } = look(state.structure);
    const at = (row - box.y0) * (box.x1 - box.x0) + column - box.x0;
    return masks.map((mask) => row >= box.y0 && row < box.y1 && column >= box.x0 && column < box.x1 && Boolean(mask[at]));
  }, [y, x]);

async function open(page, image) {
  await until(
    page,
    async (wanted) => {
      const { state, shown } = await import('/progidiff/static/state.js');
      return state.session?.image === wanted && state.drawing && state.edits && shown.place && shown.z === state.z;
    },
    image,
  );
  await page.locator('#view').focus();
}

drive(async (page, given, { shoot }) => {
  const said = {};
  const sent = [];
  page.on('request', (request) => {
    if (request.method() === 'POST' && request.url().includes('/infer/')) sent.push(request.postData());
  });
  await page.goto(`${given.url}/progidiff/#image=${given.image}`);
  await open(page, given.image);

  // Something that the model has no name for: named, clicked, there.
  await page.locator('#count').fill('2');
  await page.locator('#draw-name').fill(given.name);
  await page.keyboard.press('Enter');
  await settle(page);
  const { height, width } = await read(page);
  const [cy, cx] = [Math.round(height / 2), Math.round(width / 2)];
  await page.locator('#view').focus();
  await page.keyboard.press('Shift+E');
  said.isTaken = await page.locator('#draw-plus').getAttribute('aria-pressed');
  await draw(page, [[cy, cx]]);
  let key = await answered(page, '');
  said.inside = await draws(page, [cy, cx]);
  said.first = key;

  // The other sign, by the other key and by Ctrl; all in one question, as they come fast.
  const before = sent.length;
  await page.keyboard.press('Shift+X');
  await draw(page, [[cy + 2, cx + 8]]);
  await draw(page, [[cy - 6, cx - 6]], 'Control');
  key = await answered(page, key);
  said.asked = sent.length - before;
  said.outside = await draws(page, [cy + 2, cx + 8]);
  said.both = [...(await draws(page, [cy - 6, cx - 6])), ...(await draws(page, [cy, cx]))];

  await page.keyboard.press('Shift+B');
  await draw(page, [[cy + 8, cx - 4], [cy + 8, cx + 4]]);
  key = await answered(page, key);
  said.scribbled = [...(await draws(page, [cy + 8, cx - 4])), ...(await draws(page, [cy + 8, cx + 2]))];
  await page.keyboard.press('Shift+K');
  await draw(page, [[cy - 14, cx - 14], [cy + 14, cx + 14]]);
  await page.keyboard.press('Shift+O');
  await draw(page, [[cy - 12, cx], [cy, cx + 12], [cy + 12, cx], [cy, cx - 12]]);
  key = await answered(page, key);
  await shoot('steered');
  const all = await read(page);
  said.kinds = all.edits.map(({ kind, positive }) => `${kind} ${positive ? 'inside' : 'outside'}`);
  said.results = all.keys.length;

  // Undo asks again, with what is left; the same edits have the same result.
  await page.keyboard.press('z');
  const fewer = await answered(page, key);
  await page.keyboard.press('Shift+Z');
  said.isSame = (await answered(page, fewer)) === key;

  // A reload keeps the edits and the result.
  await page.reload();
  await open(page, given.image);
  await page.locator('#count').fill('2');
  await until(page, async (wanted) => (await import('/progidiff/static/state.js')).state.session.keys.includes(wanted), key);
  said.isKept = JSON.stringify((await read(page)).edits) === JSON.stringify(all.edits);
  await page.evaluate(async ([structure, z]) => (await import('/progidiff/static/state.js')).store.set({ structure, z }), [given.name, all.z]);
  await open(page, given.image);

  // A click while the server is gone stays, and is answered when it is back.
  await page.locator('#view').focus();
  await page.keyboard.press('Shift+E');
  await page.context().setOffline(true);
  await draw(page, [[cy + 4, cx - 8]]);
  await page.locator('#notice-text', { hasText: 'does not answer' }).waitFor();
  await page.context().setOffline(false);
  key = await answered(page, key);
  said.late = await draws(page, [cy + 4, cx - 8]);

  // Outside of the image nothing is clicked.
  const count = (await read(page)).edits.length;
  await draw(page, [[cy, -3]]);
  said.isIgnored = (await read(page)).edits.length === count;

  // What is accepted has to be submitted before other proposals take the place of its own.
  await page.keyboard.press('Enter');
  await settle(page);
  await page.keyboard.press('Escape');
  said.saved = await page.evaluate(async () => {
    const { state } = await import('/progidiff/static/state.js');
    return { z: Number(Object.keys(state.work.state.slices)[0]) };
  });
  await page.keyboard.press('Shift+E');
  await draw(page, [[cy - 2, cx + 3]]);
  await page.locator('#notice-text', { hasText: 'accepted on 1 slice' }).waitFor();
  await shoot('held');
  await page.locator('#notice').getByRole('button', { name: 'Submit now' }).click();
  await page.locator('.toast', { hasText: 'Saved:' }).last().waitFor();
  key = await answered(page, key);
  said.last = (await read(page)).edits;
  said.pixels = await page.evaluate(async () => {
    const { state } = await import('/progidiff/static/state.js');
    return state.session.info.voxels;
  });

  // Two tabs: the second one may look, and gets the edits when it takes the image.
  const [other] = await Promise.all([
    page.waitForEvent('popup'),
    page.evaluate((address) => void window.open(address), `${given.url}/progidiff/#image=${given.image}`),
  ]);
  await other.locator('#notice-text', { hasText: 'another tab' }).waitFor();
  said.isReadOnly = await other.locator('#draw-plus').isDisabled();
  await other.getByRole('button', { name: 'Use it here' }).click();
  await until(other, async () => !(await import('/progidiff/static/state.js')).state.isReadOnly);
  await settle(other);
  said.isShared = JSON.stringify((await read(other)).edits) === JSON.stringify(said.last);
  await other.close();

  // A phone: the buttons can be hit.
  await page.setViewportSize({ width: 390, height: 844 });
  await settle(page);
  said.targets = await page.locator('.steer').evaluateAll((nodes) => nodes.map((one) => Math.round(Math.min(one.offsetHeight, one.offsetWidth))));
  said.overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  await shoot('phone');
  return said;
});
