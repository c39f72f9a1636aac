// Finding and making elements. Text always goes in as text.

/** @typedef {string|Node|null|undefined|false} Child what is null, undefined, false or "" is left out */
/** @typedef {Record<string, ((event: any) => void)>} Listeners */

/**
 * `element("p", { className: "muted" }, "text", child)`; names with "-" become attributes, `on` adds listeners.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, unknown>} [properties]
 * @param {...Child} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") for (const [event, listener] of Object.entries(/** @type {Listeners} */ (value))) node.addEventListener(event, listener);
    else if (name.includes("-") || name === "role") node.setAttribute(name, String(value));
    else Object.assign(node, { [name]: value });
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/**
 * An element of index.html.
 * @template {HTMLElement} T
 * @param {string} id
 * @param {new () => T} kind what it is, where more is asked of it than of every element
 * @returns {T}
 */
export function find(id, kind = /** @type {new () => any} */ (HTMLElement)) {
  const node = document.getElementById(id);
  if (!(node instanceof kind)) throw new Error(`index.html has no ${kind.name} with the id ${id}.`);
  return node;
}

/** @param {string} id */
export const findInput = (id) => find(id, HTMLInputElement);
/** @param {string} id */
export const findButton = (id) => find(id, HTMLButtonElement);

/**
 * A passing message.
 * @param {string} text
 * @param {""|"good"|"bad"} kind
 * @param {number} seconds
 */
export function toast(text, kind = "", seconds = 4) {
  const node = element("div", { className: `toast ${kind}` }, text);
  const area = find("toasts");
  while (area.children.length > 2) area.firstChild?.remove();
  area.append(node);
  setTimeout(() => node.remove(), seconds * 1000);
}

/**
 * A message that stays until it is answered.
 * @param {string} text
 * @param {""|"bad"} kind
 * @param {[label: string, act: () => void][]} actions
 */
export function notice(text, kind = "", actions = []) {
  const box = find("notice");
  box.className = `notice ${kind}`;
  find("notice-text").textContent = text;
  find("notice-actions").replaceChildren(...actions.map(([label, act]) => element("button", { className: "small", on: { click: act } }, label)));
  box.hidden = false;
}

export function clearNotice() {
  find("notice").hidden = true;
}
