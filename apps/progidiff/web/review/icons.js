// Small pictures for buttons, drawn as lines on a grid of 24 by 24.

const SVG = "http://www.w3.org/2000/svg";

/** @type {Record<string, string>} name -> path */
const PATHS = {
  eye: "M2 12s4-7 10-7 10 7 10 7-4 7-10 7-10-7-10-7zM12 9a3 3 0 1 0 0 6 3 3 0 0 0 0-6z",
  eyeOff: "M4 4l16 16M9.5 5.3A11 11 0 0 1 12 5c6 0 10 7 10 7a18 18 0 0 1-3.2 3.8M6 7.6A17 17 0 0 0 2 12s4 7 10 7a10 10 0 0 0 3.5-.6",
  contrast: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18zM12 3v18M15 5v14M18 7v10",
  zoomIn: "M10 4a6 6 0 1 0 0 12 6 6 0 0 0 0-12zM14.5 14.5L20 20M10 7v6M7 10h6",
  zoomOut: "M10 4a6 6 0 1 0 0 12 6 6 0 0 0 0-12zM14.5 14.5L20 20M7 10h6",
  fit: "M4 9V4h5M15 4h5v5M20 15v5h-5M9 20H4v-5",
  layers: "M12 3l9 5-9 5-9-5zM3 13l9 5 9-5",
  saved: "M5 4h11l3 3v13H5zM8 4v5h7V4M8 20v-6h8v6",
  target: "M12 5a7 7 0 1 0 0 14 7 7 0 0 0 0-14zM12 2v6M12 16v6M2 12h6M16 12h6",
  up: "M6 15l6-6 6 6",
  down: "M6 9l6 6 6-6",
  next: "M6 5l8 7-8 7zM18 5v14",
  plus: "M12 5v14M5 12h14",
  minus: "M5 12h14",
  scribbleIn: "M3 17c3-9 5 4 8-4M15 7h6M18 4v6",
  scribbleOut: "M3 17c3-9 5 4 8-4M15 7h6",
  boxIn: "M4 6h16v12H4z",
  lassoIn: "M12 5c5 0 9 2.5 9 6s-4 6-9 6-9-2.5-9-6 4-6 9-6zM8 16l-2 5",
  clear: "M5 5l14 14M19 5L5 19",
  check: "M4 13l5 5L20 7",
  upload: "M12 16V4M7 9l5-5 5 5M4 16v4h16v-4",
};

/** @param {string} name @returns {SVGElement} */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const attributes = { viewBox: "0 0 24 24", width: "18", height: "18", fill: "none", stroke: "currentColor", "stroke-width": "2", "stroke-linecap": "round", "stroke-linejoin": "round" };
  for (const [key, value] of Object.entries(attributes)) svg.setAttribute(key, value);
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}
