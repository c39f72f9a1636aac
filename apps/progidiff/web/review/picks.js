// What a person can pick of the proposals of a structure, what it draws, and how it is called.

import { countDrawn } from "./masks.js";

/** @typedef {"consensus"|"best"|"proposal"|"union"|"intersection"|"majority"|"threshold"|"nothing"} Rule */
/** @typedef {"union"|"intersection"|"majority"|"threshold"} MergeRule */
/**
 * As `Pick` of progidiff/labels/decisions.py reads it; members count from 1, none are all of them.
 * @typedef {{rule: Rule, members: number[], threshold: number}} Pick
 */

/** @type {readonly MergeRule[]} */
export const MERGE_RULES = ["union", "intersection", "majority", "threshold"];

/** The tolerance of the server: 0.3 of 10 proposals are 3 of them. */
const TOLERANCE = 1e-6;
/** A threshold begins with this share of the proposals. */
const FIRST_THRESHOLD = 0.75;

/**
 * @param {Rule} rule
 * @param {number[]} members
 * @param {number} threshold
 * @returns {Pick}
 */
export const makePick = (rule, members = [], threshold = 0.5) => ({ rule, members, threshold });

/** @param {number} number @returns {Pick} */
export const pickProposal = (number) => makePick("proposal", [number]);

/** @param {Pick} pick */
export const isMerged = (pick) => MERGE_RULES.some((rule) => rule === pick.rule);

/** @param {number} count @returns {number[]} 1 to count */
const listNumbers = (count) => Array.from({ length: count }, (_, k) => k + 1);

/**
 * Proposals that a merge takes; all of them where it is no merge.
 * @param {Pick} pick
 * @param {number} count how many proposals there are
 */
export const listMembers = (pick, count) => (isMerged(pick) && pick.members.length ? pick.members : listNumbers(count));

/**
 * How many of `size` proposals have to draw a pixel.
 * @param {number} share
 * @param {number} size
 */
export const countNeeded = (share, size) => Math.max(1, Math.ceil(share * size - TOLERANCE));

/**
 * The mask that a pick makes of all proposals, as the server will make it: see `Pick.draw` in progidiff/labels/decisions.py.
 * @param {readonly Uint8Array[]} masks
 * @param {Pick} pick
 * @param {number} best index of the most typical proposal
 * @returns {Uint8Array}
 */
export function drawPick(masks, pick, best) {
  const size = masks.length ? masks[0].length : 0;
  if (pick.rule === "nothing") return new Uint8Array(size);
  if (pick.rule === "best") return masks[best];
  if (pick.rule === "proposal") return masks[pick.members[0] - 1];
  const chosen = pick.members.length ? pick.members.map((member) => masks[member - 1]) : masks;
  const shares = { union: 0, intersection: 1, threshold: pick.threshold, majority: 0.5, consensus: 0.5 };
  const needed = countNeeded(shares[pick.rule], chosen.length);
  return countDrawn(chosen).map((count) => (count >= needed ? 1 : 0));
}

/** @param {number} size @returns {number} a share that whole proposals can reach */
const startThreshold = (size) => Math.ceil(size * FIRST_THRESHOLD) / size;

/**
 * Merge by a rule, with the members that are chosen.
 * @param {Pick} pick what is picked now
 * @param {MergeRule} rule
 * @param {number} count how many proposals there are
 * @returns {Pick}
 */
export function mergeBy(pick, rule, count) {
  const members = isMerged(pick) ? pick.members : [];
  const threshold = rule === "threshold" && pick.rule !== "threshold" ? startThreshold(members.length || count) : pick.threshold;
  return makePick(rule, members, threshold);
}

/**
 * Let a proposal take part in the merge, or not any more; the last one stays.
 * @param {Pick} pick
 * @param {number} number
 * @param {number} count how many proposals there are
 * @returns {Pick}
 */
export function toggleMember(pick, number, count) {
  const chosen = new Set(listMembers(pick, count));
  if (chosen.has(number) && chosen.size > 1) chosen.delete(number);
  else chosen.add(number);
  const members = chosen.size === count ? [] : [...chosen].sort((a, b) => a - b);
  const rule = isMerged(pick) ? pick.rule : "majority";
  return makePick(rule, members, rule === "threshold" ? startThreshold(chosen.size) : 0.5);
}

/**
 * Ask that so many proposals draw a pixel.
 * @param {Pick} pick
 * @param {number} needed
 * @param {number} count how many proposals there are
 * @returns {Pick}
 */
export function requireProposals(pick, needed, count) {
  const size = pick.members.length || count;
  return makePick("threshold", pick.members, Math.min(size, Math.max(1, needed)) / size);
}

/**
 * One proposal fewer or more; a threshold first where the pick is none.
 * @param {Pick} pick
 * @param {number} step
 * @param {number} count how many proposals there are
 * @returns {Pick}
 */
export function shiftThreshold(pick, step, count) {
  if (pick.rule !== "threshold") return mergeBy(pick, "threshold", count);
  return requireProposals(pick, Math.round(pick.threshold * (pick.members.length || count)) + step, count);
}

/**
 * A pick in words.
 * @param {Pick|null} pick
 * @param {number} count how many proposals there are
 */
export function describePick(pick, count) {
  if (!pick || pick.rule === "consensus") return "consensus";
  if (pick.rule === "proposal") return `proposal ${pick.members[0]}`;
  if (pick.rule === "best") return "most typical proposal";
  if (pick.rule === "nothing") return "absent";
  const of = pick.members.length && pick.members.length < count ? `of ${pick.members.join(", ")}` : "of all";
  return pick.rule === "threshold" ? `at least ${Math.round(pick.threshold * 100)} % ${of}` : `${pick.rule} ${of}`;
}
