// What the server answers, by the names that the pages use. Types that the server declares come from api.d.ts, which is made from its
// OpenAPI description (`make api-types`); those that it does not declare yet are written out here.

import type { paths } from "./api.d.ts";
import type { Pick } from "./review/picks.js";

/** What a route answers when all went well. */
type Answer<P extends keyof paths, M extends keyof paths[P]> = paths[P][M] extends { responses: { 200: { content: { "application/json": infer T } } } } ? T : never;

/** Of an image. */
export type ImageInfo = Answer<"/progidiff/review/{image}", "get">;

export interface StructureNumbers {
  present: boolean;
  consensus_ml: number;
  proposals_ml: number[];
  /** the most typical proposal, counted from 1 */
  best: number;
  ranking: number[];
  mean_disagreement: number;
  disagreement_per_slice: number[];
  nearby_disagreement_per_slice: number[];
}

export interface Summary {
  num_proposals: number;
  model_version: string;
  adapter: string;
  structures: Record<string, StructureNumbers>;
}

/** GET /progidiff/proposals/{image} */
export interface KeptProposals {
  image: string;
  proposals: string;
  summary: Summary;
}

/** POST /infer/progidiff?output=json */
export interface Proposed extends Summary {
  /** key of the result */
  proposals: string;
  warnings: string[];
}

/** `waiting_for` is to be read after "waiting for"; "" if it does not wait. */
export type Job = Answer<"/progidiff/jobs/{job_id}", "get">;

/** GET /progidiff/prompts, one of the list */
export interface Prompt {
  structure: string;
  label: number;
  synonyms: string[];
  /** #rrggbb */
  color: string;
}

export interface QueueSlice {
  index: number;
  score: number;
  structures: string[];
  reason: string;
}

/** GET /progidiff/queue, one of the list */
export interface QueueEntry {
  image: string;
  slices: QueueSlice[];
  reason: string;
  state: string;
  modality?: string;
  reserved_by?: string | null;
}

/** The body of POST /progidiff/review/{image} */
export interface Decisions {
  proposals: string;
  volume: Record<string, Pick>;
  slices: Record<string, Record<string, Pick>>;
  base: number;
  seconds: number;
}

/** Of a save from either page. */
export type Saved = Answer<"/progidiff/review/{image}", "post"> & Answer<"/datastore/label", "put">;

export type Undone = Answer<"/progidiff/annotations/{image}/undo", "post">;

/** GET /progidiff/training */
export interface Training {
  state: string;
  message: string;
  running: boolean;
  trainer?: string;
  step?: number;
  total?: number;
  eta_seconds?: number | null;
  reason?: string;
}

export interface LeftOut {
  name: string;
  /** a sentence with the cure */
  reason: string;
}

/** GET /progidiff/scoring */
export interface Scoring {
  state: string;
  images: number;
  scored: number;
  image: string;
  /** what of the folder of studies is not served, and why */
  left_out: LeftOut[];
}

/** A version that is damaged has a number and a problem only. */
export interface Version {
  version: number;
  problem: string;
  modality?: string;
  structures?: string[];
  /** ISO 8601 */
  created?: string;
  fits?: boolean;
  verdict?: string;
  dice?: { base?: { consensus?: number }; adapted?: { consensus?: number } };
}

/** GET /progidiff/versions, one of the list */
export interface Adapter {
  name: string;
  current: number | null;
  problem: string;
  versions: Version[];
}

/** POST /progidiff/versions/{name}/{version}/use, .../rollback */
export interface Served {
  name: string;
  served: string;
}

/** GET /datastore/?output=all */
export interface Datastore {
  objects: Record<string, { labels?: { final?: unknown } }>;
}

/** GET /progidiff/ohif/images/{image} */
export interface SeriesInfo {
  image: string;
  study: string;
  series: string;
  /** for every slice of the series the axial index that the server counts with; null if the series is not axial */
  axial_slices: number[] | null;
}

/** POST /activelearning/{strategy}: without an image to give, `message` alone */
export interface NextSample {
  id?: string;
  slices?: QueueSlice[];
  reason?: string;
  message?: string;
}

/** GET /info/, what the panel reads of it */
export interface ServerInfo {
  models?: { progidiff?: { config?: { show?: string[] } } };
}

/** Why a request was refused. */
export interface Refusal {
  detail?: unknown;
  suggestions?: string[];
}
