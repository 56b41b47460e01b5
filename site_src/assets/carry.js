// The button beside each link to a one-file module and to the page's Markdown (theme/buttons.py)
// copies that file. The text comes by a script of the same name, since a page opened without a
// server can't fetch.
(() => {
  const load = (address) =>
    new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = address;
      script.onload = () => resolve(script.carried);
      script.onerror = () => reject(new Error(address));
      document.head.append(script);
    });

  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Without https there is no clipboard, but there still is the old way.
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      if (!done) throw new Error("no clipboard");
    }
  };

  for (const link of document.querySelectorAll("a.one-file, a.twin")) {
    const button = link.nextElementSibling;
    const said = button.nextElementSibling;
    let text;
    const prepare = () => {
      text ??= load(link.href.replace(/\.(py|md)$/, ".js"));
      return text;
    };
    // Early, because a browser lets a page copy only for a moment after a click.
    button.addEventListener("pointerenter", prepare);
    button.addEventListener("focus", prepare);
    button.addEventListener("click", async () => {
      said.textContent = "";
      try {
        await copy(await prepare());
        said.textContent = "Copied";
      } catch {
        text = undefined;
        said.textContent = "Could not copy: take the link";
      }
      button.focus();
      setTimeout(() => (said.textContent = ""), 4000);
    });
  }
})();
