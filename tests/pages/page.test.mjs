import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import test from "node:test";

import { describeEmpty } from "../../apps/progidiff/web/review/empty.js";
import { sayOnPage } from "../../apps/progidiff/web/review/words.js";
import { computeCrc, zipFiles } from "../../apps/progidiff/web/review/zip.js";

const worklist = (images, todo, started, done) => ({ images, counts: { todo, started, done }, folder: "/data/studies", formats: [".nii.gz", ".nrrd"], found: 0, entries: [], strategy: "", heading: "", organs: [] });

test("an empty folder says where images go and in which formats", () => {
  const [heading, ...lines] = describeEmpty(worklist(0, 0, 0, 0), null);
  assert.equal(heading, "No images yet");
  assert.match(lines.join(" "), /\/data\/studies as \.nii\.gz, \.nrrd/);
  assert.match(lines.join(" "), /DICOM series/);
});

test("while images are scored it says how far, and when all are done what to do then", () => {
  const scoring = { state: "scoring", images: 40, scored: 12, image: "scan" };
  assert.match(describeEmpty(worklist(40, 30, 6, 4), scoring).join(" "), /30 to do, 6 started, 4 done.*12 of 40 so far, now scan/);
  assert.equal(describeEmpty(worklist(40, 40, 0, 0), { ...scoring, state: "done", scored: 40 }).length, 2);
  assert.equal(describeEmpty(worklist(40, 0, 0, 40), null)[0], "All 40 images are done");
  assert.match(describeEmpty(null, null)[0], /Asking/);
});

test("sentences about options that the page does not offer are left out", () => {
  const text = "Prompt 'spline' names no structure. Did you mean 'spleen'? `progidiff prompts` lists them; send allow_free_text=true to try it anyway.";
  assert.equal(sayOnPage(text), "Prompt 'spline' names no structure. Did you mean 'spleen'?");
  assert.equal(sayOnPage("Image 'my_scan' has no label. GET /datastore lists them."), "Image 'my_scan' has no label.");
  assert.equal(sayOnPage("Raise num_proposals."), "Raise num_proposals.");
});

test("a checksum is that of the standard", () => {
  assert.equal(computeCrc(new TextEncoder().encode("123456789")), 0xcbf43926);
});

test("an archive holds the files as they were, for a reader of its own", () => {
  const files = [["a/ä.dcm", "first"], ["b.dcm", ""], ["c.dcm", "\u0000\u0001third"]].map(([name, text]) => ({ name, bytes: new TextEncoder().encode(text) }));
  const path = join(mkdtempSync(join(tmpdir(), "zip-")), "files.zip");
  writeFileSync(path, Buffer.concat(zipFiles(files)));
  const script = "import json,sys,zipfile; a=zipfile.ZipFile(sys.argv[1]); assert a.testzip() is None; print(json.dumps({n: a.read(n).hex() for n in a.namelist()}))";
  const read = JSON.parse(execFileSync("python3", ["-c", script, path], { encoding: "utf8" }));
  assert.deepEqual(read, Object.fromEntries(files.map(({ name, bytes }) => [name, Buffer.from(bytes).toString("hex")])));
});
