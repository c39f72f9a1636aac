// Starts the system's Chromium without a screen, and hands results to pytest as one line of JSON.

import { chromium } from 'playwright-core';

const ARGUMENTS = ['--no-sandbox', '--use-gl=angle', '--use-angle=swiftshader', '--enable-unsafe-swiftshader', '--ignore-gpu-blocklist'];

/** Ask the test to do something by name; resolves when it is done. */
function act(name) {
  return new Promise((resolve) => {
    process.stdin.once('data', resolve);
    process.stdout.write(`\nDO ${name}\n`);
  });
}

/** Wait until the page has drawn what was asked of it. */
export const settle = (page) => page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));

/** Press a key, and wait for what comes of it. */
export async function press(page, key) {
  await page.keyboard.press(key);
  await settle(page);
}

/** Wait until the slice in view has proposals. */
export const proposed = (page) =>
  page.waitForFunction(() => document.querySelector('.thumb[data-kind="1"] .thumb-note')?.textContent.includes('cm²'));

/**
 * Wait until a function of the page says so. `page.waitForFunction` takes the promise of an asynchronous one for a yes.
 * @param {import('playwright-core').Page} page
 * @param {(given: any) => Promise<unknown>} predicate
 */
export async function until(page, predicate, given = null, timeout = 120000) {
  for (const end = Date.now() + timeout; Date.now() < end; await page.waitForTimeout(60)) {
    if (await page.evaluate(predicate, given)) return;
  }
  throw new Error(`This did not come true: ${predicate}`);
}

/**
 * Run a script in a fresh page; `node script.mjs '<JSON>'` with at least {url, chromium, shots (folder), width, height};
 * `arguments` may take the place of Chromium's.
 * @param {(page: import('playwright-core').Page, given: object, tools: object) => Promise<object>} script
 */
export async function drive(script) {
  const given = JSON.parse(process.argv[2]);
  const browser = await chromium.launch({ executablePath: given.chromium, args: given.arguments ?? ARGUMENTS });
  const context = await browser.newContext({ viewport: { width: given.width ?? 1280, height: given.height ?? 800 } });
  const page = await context.newPage();
  const problems = [];
  page.on('pageerror', (error) => problems.push(String(error)));
  page.on('console', (message) => { if (message.type() === 'error') problems.push(message.text()); });
  page.setDefaultTimeout(given.timeout ?? 120000);
  const shoot = (name) => page.screenshot({ path: `${given.shots}/${name}.png` });
  try {
    const result = await script(page, given, { shoot, browser, act });
    process.stdout.write(`\nRESULT ${JSON.stringify({ ...result, problems })}\n`);
  } catch (error) {
    await shoot('failed').catch(() => undefined);
    process.stderr.write(`${error.stack}\nThe page said:\n${problems.slice(-20).join('\n')}\n`);
    process.exitCode = 1;
  } finally {
    await browser.close();
    process.stdin.destroy(); // else it would be waited for
  }
}
