// Adding images on the review page: files that are dropped, a folder with a DICOM series, and one that is none.
// Wants {files: [name, base64][] to drop, folder: to choose, refused: name of the one that is no image}.

import { drive } from './driver.mjs';

drive(async (page, given, { shoot }) => {
  await page.goto(`${given.url}/progidiff/`);
  await page.locator('.case').first().waitFor();
  await page.evaluate((files) => {
    const transfer = new DataTransfer();
    for (const [name, content] of files) transfer.items.add(new File([Uint8Array.from(atob(content), (one) => one.charCodeAt(0))], name));
    document.dispatchEvent(new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true }));
  }, given.files);
  const told = page.locator('#adding-list li');
  await told.filter({ hasText: given.refused }).locator('.prompt-error').waitFor();
  await page.locator('#adding-folder').setInputFiles(given.folder);
  await told.nth(given.files.length).waitFor();
  await page.waitForFunction((count) => [...document.querySelectorAll('#adding-list li')].filter((one) => one.textContent.includes('added as')).length === count, given.files.length);
  await shoot('added');
  const lines = await told.allTextContents();
  await page.keyboard.press('Escape');
  return { lines, listed: await page.locator('.case-name').allTextContents() };
});
