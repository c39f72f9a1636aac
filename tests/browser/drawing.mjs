// Drawing on the review page: brush, eraser, lasso, fill, undo, redo, reload, interpolation, submission, a second tab, a lost server, fingers.
// Wants {image, prompt}. Returns what the page says is drawn at each submission, for the test to compare with the files on disk.

import { drive, press, settle } from './driver.mjs';

/** What is drawn by hand: [{structure, z, box, runs}], and where the slice lies on the screen. */
const read = (page) =>
  page.evaluate(async () => {
    const { state, shown } = await import('/progidiff/static/state.js');
    const box = document.querySelector('#view').getBoundingClientRect();
    const drawn = state.drawing.list().map(({ structure, z, drawn: { box: at, runs, edits } }) => ({ structure, z, box: at && [at.y0, at.y1, at.x0, at.x1], runs, edits }));
    return { drawn, z: state.z, place: shown.place, left: box.left, top: box.top, ratio: window.devicePixelRatio, height: state.session.height, width: state.session.width };
  });

/** Where a pixel of the slice is on the screen. */
const locate = ({ place, left, top, ratio }, [y, x]) => [left + (place.left + x * place.scaleX) / ratio, top + (place.top + y * place.scaleY) / ratio];

/** Draw a line through points of the slice. */
async function draw(page, points, modifier) {
  const where = await read(page);
  if (modifier) await page.keyboard.down(modifier);
  await page.mouse.move(...locate(where, points[0]));
  await page.mouse.down();
  for (const point of points.slice(1)) await page.mouse.move(...locate(where, point), { steps: 6 });
  await page.mouse.up();
  if (modifier) await page.keyboard.up(modifier);
  await settle(page);
}

const pixels = (page) => page.locator('#facts').evaluate((node) => Number(node.dataset.pixels));

async function submit(page) {
  const { drawn } = await read(page);
  await page.keyboard.press('Control+Enter');
  await page.locator('.toast', { hasText: 'Saved:' }).last().waitFor();
  await page.waitForFunction(() => document.querySelector('#submit').disabled);
  return drawn;
}

async function open(page, image) {
  await page.waitForFunction(
    async (wanted) => {
      const { state, shown } = await import('/progidiff/static/state.js');
      return state.session?.image === wanted && state.drawing && shown.place && shown.z === state.z;
    },
    image,
  );
  await page.locator('#view').focus();
}

/** Wait until everything is in the browser's database. */
const flush = (page) => page.evaluate(() => new Promise((done) => setTimeout(done, 300)));

