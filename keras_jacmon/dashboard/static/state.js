// What is chosen, kept in the address: of the page that holds the tab, if it may be read, so that a reload finds it.

const PREFIX = "p.keras_jacmon.";

export function host() {
  if (!location.pathname.endsWith("/plugin_entry.html")) return window;
  try {
    if (window.parent.document) return window.parent;
  } catch {
    // A page of another origin, such as a notebook's.
  }
  return window;
}

function parts() {
  return host().location.hash.replace(/^#/, "").split("&").filter(Boolean);
}

export function readState() {
  const found = {};
  for (const part of parts()) {
    const [name, value] = part.split("=");
    if (!name.startsWith(PREFIX) || value === undefined) continue;
    try {
      found[name.slice(PREFIX.length)] = decodeURIComponent(value);
    } catch {
      // Half of an address is no address.
    }
  }
  return found;
}

export function writeState(state) {
  const others = parts().filter((part) => !part.startsWith(PREFIX));
  const own = Object.entries(state)
    .filter(([, value]) => value !== undefined && value !== "")
    .map(([name, value]) => `${PREFIX}${name}=${encodeURIComponent(value)}`);
  const page = host();
  // A page inside of a notebook has no address.
  if (page.location.protocol === "about:") return;
  // Not `#...` alone: that would begin at the base of the tab's frame.
  const { pathname, search } = page.location;
  page.history.replaceState(page.history.state, "", `${pathname}${search}#${[...others, ...own].join("&")}`);
}

export function isDark() {
  const body = host() !== window && host().document.body;
  if (body) return body.classList.contains("dark-mode");
  return window.matchMedia("(prefers-color-scheme: dark)").matches;
}
