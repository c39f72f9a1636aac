// What the server answers, by the names that the pages use. Types that the server declares come from api.d.ts, which is made from its
// OpenAPI description (`make api-types`); those that it does not declare yet are written out here.

import type { paths } from "./api.d.ts";
import type { Pick } from "./review/picks.js";

/** What a route answers when all went well. */
type Answer<P extends keyof paths, M extends keyof paths[P]> = paths[P][M] extends { responses: { 200: { content: { "application/json": infer T } } } } ? T : never;

/** Of an image. */
export type ImageInfo = Answer<"/progidiff/review/{image}", "get">;

/** Of a picture, beside what is known of every image. */
export type PictureInfo = Answer<"/progidiff/pictures/{image}", "get">;

export type Sentence = PictureInfo["sentence"];

export type SentenceChange = Sentence["changes"][number];

/** A model for pictures. */
export type Head = PictureInfo["heads"][number];

export type KeptProposals = Answer<"/progidiff/proposals/{image}", "get">;

export type Summary = KeptProposals["summary"];

export type StructureNumbers = Summary["structures"][string];

/** POST /infer/progidiff?output=json */
export interface Proposed extends Summary {
  /** key of the result */
  proposals: string;
  warnings: string[];
}

/** POST /infer/textdiff?output=json */
export interface ProposedPicture {
  /** key of the result */
  proposals: string;
  warnings: string[];
  structures: Record<string, { consensus_pixels: number }>;
}

/** What somebody drew on one slice, in voxels of the file: docs/reference/options.md. */
export interface Edit {
  kind: "click" | "scribble" | "box" | "lasso" | "paint";
  positive?: boolean;
  points?: [i: number, j: number, k: number][];
  structure?: string;
  slice?: number;
  mask?: string;
}

/** `waiting_for` is to be read after "waiting for"; "" if it does not wait. */
export type Job = Answer<"/progidiff/jobs/{job_id}", "get">;

/** One of the list. */
export type Prompt = Answer<"/progidiff/prompts", "get">[number];

/** What this folder labels, and how far each is. */
export type Structures = Answer<"/progidiff/structures", "get">;

export type FolderStructure = Structures["structures"][number];

/** The body of POST /progidiff/structures; of POST /progidiff/structures/{label_id} each part may be left out. */
export interface NewStructure {
  name: string;
  words: string[];
  color: string;
  /** that a name which is nearly a known one is meant as it stands */
  confirm: boolean;
}

export type Worklist = Answer<"/progidiff/worklist", "get">;

type Listed = Worklist["entries"][number];

/** An image of the list of the page; of one that is not in the part that is shown little is known. */
export type WorkEntry = Partial<Listed> & { [Field in "image" | "slices" | "reason" | "state" | "annotated"]: Listed[Field] };

export type QueueSlice = Listed["slices"][number];

/** Who read an image, and how far two people agree. */
export type Readings = Answer<"/progidiff/readings/{image}", "get">;

/** Of an image that somebody said to be done, or not to be done any more. */
export type Finished = Answer<"/progidiff/annotations/{image}/done", "post">;

/** The body of POST /progidiff/review/{image} */
export interface Decisions extends Partial<DecidedPart> {
  /** instead of its own, if structures go by several results */
  parts?: DecidedPart[];
  base: number;
  seconds: number;
  effort?: Record<string, { seconds: number; clicks: number }>;
  painted?: Painted | null;
  /** that names which are nearly known ones are meant as they stand */
  confirm?: boolean;
}

/** What is decided about the structures of one result. */
export interface DecidedPart {
  proposals: string;
  volume: Record<string, Pick>;
  slices: Record<string, Record<string, Pick>>;
}

/** What was drawn by hand; on each slice what lies on top comes last. */
export interface Painted {
  /** depth, height, width of the image */
  shape: number[];
  slices: Record<string, PaintedSlice[]>;
}

export interface PaintedSlice {
  structure: string;
  /** half-open; null if nothing is drawn */
  box: [y0: number, y1: number, x0: number, x1: number] | null;
  /** pixels of 0, of 1, of 0 … in the box, row by row */
  runs: number[];
  /** strokes and buttons */
  edits: number;
  /** the pick that it was drawn on, and of which proposals; null and "" for something else */
  start: Pick | null;
  proposals: string;
}

/** Of a save from either page. */
export type Saved = Answer<"/datastore/label", "put">;

/** Of a submission of the review page: one save or several. */
export type Submitted = Answer<"/progidiff/review/{image}", "post">;

export type Undone = Answer<"/progidiff/annotations/{image}/undo", "post">;

export type Training = Answer<"/progidiff/training", "get">;

export type Scoring = Answer<"/progidiff/scoring", "get">;

/** A file of the folder of studies that is not served, and why: a sentence with the cure. */
export type LeftOut = Scoring["left_out"][number];

/** One of the list. */
export type Adapter = Answer<"/progidiff/versions", "get">[number];

/** A version that is damaged has a number and a problem only. */
export type Version = Adapter["versions"][number];

export type Served = Answer<"/progidiff/versions/{name}/{version}/use", "post"> & Answer<"/progidiff/versions/{name}/rollback", "post">;

/** `axial_slices` are null if the series is not axial. */
export type SeriesInfo = Answer<"/progidiff/ohif/images/{image}", "get">;

/** Without an image to give there is no `id`, and `message` says what to do. */
export type NextSample = Answer<"/activelearning/{strategy}", "post">;

/** GET /info/, what the panel reads of it */
export interface ServerInfo {
  models?: { progidiff?: { config?: { show?: string[] } } };
}

/** Why a request was refused. */
export interface Refusal {
  detail?: unknown;
  suggestions?: string[];
}
