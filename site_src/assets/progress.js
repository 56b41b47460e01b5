// What the reader has read: a tick at the end of each lesson, kept in this browser, and a mark
// at each link to such a page in the navigation and on the roadmap.
(() => {
  const KEY = "forward-pass.read";
  const root = new URL("..", document.currentScript.src).href;
  const LINKS = ".md-nav--primary a.md-nav__link[href], .road a[href]";

  /* Pages and the days on which they were ticked. */
  const all = () => {
    try {
      const kept = JSON.parse(localStorage.getItem(KEY));
      return Object.fromEntries(Object.entries(kept).filter(([, day]) => typeof day === "string"));
    } catch {
      return {}; // nothing is kept, or nothing may be
    }
  };

  /* Returns whether the browser keeps it. */
  const keep = (read) => {
    try {
      localStorage.setItem(KEY, JSON.stringify(read));
    } catch {
      return false;
    }
    paint();
    return true;
  };

  /* The page that an address leads to, as the metadata names it; null outside the site. */
  const pageOf = (address) => {
    const plain = address.replace(/[?#].*/, "");
    return plain.startsWith(root) ? plain.slice(root.length).replace(/\.html$/, "") : null;
  };

  const mark = (link, read) => {
    link.querySelector(".road-mark")?.remove();
    if (!read) return;
    const made = document.createElement("span");
    made.className = "road-mark";
    const unseen = document.createElement("span");
    unseen.className = "fp-unseen";
    unseen.textContent = " (read)";
    made.append(unseen);
    link.append(made);
  };

  const here = pageOf(location.href);
  const tick = document.querySelector(".road-tick");
  const box = tick?.querySelector("input");

  const paint = () => {
    const read = all();
    for (const link of document.querySelectorAll(LINKS)) mark(link, pageOf(link.href) in read);
    if (box) box.checked = here in read;
    document.dispatchEvent(new Event("progress"));
  };

  box?.addEventListener("change", () => {
    const read = all();
    if (box.checked) read[here] = new Date().toISOString().slice(0, 10);
    else delete read[here];
    if (keep(read)) return;
    box.checked = false;
    const said = document.createElement("span");
    said.setAttribute("role", "status");
    said.textContent = " This browser keeps nothing for this site, so no tick either.";
    tick.append(said);
  });
  tick?.classList.add("ready");
  addEventListener("storage", (change) => change.key === KEY && paint()); // another tab
  globalThis.progress = { all, keep, pageOf, mark, root };
  paint();
})();
