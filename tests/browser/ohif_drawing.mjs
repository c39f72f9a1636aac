// OHIF: what is drawn in another segment than the prompted one is asked about and kept; one organ shows one segment; points steer.
// Wants {image: patient id, prompt, other: [label, name] of a structure that is not prompted}.

import { drive } from './driver.mjs';
import { list, open, propose, readMask, show } from './viewer.mjs';

/** The segments that the viewer lists, and the one that its brush draws. */
const readSegments = (page) =>
  page.evaluate(() => {
    const { state, segmentIndex } = window.cornerstoneTools.segmentation;
    const { segmentationId, segments } = state.getSegmentations().find((entry) => entry.segmentationId.startsWith('progidiff-'));
    return { listed: Object.values(segments).map(({ label }) => label), active: segments[segmentIndex.getActiveSegmentIndex(segmentationId)]?.label };
  });

/** Place a point at a share of the viewport's width and height; where the panel says it is: column, row, slice. */
async function point(page, panel, button, [across, down]) {
  const box = await page.locator('.viewport-element, [data-viewport-uid]').first().boundingBox();
  const asked = page.waitForRequest((request) => request.method() === 'POST' && request.url().includes('/infer/progidiff'));
  await panel.getByRole('button', { name: button }).click();
  await page.mouse.click(box.x + across * box.width, box.y + down * box.height);
  const text = (await asked).postData();
  await panel.locator('button[data-show=consensus][aria-pressed=true]:enabled').waitFor();
  await panel.getByText(/given/).waitFor();
  const { edits } = JSON.parse(text.slice(text.indexOf('{'), text.lastIndexOf('}') + 1));
  return edits.at(-1).points[0];
}

drive(async (page, given, { shoot }) => {
  const said = {};
  const panel = await open(page, given.url, given.image);
  await panel.getByText(given.image).first().waitFor();
  await propose(panel, given.prompt, 2);
  said.segments = await readSegments(page);

  // A stroke in a segment that was not prompted. Nothing is saved before it is said what becomes of it.
  const before = await readMask(page);
  said.columns = await page.evaluate(() => {
    const service = window.services.cornerstoneViewportService;
    const id = service.getCornerstoneViewport(window.services.viewportGridService.getState().activeViewportId).getCurrentImageId();
    return window.cornerstone.metaData.get('imagePlaneModule', id).columns;
  });
  const z = Math.floor(before.length / 2);
  said.stroke = [z, 3, 4];
  await readMask(page, [...said.stroke, given.other[0]]);
  await panel.getByRole('button', { name: 'Accept volume' }).click();
  await panel.getByText(new RegExp(`1 voxel as ${given.other[1]}`)).waitFor();
  await shoot('asked');
  await panel.getByRole('button', { name: `Keep as ${given.other[1]}` }).click();
  await panel.getByText(/Saved the volume/).waitFor();
  said.kept = await panel.locator('output').textContent();

  // Said once: as long as it is as it was, the same is not asked again.
  await panel.getByRole('button', { name: 'Accept volume' }).click();
  await panel.getByText(/saved already/).waitFor();
  said.again = await panel.locator('output').textContent();

  // On another slice the same becomes what was prompted.
  said.second = [z + 1, 5, 6];
  await readMask(page, [...said.second, given.other[0]]);
  await panel.getByRole('button', { name: 'Accept volume' }).click();
  await panel.getByRole('button', { name: `Count as ${given.prompt}` }).click();
  await panel.getByText(/Saved the volume/).waitFor();

  // Where the proposals differ is a picture of its own: its bands are segments while it is shown.
  await show(panel, 'disagreement');
  said.bands = (await readSegments(page)).listed;
  await show(panel, 'edited');
  said.after = await readSegments(page);
  said.shows = await list(panel);

  // Points of the viewer's own tool steer: each is kept by the next proposals, and what was drawn and saved is not in the way.
  await show(panel, 'consensus');
  said.points = [await point(page, panel, '+ points', [0.4, 0.45]), await point(page, panel, '− points', [0.6, 0.5])];
  await panel.getByText(/given 2 points/).waitFor();
  await shoot('points');
  const steered = await readMask(page);
  said.inside = said.points.map(([column, row, slice]) => steered[slice][row * said.columns + column]);
  await panel.getByRole('button', { name: 'Remove 2 points' }).click();
  await panel.locator('button[data-show=consensus][aria-pressed=true]:enabled').waitFor();
  await panel.getByText(/given 2 points/).waitFor({ state: 'detached' });
  return said;
});
