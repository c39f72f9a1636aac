// A picture on the review page: its colours, its sentence, proposals, brush, undo, submission; a sentence that somebody else changed, an empty
// one, one that was not saved; another model, a grey picture, a volume beside it, a phone.
// Wants {image, gray, volume, sentence}. Returns what the page shows and says is drawn, for the test to compare with the files on disk.

import { drive, press, settle } from './driver.mjs';

const pixels = (page) => page.locator('#facts').evaluate((node) => Number(node.dataset.pixels));
const sentence = (page) => page.locator('#sentence').inputValue();

async function open(page, image) {
  const isOpen = () =>
    page.evaluate(async (wanted) => {
      const { state, shown } = await import('/progidiff/static/state.js');
      return state.session?.image === wanted && Boolean(state.drawing && shown.session === state.session && shown.place);
    }, image);
  while (!(await isOpen())) await page.waitForTimeout(100);
  await page.locator('#view').focus();
  await settle(page);
}

/** What is shown of the picture and of the active structure: bytes of colours, and the mask of its whole size. */
const read = (page) =>
  page.evaluate(async () => {
    const { state, shown, look } = await import('/progidiff/static/state.js');
    const { reframe } = await import('/progidiff/static/drawn_look.js');
    const { height, width } = state.session;
    const found = look(state.structure);
    const whole = { y0: 0, y1: height, x0: 0, x1: width };
    const data = shown.grey.getContext('2d').getImageData(0, 0, width, height).data;
    const box = document.querySelector('#view').getBoundingClientRect();
    return {
      height, width, structure: state.structure, place: shown.place, left: box.left, top: box.top, ratio: window.devicePixelRatio,
      colours: Array.from(data).filter((_, i) => i % 4 !== 3),
      mask: found ? Array.from(reframe(found.mask, found.box, whole)) : [],
    };
  });

async function draw(page, points) {
  const { place, left, top, ratio } = await read(page);
  const at = ([y, x]) => [left + (place.left + x * place.scaleX) / ratio, top + (place.top + y * place.scaleY) / ratio];
  await page.mouse.move(...at(points[0]));
  await page.mouse.down();
  for (const point of points.slice(1)) await page.mouse.move(...at(point), { steps: 5 });
  await page.mouse.up();
  await settle(page);
}

async function propose(page) {
  await page.locator('#sentence').press('Enter');
  await page.locator('#job').waitFor({ state: 'visible' });
  await page.locator('#job').waitFor({ state: 'hidden' });
  await page.waitForFunction(() => document.querySelector('.thumb[data-kind="1"] .thumb-note')?.textContent.includes('px'));
  await page.locator('#view').focus();
  await settle(page);
}

const visible = (page, selector) => page.locator(selector).first().isVisible();

