// Making elements. Text always goes in as text.

/** `element("p", { className: "muted" }, "text", child)`; names with "-" become attributes, `on` adds listeners. */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const find = (id) => document.getElementById(id);

/** A passing message. */
export function toast(text, kind = "", seconds = 4) {
  const node = element("div", { className: `toast ${kind}` }, text);
  const area = find("toasts");
  while (area.children.length > 2) area.firstChild.remove();
  area.append(node);
  setTimeout(() => node.remove(), seconds * 1000);
}

/** A message that stays until it is answered. `actions`: [label, callback] pairs. */
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
