// OHIF: open a study from the list, prompt, step through the proposals, accept a slice and submit, submit a whole proposal.
// Wants {image: patient id, called: what the panel calls the image, prompt, count, accept: show to submit as a whole}.

import { drive } from './driver.mjs';

const read = (page) =>
  page.evaluate(() => {
    // Counted as the server counts: slices ascending along their normal. FNV-1a tells masks apart.
    const state = window.cornerstoneTools.segmentation.state;
    const segmentation = state.getSegmentations().find(({ segmentationId }) => segmentationId.startsWith('progidiff-'));
    const data = segmentation.representationData.Labelmap;
    const ids = data.imageIds?.length ? data.imageIds : window.cornerstone.cache.getVolume(data.volumeId).imageIds;
    const place = (id) => window.cornerstone.metaData.get('imagePlaneModule', id).imagePositionPatient[2];
    const counts = {};
    for (const id of [...ids].sort((a, b) => place(a) - place(b))) {
      for (const value of window.cornerstone.cache.getImage(id).voxelManager.getScalarData()) counts[value] = (counts[value] || 0) + 1;
    }
    return counts;
  });

const measure = (page, name) =>
  page.evaluate((wanted) => performance.getEntriesByName(`progidiff:${wanted}`).map(({ duration }) => Math.round(duration)), name);

drive(async (page, given, { shoot }) => {
  const started = Date.now();
  await page.goto(`${given.url}/ohif/`);
  const row = page.getByText(given.image, { exact: true }).first();
  await row.waitFor();
  await shoot('list');
  const listed = Date.now() - started;
  const studies = await (await page.request.get(`${given.url}/proxy/dicom/qido/studies?PatientID=${given.image}`)).json();
  const study = studies[0]['0020000D'].Value[0];

  const opened = Date.now();
  await page.goto(`${given.url}/ohif/viewer?StudyInstanceUIDs=${study}`);
  const panel = page.locator('#progidiff-panel');
  await panel.waitFor({ state: 'visible' });
  await page.getByRole('button', { name: 'Confirm and Hide' }).click(); // OHIF: for investigational use only
  await page.waitForFunction(() => {
    const service = window.services?.cornerstoneViewportService;
    const viewport = service?.getCornerstoneViewport(window.services.viewportGridService.getState().activeViewportId);
    return viewport?.getCurrentImageId?.() && window.cornerstone.cache.getImage(viewport.getCurrentImageId());
  });
  const firstPixels = Date.now() - opened;
  await panel.getByText(given.called).waitFor();

  await panel.getByLabel('Prompt').fill(given.prompt);
  await panel.getByLabel('Number of proposals').fill(String(given.count));
  await panel.getByRole('button', { name: 'Propose' }).click();
  await panel.locator('button[data-show=consensus][aria-pressed=true]:enabled').waitFor({ timeout: 300000 });
  await shoot('consensus');

  const counts = { consensus: await read(page) };
  const shows = await panel.locator('button[data-show]').evaluateAll((buttons) => buttons.map(({ dataset }) => dataset.show));
  await page.waitForLoadState('networkidle');
  for (const show of shows.slice(1)) {
    await panel.locator(`button[data-show="${show}"]`).click();
    await panel.locator(`button[data-show="${show}"][aria-pressed=true]:enabled`).waitFor();
    counts[show] = await read(page);
  }
  await shoot('disagreement');

  // One slice: the most disputed one, of the proposal that is to be accepted.
  await panel.locator(`button[data-show="${given.accept}"]`).click();
  await panel.locator(`button[data-show="${given.accept}"][aria-pressed=true]:enabled`).waitFor();
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
