// The roadmap: time left on each path, a path of one's own, progress as a file, and what a
// lesson needs shown in the picture.
(() => {
  const { all, keep, pageOf, mark, root } = globalThis.progress;
  const lessons = JSON.parse(document.getElementById("road-data").textContent);
  const stems = Object.keys(lessons);
  const title = (stem) => lessons[stem][0];
  const minutes = (some) => some.reduce((sum, stem) => sum + lessons[stem][1], 0);
  const find = (id) => document.getElementById(id);
  const hours = (m) => (m < 60 ? `${m} min` : `${Math.floor(m / 60)} h ${m % 60} min`);

  const closure = (goal) => {
    const found = new Set();
    const waiting = goal ? [goal] : [];
    while (waiting.length) {
      const stem = waiting.pop();
      if (!found.has(stem)) waiting.push(...lessons[stem][2]);
      found.add(stem);
    }
    return found;
  };

  // Time left

  const paths = [...document.querySelectorAll(".road-path")].map((path) => ({
    said: path.querySelector(".road-left"),
    steps: [...path.querySelectorAll("li a")].map((link) => pageOf(link.href)),
  }));
  const nodes = [...document.querySelectorAll(".road-picture a")]
    .map((link) => ({ link, stem: pageOf(new URL(link.getAttribute("href"), location).href) }))
    .filter(({ stem }) => stem in lessons);
  for (const node of nodes) node.name = node.link.querySelector("title").textContent;

  const count = () => {
    const read = all();
    for (const { said, steps } of paths) {
      const left = steps.filter((stem) => !(stem in read));
      const done = steps.length - left.length;
      said.textContent = done ? `: ${done} read, ${hours(minutes(left))} left` : "";
    }
    for (const { link, stem, name } of nodes) {
      link.classList.toggle("read", stem in read);
      link.querySelector("title").textContent = stem in read ? `${name} (read)` : name;
    }
    const left = stems.filter((stem) => !(stem in read));
    find("road-progress").textContent =
      `You have read ${stems.length - left.length} of ${stems.length} lessons; ` +
      `the others take ${hours(minutes(left))}.`;
    find("road-forget").disabled = find("road-export").disabled = !Object.keys(read).length;
    steps();
  };

  // A path of one's own

  const goal = find("road-goal");
  const known = find("road-known");
  const choices = () => stems.map((stem) => new Option(title(stem), stem));
  goal.append(...choices());
  known.append(new Option("none of these", ""), ...choices());
  goal.value = paths[0]?.steps.at(-1) ?? stems.at(-1);

  const steps = () => {
    const without = closure(known.value);
    const wanted = closure(goal.value);
    const read = all();
    const way = stems.filter((stem) => wanted.has(stem) && !without.has(stem));
    const left = way.filter((stem) => !(stem in read));
    find("road-path-said").textContent = !way.length
      ? "You know all of that already."
      : `${way.length} ${way.length === 1 ? "page" : "pages"}, ${hours(minutes(way))}` +
        (left.length < way.length ? `; ${hours(minutes(left))} left` : "");
    const items = way.map((stem) => {
      const item = document.createElement("li");
      const link = document.createElement("a");
      link.href = `${root}${stem}.html`;
      link.textContent = title(stem);
      mark(link, stem in read);
      const time = document.createElement("span");
      time.className = "road-minutes";
      time.textContent = ` ${lessons[stem][1]} min`;
      item.append(link, time);
      return item;
    });
    find("road-steps").replaceChildren(...items);
  };
  goal.addEventListener("change", steps);
  known.addEventListener("change", steps);

  // Progress as a file

  const say = (words) => (find("road-said").textContent = words);
  const pages = (number) => `${number} ${number === 1 ? "page" : "pages"}`;

  find("road-export").addEventListener("click", () => {
    const read = all();
    const text = JSON.stringify({ kind: "forward-pass progress", version: 1, read }, null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "forward-pass-progress.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    say(`Saved: ${pages(Object.keys(read).length)}.`);
  });

  /* The file's pages and days. Throws an error whose message says what is wrong. */
  const parsed = (text) => {
    let file;
    try {
      file = JSON.parse(text);
    } catch {
      throw new Error("it is not JSON");
    }
    if (file?.kind !== "forward-pass progress") throw new Error("it is no progress saved here");
    if (file.version !== 1) throw new Error(`its version is ${file.version}, and 1 is known here`);
    const { read } = file;
    if (typeof read !== "object" || read === null || Array.isArray(read)) {
      throw new Error("it has no list of pages");
    }
    for (const [stem, day] of Object.entries(read)) {
      if (!/^\d{4}-\d\d-\d\d$/.test(day) || isNaN(new Date(day))) {
        throw new Error(`${stem} has ${JSON.stringify(day)} where a day should be`);
      }
    }
    return read;
  };

  find("road-import").addEventListener("change", async ({ target }) => {
    const [file] = target.files;
    if (!file) return;
    try {
      if (file.size > 1e6) throw new Error("it is larger than such a file can be");
      const read = Object.entries(parsed(await file.text()));
      const here = read.filter(([stem]) => stem in lessons);
      const away = read.filter(([stem]) => !(stem in lessons)).map(([stem]) => stem);
      if (!keep({ ...all(), ...Object.fromEntries(here) })) {
        throw new Error("this browser keeps nothing for this site");
      }
      const lost = away.length ? ` Not here, so left out: ${away.join(", ")}.` : "";
      say(`Loaded: ${pages(here.length)}.${lost}`);
    } catch (error) {
      say(`${file.name} was not loaded: ${error.message}.`);
    }
    target.value = ""; // so that the same file can be chosen again
  });

  find("road-forget").addEventListener("click", () => {
    const number = Object.keys(all()).length;
    if (!confirm(`Forget that you have read ${pages(number)}?`)) return;
    keep({});
    say("Forgotten.");
  });

  // The picture: a lesson shows what it needs, by way of others too

  const lines = [...document.querySelectorAll("[data-edge]")].map((line) => ({
    line,
    ends: line.dataset.edge.split(" ").map((number) => stems[number]),
  }));
  const show = (stem) => {
    const needed = stem ? closure(stem) : new Set();
    for (const node of nodes) node.link.classList.toggle("on", needed.has(node.stem));
    for (const { line, ends } of lines) {
      line.classList.toggle("on", ends.every((end) => needed.has(end)));
    }
  };
  for (const { link, stem } of nodes) {
    for (const event of ["pointerenter", "focus"]) link.addEventListener(event, () => show(stem));
    for (const event of ["pointerleave", "blur"]) link.addEventListener(event, () => show(null));
  }

  for (const box of document.querySelectorAll(".road-own")) box.classList.add("ready");
  document.addEventListener("progress", count);
  count();
})();
