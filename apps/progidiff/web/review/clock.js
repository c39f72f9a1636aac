// Times that sort what a person did, of whatever kind it was.

let last = 0;

/** Milliseconds since 1970, later than every time given before. */
export function nextTime() {
  last = Math.max(Date.now(), last + 1);
  return last;
}