drive(async (page, given, { shoot }) => {
  const said = {};
  await page.goto(`${given.url}/progidiff/#image=${given.image}`);
  await open(page, given.image);

  // A structure without proposals: name it, draw it, erase in it, fill its hole, take one step back and forth.
  await page.locator('#draw-name').fill('liver');
  await page.keyboard.press('Enter');
  await settle(page);
  await press(page, 'p');
  const { height, width } = await read(page);
  const [cy, cx] = [Math.round(height / 2), Math.round(width / 2)];
  const ring = Array.from({ length: 17 }, (_, i) => [cy + 18 * Math.sin((i * Math.PI) / 8), cx + 18 * Math.cos((i * Math.PI) / 8)]);
  await draw(page, ring);
  said.ring = await pixels(page);
  await press(page, 'Shift+F');
  said.filled = await pixels(page);
  await press(page, 'r');
  await draw(page, [[cy, cx], [cy, cx + 6]]);
  said.erased = await pixels(page);
  await press(page, 'z');
  said.undone = await pixels(page);
  await press(page, 'Shift+Z');
  said.redone = await pixels(page);
  await press(page, 'm');
  await draw(page, [[cy - 23, cx - 32], [cy - 23, cx - 26], [cy - 16, cx - 26], [cy - 16, cx - 32]]);
  said.lassoed = await pixels(page);
  await draw(page, [[cy - 24, cx - 33], [cy - 24, cx - 29], [cy - 15, cx - 29], [cy - 15, cx - 33]], 'Control');
  said.cut = await pixels(page);
  await shoot('drawn');

  // Several slices: copy up, draw on one further up, interpolate; the eraser's last touch is smoothed away.
  await press(page, 'Shift+ArrowUp');
  await press(page, 'Shift+M');
  for (let step = 0; step < 4; step += 1) await press(page, 'ArrowUp');
  await open(page, given.image);
  await press(page, 'p');
  await draw(page, [[cy + 5, cx - 8], [cy + 5, cx + 8]]);
  await press(page, 'ArrowDown');
  await open(page, given.image);
  await press(page, 'Shift+I');
  said.slices = (await read(page)).drawn.map(({ z }) => z);
  await shoot('interpolated');

  // A closed tab loses nothing, and undo goes on where it was.
  await flush(page);
  const before = (await read(page)).drawn;
  await page.reload();
  await open(page, given.image);
  said.isKept = JSON.stringify((await read(page)).drawn) === JSON.stringify(before);
  await press(page, 'z');
  said.afterUndo = (await read(page)).drawn.length;
  await press(page, 'Shift+Z');
  said.afterRedo = (await read(page)).drawn.length;
  said.first = await submit(page);
  said.isSent = await page.locator('#submit').isDisabled();

  // The threshold brush draws within its window alone.
  await press(page, 'Home');
  await open(page, given.image);
  await press(page, 'q');
  await page.locator('#draw-low').fill('0');
  await page.locator('#draw-high').fill('80');
  await page.locator('#draw-high').press('Tab');
  await page.locator('#view').focus();
  await draw(page, [[cy, cx - 30], [cy, cx + 30]]);
  said.window = await page.evaluate(async () => {
    const { state, shown } = await import('/progidiff/static/state.js');
    const { drawn } = state.drawing.list().find(({ z }) => z === state.z);
    const mask = state.drawing.decode(drawn);
    const [slope, intercept] = state.session.info.scale;
    const values = Array.from(shown.pixels).flatMap((value, i) => (mask[i] ? [value * slope + intercept] : []));
    return { low: Math.min(...values), high: Math.max(...values), count: values.length };
  });

  // The server goes away in mid-stroke: the stroke is kept, and sent when the server is back.
  await page.context().setOffline(true);
  await press(page, 'p');
  await draw(page, [[cy - 10, cx], [cy + 10, cx]]);
  await page.keyboard.press('Control+Enter');
  await page.locator('#notice-text', { hasText: 'does not answer' }).waitFor();
  await page.context().setOffline(false);
  await page.locator('#notice-text', { hasText: 'is back' }).waitFor();
  said.second = await submit(page);

  // A second tab may look and not draw; when it takes the image, it has what the first one drew.
  const [other] = await Promise.all([
    page.waitForEvent('popup'),
    page.evaluate((address) => void window.open(address), `${given.url}/progidiff/#image=${given.image}`),
  ]);
  await other.locator('#notice-text', { hasText: 'another tab' }).waitFor();
  said.isReadOnly = await other.locator('#draw-brush').isDisabled();
  await draw(page, [[cy + 20, cx], [cy + 24, cx]]);
  await flush(page);
  await other.getByRole('button', { name: 'Use it here' }).click();
  await other.waitForFunction(async () => (await import('/progidiff/static/state.js')).state.drawing && !document.querySelector('#draw-brush').disabled);
  await settle(other);
  await flush(other);
  said.isTaken = JSON.stringify((await read(other)).drawn) === JSON.stringify((await read(page)).drawn);
  await other.close();
  await page.locator('#notice').getByRole('button', { name: 'Use it here' }).click();
  await settle(page);

  // A proposal is drawn on, and a pick takes the drawing's place until it is undone.
  await page.locator('#prompt').fill(given.prompt);
  await page.locator('#prompt').press('Enter');
  await page.locator('#job').waitFor({ state: 'visible' });
  await page.locator('#job').waitFor({ state: 'hidden', timeout: 300000 });
  await page.waitForFunction((name) => document.querySelector('#draw-structure').value === name, given.prompt);
  await page.waitForFunction(() => document.querySelector('.thumb[data-kind="1"] .thumb-note')?.textContent.includes('cm²'));
  await page.locator('#view').focus();
  await press(page, '1');
  said.proposed = await pixels(page);
  await draw(page, [[cy, cx], [cy, cx + 12]]);
  said.mended = await pixels(page);
  await press(page, '2');
  said.replaced = await page.locator('#picked').textContent();
  await press(page, 'z');
  said.back = await pixels(page);
  await page.waitForFunction(() => Number(document.querySelector('#surface').dataset.triangles) > 0);
  await page.locator('#draw-more summary').click();
  await settle(page);
  await shoot('planes');
  await page.locator('#draw-more summary').click();
  said.third = await submit(page);

  // A phone: one finger draws, two move and enlarge, and every control can be hit.
  await page.setViewportSize({ width: 390, height: 844 });
  await settle(page);
  await page.locator('#draw-structure').selectOption('liver');
  await settle(page);
  said.targets = await page.evaluate(() =>
    [...document.querySelectorAll(':is(.bar, .prompt, .toolstrip, .tools, .panel) :is(button, select, summary, input:not([type=checkbox]))')].filter((one) => one.offsetParent).map((one) => Math.round(Math.min(one.offsetHeight, one.type === 'range' ? one.offsetHeight : one.offsetWidth))),
  );
  said.overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  const touch = await page.context().newCDPSession(page);
  await touch.send('Emulation.setTouchEmulationEnabled', { enabled: true, maxTouchPoints: 2 });
  await page.locator('#view').scrollIntoViewIfNeeded();
  const send = async (type, points) => {
    await touch.send('Input.dispatchTouchEvent', { type, touchPoints: points.map(([x, y], id) => ({ x, y, id })) });
    await settle(page);
  };
  const where = await read(page);
  const [x, y] = locate(where, [cy + 30, cx + 30]);
  const steps = where.drawn.reduce((sum, { edits }) => sum + edits, 0);
  await send('touchStart', [[x, y]]);
  await send('touchMove', [[x + 20, y]]);
  await send('touchEnd', []);
  const after = (await read(page)).drawn;
  said.touched = after.reduce((sum, { edits }) => sum + edits, 0) - steps;
  await send('touchStart', [[x, y]]);
  await send('touchStart', [[x, y], [x - 60, y - 60]]);
  await send('touchMove', [[x + 30, y + 30], [x - 90, y - 90]]);
  await send('touchEnd', []);
  said.zoom = await page.evaluate(async () => (await import('/progidiff/static/state.js')).state.zoom);
  said.isUntouched = JSON.stringify((await read(page)).drawn) === JSON.stringify(after);
  await shoot('phone');
  return said;
});
