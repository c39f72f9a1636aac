// What the scripts for OHIF share: opening an image, the panel's buttons, and the voxels that the viewer shows.

/** Open the study of an image, by its patient id; resolves with the panel when its first pixels are there. */
export async function open(page, url, image) {
  const studies = await (await page.request.get(`${url}/proxy/dicom/qido/studies?PatientID=${image}`)).json();
  await page.goto(`${url}/ohif/viewer?StudyInstanceUIDs=${studies[0]['0020000D'].Value[0]}`);
  return settle(page);
}

/** The panel, when the viewer shows something. */
export async function settle(page) {
  const panel = page.locator('#progidiff-panel');
  await panel.waitFor({ state: 'visible' });
  // OHIF asks once per browser: for investigational use only.
  await page.getByRole('button', { name: 'Confirm and Hide' }).click({ timeout: 5000 }).catch(() => undefined);
  await page.waitForFunction(() => {
    const service = window.services?.cornerstoneViewportService;
    const viewport = service?.getCornerstoneViewport(window.services.viewportGridService.getState().activeViewportId);
    return viewport?.getCurrentImageId?.() && window.cornerstone.cache.getImage(viewport.getCurrentImageId());
  });
  return panel;
}

export async function propose(panel, prompt, count) {
  await start(panel, prompt, count);
  await panel.locator('button[data-show=consensus][aria-pressed=true]:enabled').waitFor({ timeout: 300000 });
}

export async function start(panel, prompt, count) {
  await panel.getByLabel('Prompt').fill(prompt);
  await panel.getByLabel('Number of proposals').fill(String(count));
  await panel.getByRole('button', { name: 'Propose' }).click();
}

export async function show(panel, name) {
  await panel.locator(`button[data-show="${name}"]`).click();
  await panel.locator(`button[data-show="${name}"][aria-pressed=true]:enabled`).waitFor();
}

/** All proposals are in the browser. */
export const waitUntilReady = (panel) => panel.locator('button[data-show][data-ready=false]').first().waitFor({ state: 'detached' });

export const list = (panel) => panel.locator('button[data-show]').evaluateAll((buttons) => buttons.map(({ dataset }) => dataset.show));

/** The voxels of the panel's mask, slice by slice, ascending along their normal, with `edit` (z, row, column, label) drawn into it first. */
export const readMask = (page, edit = null) =>
  page.evaluate((stroke) => {
    const { state, triggerSegmentationEvents } = window.cornerstoneTools.segmentation;
    const segmentation = state.getSegmentations().find(({ segmentationId }) => segmentationId.startsWith('progidiff-'));
    const data = segmentation.representationData.Labelmap;
    const ids = data.imageIds?.length ? data.imageIds : window.cornerstone.cache.getVolume(data.volumeId).imageIds;
    const plane = (id) => window.cornerstone.metaData.get('imagePlaneModule', id);
    const [a, b] = [Array.from(plane(ids[0]).rowCosines), Array.from(plane(ids[0]).columnCosines)];
    const normal = [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
    const height = (id) => normal.reduce((sum, value, axis) => sum + value * plane(id).imagePositionPatient[axis], 0);
    const slices = [...ids].sort((x, y) => height(x) - height(y)).map((id) => window.cornerstone.cache.getImage(id).voxelManager.getScalarData());
    if (stroke) {
      const [z, row, column, label] = stroke;
      slices[z][row * plane(ids[0]).columns + column] = label;
      triggerSegmentationEvents.triggerSegmentationDataModified(segmentation.segmentationId);
    }
    return slices.map((slice) => Array.from(slice));
  }, edit);

/** How many voxels have each label. */
export async function count(page) {
  const counts = {};
  for (const slice of await readMask(page)) for (const value of slice) counts[value] = (counts[value] || 0) + 1;
  return counts;
}

export const measure = (page, name) =>
  page.evaluate((wanted) => performance.getEntriesByName(`progidiff:${wanted}`).map(({ duration }) => Math.round(duration)), name);
