// Tables inside .fp-sortable: a button in each head sorts by its column, a field above filters the
// rows by words. Without this script they are plain tables.
(() => {
  const EMPTY = /^[–-]?$/;

  // Numbers sort as numbers: a column of them has nothing else, but for empty cells.
  const values = (rows, at) => {
    const texts = rows.map((row) => row.cells[at].textContent.trim());
    const numeric = texts.every((text) => EMPTY.test(text) || Number.isFinite(Number(text)));
    return texts.map((text) => (EMPTY.test(text) ? null : numeric ? Number(text) : text));
  };

  const compare = (a, b) =>
    typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });

  const sortable = (table, rows) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, at) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "fp-sort";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const by = new Map(values(rows, at).map((value, row) => [rows[row], value]));
        const sorted = [...rows].sort((one, two) => {
          const [a, b] = [by.get(one), by.get(two)];
          if (a === null || b === null) return (a === null) - (b === null); // last in both ways
          return down ? compare(b, a) : compare(a, b);
        });
        table.tBodies[0].append(...sorted);
      });
    });
  };

  const filterable = (box, rows, number) => {
    const label = document.createElement("label");
    label.htmlFor = `fp-filter-${number}`;
    label.textContent = "Show rows with these words";
    const field = document.createElement("input");
    field.type = "search";
    field.id = label.htmlFor;
    field.autocomplete = "off";
    field.spellcheck = false;
    const count = document.createElement("span");
    count.setAttribute("role", "status");
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const filter = () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      rows.forEach((row, at) => {
        row.hidden = !words.every((word) => texts[at].includes(word));
      });
      const shown = rows.filter((row) => !row.hidden).length;
      count.textContent = `${shown} of ${rows.length} rows`;
    };
    field.addEventListener("input", filter);
    filter();
    const line = document.createElement("div");
    line.className = "fp-filter";
    line.append(label, field, count);
    box.prepend(line);
  };

  document.querySelectorAll(".fp-sortable").forEach((box, number) => {
    const table = box.querySelector("table");
    const rows = [...table.tBodies[0].rows];
    sortable(table, rows);
    filterable(box, rows, number);
  });
})();
