// How smoothly a stroke is drawn: strokes of a large brush over a slice, and the time between the frames that the browser shows meanwhile.
// Wants {image, size: of the brush in mm, strokes}. Returns milliseconds.

import { drive } from './driver.mjs';

drive(async (page, given, { shoot }) => {
  // What the page does on a move of the pointer, and when a stroke ends, is timed from within.
  await page.addInitScript(() => {
    window.measured = { frames: [], pointermove: [], pointerup: [] };
    const add = EventTarget.prototype.addEventListener;
    EventTarget.prototype.addEventListener = function (kind, act, options) {
      const isTimed = this.id === 'view' && kind in window.measured;
      const timed = (event) => {
        const start = performance.now();
        act(event);
        if (window.isDrawing) window.measured[kind].push(performance.now() - start);
      };
      add.call(this, kind, isTimed ? timed : act, options);
    };
  });
  await page.goto(`${given.url}/progidiff/#image=${given.image}`);
  await page.waitForFunction(async () => {
    const { state, shown } = await import('/progidiff/static/state.js');
    return state.drawing && shown.place;
  });
  await page.locator('#draw-name').fill('liver');
  await page.keyboard.press('Enter');
  await page.keyboard.press('p');
  await page.evaluate(async (size) => {
    const { state, store } = await import('/progidiff/static/state.js');
    store.set({ settings: { ...state.settings, size }, areViewsShown: false });
  }, given.size);
  await page.waitForTimeout(1000);
  const where = await page.evaluate(async () => {
    const { shown, state } = await import('/progidiff/static/state.js');
    const box = document.querySelector('#view').getBoundingClientRect();
    return { place: shown.place, left: box.left, top: box.top, height: state.session.height, width: state.session.width, depth: state.session.depth };
  });
  const at = (y, x) => [where.left + where.place.left + x * where.width * where.place.scaleX, where.top + where.place.top + y * where.height * where.place.scaleY];

  await page.evaluate(() => {
    let last = 0;
    const tick = (now) => {
      if (last && window.isDrawing) window.measured.frames.push(now - last);
      last = now;
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  });
  /** Strokes over the slice, or the same way of the pointer without a tool. */
  const run = async (strokes, isDrawn) => {
    for (let stroke = 0; stroke < strokes; stroke += 1) {
      await page.mouse.move(...at(0.2, 0.2));
      await page.evaluate(() => void (window.isDrawing = true));
      if (isDrawn) await page.mouse.down();
      for (let step = 0; step <= 60; step += 1) {
        const share = step / 60;
        await page.mouse.move(...at(0.2 + 0.6 * share, 0.5 + 0.3 * Math.sin(4 * Math.PI * share + stroke)));
      }
      if (isDrawn) await page.mouse.up();
      await page.evaluate(() => void (window.isDrawing = false));
      await page.waitForTimeout(200);
    }
  };
  await run(3, false);
  const idle = await page.evaluate(() => window.measured.frames.splice(0));
  await run(given.strokes, true);
  await shoot('strokes');
  const { frames, pointermove: moves, pointerup: ends } = await page.evaluate(() => window.measured);
  const { drawn, edits } = await page.evaluate(async () => {
    const { state } = await import('/progidiff/static/state.js');
    const [{ drawn: found }] = state.drawing.list();
    return { drawn: state.drawing.decode(found).reduce((sum, value) => sum + value, 0), edits: found.edits };
  });
  return { idle, frames, moves, ends, drawn, edits, shape: [where.depth, where.height, where.width] };
});