drive(async (page, given, { shoot }) => {
  const said = {};
  await page.goto(`${given.url}/progidiff/`);
  said.listed = await page.locator('.case-name').allTextContents();

  // A volume has planes and slices; a picture beside it has none, but colours and a sentence.
  await page.locator('.case', { hasText: given.volume }).click();
  await open(page, given.volume);
  said.ofVolume = [await visible(page, '#prompt'), await visible(page, '#depth'), await visible(page, '.side.left'), await visible(page, '#sentence')];
  await page.locator('.case', { hasText: given.image }).first().click();
  await open(page, given.image);
  said.ofPicture = [];
  for (const one of ['#prompt', '#depth', '.side.left', '#draw-views', '#window-preset', '#scope-volume', '#accept-volume']) said.ofPicture.push(await visible(page, one));
  said.where = await page.locator('#where').textContent();
  said.found = await sentence(page);
  said.shown = await read(page);
  said.heads = await page.locator('#head option').allTextContents();
  said.structure = await page.locator('#draw-structure').inputValue();

  // Another sentence, Enter, proposals.
  await page.locator('#sentence').fill(given.sentence);
  said.state = await page.locator('#sentence-state').textContent();
  await propose(page);
  said.counts = {};
  for (const key of ['1', '2', '3', '4', 'c']) {
    await press(page, key);
    said.counts[key] = await pixels(page);
  }
  await press(page, 'h');
  await shoot('agreement');
  await press(page, 'h');
  await press(page, '2');

  // Brush, eraser, undo, redo.
  said.picked = (await read(page)).mask;
  await press(page, 'p');
  await draw(page, [[20, 20], [20, 60]]);
  said.brushed = await pixels(page);
  await press(page, 'r');
  await draw(page, [[20, 30], [20, 34]]);
  said.erased = await pixels(page);
  await press(page, 'z');
  said.undone = await pixels(page);
  await press(page, 'Shift+Z');
  await press(page, 'z');
  said.again = await pixels(page);
  await press(page, 'Escape');
  await shoot('drawn');

  // A closed tab loses neither the sentence nor what was drawn.
  await page.evaluate(() => new Promise((done) => setTimeout(done, 300)));
  await page.reload();
  await open(page, given.image);
  said.kept = [await sentence(page), await pixels(page)];

  // Submit: first the sentence, then the label.
  said.drawn = (await read(page)).mask;
  said.decided = await page.locator('#decided').textContent();
  await page.keyboard.press('Control+Enter');
  await page.locator('.toast', { hasText: 'Saved:' }).last().waitFor();
  await page.waitForFunction(() => document.querySelector('#submit').disabled);
  said.after = [await sentence(page), await page.locator('#sentence-state').textContent(), await page.locator('#saved').textContent()];

  // Somebody else changes the sentence while this tab types.
  await page.locator('#sentence').fill('Mine.');
  const theirs = await page.request.put(`${given.url}/progidiff/pictures/${given.image}/sentence`, { data: { sentence: 'Theirs.', former: given.sentence } });
  said.theirs = theirs.status();
  await page.locator('#sentence').press('Control+Enter');
  await page.locator('#notice-text', { hasText: 'Theirs.' }).waitFor();
  await shoot('conflict');
  await page.getByRole('button', { name: 'Save mine' }).click();
  await page.locator('#sentence-state', { hasText: 'Saved in text.csv' }).waitFor();

  // An empty field asks without a sentence, and is not saved unseen.
  await page.locator('#sentence').fill('');
  const [request] = await Promise.all([page.waitForRequest((one) => one.url().includes('/infer/textdiff')), propose(page)]);
  said.asked = request.postData();
  await page.keyboard.press('Control+Enter');
  await page.locator('#notice-text', { hasText: 'is empty' }).waitFor();
  await page.getByRole('button', { name: 'Put it back' }).click();
  said.back = await sentence(page);
  await page.locator('#sentence-changes summary').click();
  said.changes = await page.locator('#sentence-changes-list q').allTextContents();
  await page.locator('#sentence-changes summary').click();

  // A grey picture goes to the model for grey ones; the other one can be chosen. Its numbers can be windowed.
  await page.evaluate((image) => (location.hash = `#image=${image}`), given.gray);
  await open(page, given.gray);
  said.grayHead = await page.locator('#head').inputValue();
  const [{ x, y, width, height }] = [await page.locator('#view').boundingBox()];
  await page.mouse.move(x + width / 2, y + height / 2);
  await page.mouse.down();
  await page.mouse.move(x + width / 2 + 60, y + height / 2, { steps: 4 });
  await page.mouse.up();
  said.windowed = await page.locator('#corner-window').textContent();
  await page.mouse.wheel(0, -300);
  await settle(page);
  said.zoom = await page.evaluate(async () => (await import('/progidiff/static/state.js')).state.zoom);
  await page.locator('#head').selectOption({ index: 0 });
  await settle(page);
  said.otherHead = await page.locator('#sentence-about').textContent();
  await shoot('gray');
  await page.locator('#versions-open').click();
  await page.locator('.train button', { hasText: 'Train on the labelled pictures' }).waitFor();
  await shoot('model');
  await page.locator('#versions button', { hasText: 'Close' }).click();

  // A phone.
  await page.setViewportSize({ width: 390, height: 844 });
  await page.evaluate((image) => (location.hash = `#image=${image}`), given.image);
  await open(page, given.image);
  said.overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  said.phone = (await page.locator('#sentence').boundingBox()).width;
  await page.screenshot({ path: `${given.shots}/phone.png`, fullPage: true });
  return said;
});
