import assert from 'node:assert/strict';
import { test } from 'node:test';

import { describeProgressOf } from '../../apps/progidiff/web/review/checklist.js';
import { describeHead, describeSentence, listWords, tidy } from '../../apps/progidiff/web/review/sentences.js';

const HEAD = { name: 'chest', version: 'chest@1', classes: ['right lung', 'left lung'], reads_text: true, gray: true, phrases: ['left lung', 'both lungs'], figures: {} };
const SAVED = { sentence: 'Dense.', problem: '', most_letters: 2000, changes: [] };

test('a sentence is compared without the spaces that nobody sees', () => {
  assert.equal(tidy('  Dense \n on the\tleft. '), 'Dense on the left.');
});

test('what was typed is told from what is saved, and a table that cannot be read comes first', () => {
  assert.equal(describeSentence(SAVED, null), 'Saved in text.csv.');
  assert.match(describeSentence(SAVED, { text: 'Sparse.', former: 'Dense.' }), /^Not saved yet/);
  assert.match(describeSentence(SAVED, { text: '', former: 'Dense.' }), /is empty/);
  assert.match(describeSentence({ ...SAVED, sentence: '' }, null), /no sentence yet/);
  assert.match(describeSentence({ ...SAVED, problem: 'No column.' }, { text: 'a', former: '' }), /^No column\. Until then/);
});

test('a model says what it knows, that it reads nothing, and that it learned from other pictures', () => {
  assert.deepEqual(listWords(HEAD), ['left lung', 'both lungs', 'right lung']);
  assert.deepEqual(listWords({ ...HEAD, reads_text: false, phrases: [] }), []);
  assert.deepEqual(listWords(null), []);
  assert.equal(describeHead({ problem: '', is_coloured: false }, HEAD), 'chest@1 knows: left lung, both lungs.');
  assert.match(describeHead({ problem: '', is_coloured: true }, HEAD), /grey pictures/);
  assert.match(describeHead({ problem: '', is_coloured: false }, { ...HEAD, reads_text: false }), /reads no sentence/);
  assert.equal(describeHead({ problem: 'There are no weights.', is_coloured: true }, null), 'There are no weights.');
});

test('of a picture nobody counts the one slice', () => {
  const none = { volume: null, slices: [] };
  assert.deepEqual(describeProgressOf({ volume: null, slices: [0] }, undefined, true, true), { mark: 'accepted', words: 'accepted' });
  assert.deepEqual(describeProgressOf(none, [0], true, true), { mark: 'saved', words: 'saved' });
  assert.deepEqual(describeProgressOf(none, null, true, true), { mark: 'saved', words: 'saved' });
  assert.deepEqual(describeProgressOf(none, undefined, true, true), { mark: 'open', words: 'open' });
});
