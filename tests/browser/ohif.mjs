// OHIF: open a study from the list, prompt, step through the proposals, accept a slice and submit, submit a whole proposal.
// Wants {image: patient id, called: what the panel calls the image, prompt, count, accept: show to submit as a whole}.

import { drive } from './driver.mjs';
import { count, list, measure, open, propose, show, waitUntilReady } from './viewer.mjs';

drive(async (page, given, { shoot }) => {
  const started = Date.now();
  await page.goto(`${given.url}/ohif/`);
  const row = page.getByText(given.image, { exact: true }).first();
  await row.waitFor();
  await shoot('list');
  const listed = Date.now() - started;

  const opened = Date.now();
  const panel = await open(page, given.url, given.image);
  const firstPixels = Date.now() - opened;
  await panel.getByText(given.called).waitFor();

  await propose(panel, given.prompt, given.count);
  await shoot('consensus');

  const counts = { consensus: await count(page) };
  const shows = await list(panel);
  await waitUntilReady(panel);
  for (const name of shows.slice(1)) {
    await show(panel, name);
    counts[name] = await count(page);
  }
  await shoot('disagreement');

  // One slice: the most disputed one, of the proposal that is to be accepted.
  await show(panel, given.accept);
  const disputed = panel.locator('button[style*="--heat"]');
  const slice = (await disputed.count()) ? Number(await disputed.first().textContent()) - 1 : null;
  if (slice !== null) await disputed.first().click();
  await page.waitForTimeout(1000);
  await panel.getByRole('button', { name: 'Accept this slice' }).click();
  await panel.getByText('1 to submit').waitFor();
  await shoot('slice');
  await panel.getByRole('button', { name: 'Submit 1 slices' }).click();
  await panel.getByText(/Saved 1 slices/).waitFor();

  await panel.getByRole('button', { name: 'Accept volume' }).click();
  await panel.getByText(/Saved the volume/).waitFor();
  await panel.getByRole('button', { name: 'Accept volume' }).click();
  await panel.getByText(/saved already/).waitFor();
  await shoot('saved');

  // OHIF's own export, as its menu calls it: without naming the data source. It reaches the server as a DICOM SEG.
  const stored = page.waitForResponse((response) => response.request().method() === 'POST' && response.url().includes('/proxy/dicom/wado/studies'));
  await page.evaluate(() => {
    const { segmentationId } = window.cornerstoneTools.segmentation.state.getSegmentations().find((entry) => entry.segmentationId.startsWith('progidiff-'));
    window.commandsManager.runCommand('storeSegmentation', { segmentationId });
  });
  await page.getByRole('button', { name: 'Save', exact: true }).click();
  const exported = await stored;
  await shoot('exported');
  return { counts, shows, slice, exported: { status: exported.status(), text: await exported.text() }, listed, firstPixels, first: await measure(page, 'first'), proposals: await measure(page, 'proposals'), switches: await measure(page, 'switch') };
});
