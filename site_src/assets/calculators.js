/* The calculators' page: reads the fields, shows results, tables and plots as they change, and keeps
   all of it in the address. The fields, their ranges and defaults stand in the page; the formulas in
   calculators_formulas.js; the models and chips, found by the build, in calculators_data.js. */
(() => {
  const { models, chips } = calculatorsData
  const { SHAPE } = calculators
  const OWN = "Own sizes", OWN_CHIP = "Own chip"
  const forms = Object.fromEntries(
    [...document.querySelectorAll("form[data-form]")].map((form) => [form.dataset.form, form]),
  )
  const boxes = [...document.querySelectorAll("[data-calculator]")]
  if (!forms.model || !boxes.length) return

  /* Words and numbers */

  const plain = (number) => number.toLocaleString("en", { maximumFractionDigits: 3 })
  const digits = (number, count = 3) =>
    number >= 1000 ? plain(Math.round(number)) : plain(Number(number.toPrecision(count)))
  const percent = (share) => `${digits(100 * share)}%`
  function scaled(number, base, units) {
    let step = 0
    while (step < units.length - 1 && number >= base) {
      number /= base
      step += 1
    }
    return `${digits(number)} ${units[step]}`
  }
  const decimal = (n) => scaled(n, 1000, ["bytes", "kB", "MB", "GB", "TB", "PB"])
  const binary = (n) => scaled(n, 1024, ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"])
  const bytes = (n) => (n < 1000 ? decimal(n) : `${decimal(n)} (${binary(n)})`)
  const count = (n) => scaled(n, 1000, ["", "thousand", "million", "billion", "trillion"]).trim()
  function seconds(s) {
    if (s >= 120) return `${digits(s / 60)} min`
    return s >= 1 ? `${digits(s)} s` : s >= 1e-3 ? `${digits(s * 1e3)} ms` : `${digits(s * 1e6)} µs`
  }
  const flops = (n) => scaled(n, 1000, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"])
  const many = (n, one, more) => `${plain(n)} ${n === 1 ? one : more}`

  const escaped = (text) =>
    String(text).replace(/[&<>"]/g, (c) => `&${{ "&": "amp", "<": "lt", ">": "gt", '"': "quot" }[c]};`)
  function tableOf(head, rows) {
    const cells = (row, tag) =>
      row.map((cell, at) =>
        at ? `<${tag} class="calc-number">${escaped(cell)}</${tag}>`
          : cell ? `<th scope="${tag === "th" ? "col" : "row"}">${escaped(cell)}</th>` : "<td></td>",
      ).join("")
    const body = rows.map((row) => `<tr>${cells(row, "td")}</tr>`).join("")
    return `<div class="calc-scroll" tabindex="0" role="group" aria-label="Table"><table
      class="calc-data"><thead><tr>${cells(head, "th")}</tr></thead>
      <tbody>${body}</tbody></table></div>`
  }

  /* Fields */

  const controls = (form) => [...form.elements].filter((field) => field.name)
  function show(field, said) {
    const place = document.getElementById(`${field.id}-error`)
    field.setAttribute("aria-invalid", said ? "true" : "false")
    const unit = document.getElementById(`${field.id}-unit`) ? `${field.id}-unit ` : ""
    if (said || unit) field.setAttribute("aria-describedby", `${unit}${said ? place.id : ""}`.trim())
    else field.removeAttribute("aria-describedby")
    place.hidden = !said
    place.textContent = said || ""
  }
  const labelOf = (field) => field.labels[0].textContent
  function wrong(field) {
    if (field.type !== "number") return ""
    const { min, max, step, value } = field, number = Number(value)
    const kind = step === "1" ? "a whole number" : "a number"
    const good = value !== "" && number >= min && number <= max
    if (good && (step !== "1" || Number.isInteger(number))) return ""
    return `${labelOf(field)} must be ${kind} from ${plain(Number(min))} to ${plain(Number(max))}`
  }
  function valueOf(field) {
    if (field.type === "checkbox") return field.checked
    if (field.type === "number" || /^\d+$/.test(field.value)) return Number(field.value)
    return field.value
  }
  /* The values of a form, or null and words beside each field that is wrong. */
  function read(form) {
    const values = {}
    let good = true
    for (const field of controls(form)) {
      const said = wrong(field)
      if (document.getElementById(`${field.id}-error`)) show(field, said)
      good &&= !said
      values[field.name] = valueOf(field)
    }
    return good ? values : null
  }
  function put(field, value) {
    if (field.type === "checkbox") field.checked = value === true || value === "true"
    else field.value = value
  }

  /* The model */

  const fieldOf = (name) => forms.model.elements[name]
  function fill(shape) {
    for (const name in SHAPE) put(fieldOf(name), shape[name])
  }
  function readModel() {
    const values = read(forms.model)
    if (!values) return null
    const { model, ...shape } = values
    const found = calculators.problem(shape)
    if (found) {
      const field = fieldOf(found[0])
      show(field, `${labelOf(field)} ${found[1]}`)
      return null
    }
    const known = models.find((m) => m.name === model)
    const same = known && Object.keys(SHAPE).every((name) => known.shape[name] === shape[name])
    const name = same ? model : OWN
    fieldOf("model").value = name
    return { name: name === OWN ? "This model" : name, shape }
  }

  /* Plots: lines and bars in the page's colours; each has its table. */

  const TALL = 300
  function frame(width, label, inner, tall = TALL) {
    return `<svg viewBox="0 0 ${width} ${tall}" width="${width}" height="${tall}" role="img"
      aria-label="${escaped(label)}">${inner}</svg>`
  }
  const log = Math.log10
  function axis(low, high, from, to) {
    return (value) => from + ((log(value) - log(low)) / (log(high) - log(low))) * (to - from)
  }
  function decades(low, high, most) {
    const all = []
    for (let e = Math.ceil(log(low) - 1e-9); e <= log(high) + 1e-9; e++) all.push(10 ** e)
    const step = Math.ceil(all.length / most)
    return all.filter((_, at) => at % step === 0)
  }
  const text = (x, y, said, anchor = "middle", kind = "") =>
    `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" text-anchor="${anchor}" class="${kind}">${escaped(said)}</text>`
  const rule = (x1, y1, x2, y2, kind) =>
    `<line x1="${x1.toFixed(1)}" y1="${y1.toFixed(1)}" x2="${x2.toFixed(1)}" y2="${y2.toFixed(1)}" class="${kind}"/>`
  const legend = (names) =>
    `<ul class="calc-legend">${names.map((name, at) =>
      `<li><svg width="26" height="10" aria-hidden="true"><line x1="0" y1="5" x2="26" y2="5"
        class="calc-line calc-${at}"/></svg>${escaped(name)}</li>`).join("")}</ul>`
  const patches = (names) =>
    `<ul class="calc-legend">${names.map((name, at) =>
      `<li><svg width="12" height="12" aria-hidden="true"><rect width="12" height="12"
        class="calc-bar calc-${at}"/></svg>${escaped(name)}</li>`).join("")}</ul>`

  function lines(width, label, xs, series, { x: nameX, y: nameY, sayX, sayY, mark }) {
    const values = series.flatMap((s) => s.ys).filter((y) => y > 0)
    const [left, right, top, bottom] = [68, width - 20, 12, TALL - 40]
    const x = axis(xs[0], xs.at(-1), left, right)
    const low = Math.min(...values), high = Math.max(...values)
    const y = axis(low / 1.3, high * 1.3, bottom, top)
    const room = Math.max(2, Math.floor((right - left) / 70))
    const step = Math.ceil(xs.length / room)
    const ticks = xs.filter((_, at) => at % step === 0)
    const inner = [
      ...decades(low / 1.3, high * 1.3, 6).map((v) =>
        rule(left, y(v), right, y(v), "calc-grid") + text(left - 6, y(v) + 4, sayY(v), "end")),
      ...ticks.map((v) => rule(x(v), bottom, x(v), bottom + 4, "calc-axis") + text(x(v), bottom + 17, sayX(v))),
      rule(left, bottom, right, bottom, "calc-axis"),
      text((left + right) / 2, TALL - 4, `${nameX}; upwards ${nameY}`),
      mark >= xs[0] && mark <= xs.at(-1) ? rule(x(mark), top, x(mark), bottom, "calc-mark") : "",
      ...series.map((s, at) => {
        const points = xs.map((v, i) => `${x(v).toFixed(1)},${y(s.ys[i]).toFixed(1)}`).join(" ")
        return `<polyline points="${points}" class="calc-line calc-${at}"/>`
      }).reverse(), // the model itself on top
    ]
    return frame(width, label, inner.join("")) + legend(series.map((s) => s.name))
  }

  function bars(width, label, names, rows, say) {
    const [left, right, top] = [width < 480 ? 70 : 96, width - 12, 14]
    const most = Math.max(...rows.map((row) => row.parts.reduce((a, b) => a + b, 0)))
    const tall = 62
    const inner = rows.map((row, at) => {
      let from = left
      const y = top + at * tall
      const cells = row.parts.map((part, kind) => {
        const wide = most ? (part / most) * (right - left) : 0
        const cell = wide > 0
          ? `<rect x="${from.toFixed(1)}" y="${(y + 14).toFixed(1)}" width="${wide.toFixed(1)}"
              height="${(tall - 26).toFixed(1)}" class="calc-bar calc-${kind}"/>` : ""
        from += wide
        return cell
      })
      const total = row.parts.reduce((a, b) => a + b, 0)
      return text(left - 6, y + tall / 2 + 6, row.name, "end", row.chosen ? "calc-chosen" : "") +
        text(left, y + 10, say(total), "start", row.chosen ? "calc-chosen" : "") + cells.join("")
    })
    const end = top + tall * rows.length
    inner.push(rule(left, top + 14, left, end - 12, "calc-axis"))
    return frame(width, label, inner.join(""), end) + patches(names)
  }

  /* The calculators: each gives a headline, a table, a plot and the plot's numbers. */

  const ATTENTIONS = {
    MHA: "multi-head", GQA: "a key-value head for eight", MQA: "multi-query",
    MLA: "a latent of 512 + 64", window: "windows of 4,096",
  }
  const TOO_LARGE = "is too large: a result above 9 PB can't be counted to the byte"

  function cache({ name, shape }, about) {
    const found = calculators.kvCache(shape, about)
    if (!Number.isSafeInteger(found.bytes)) return { wrong: ["context", TOO_LARGE] }
    const others = Object.keys(ATTENTIONS).map((kind) => {
      const shapeOfKind = calculators.withAttention(shape, kind)
      return { name: ATTENTIONS[kind], of: (context) => calculators.kvCache(shapeOfKind, { ...about, context }).bytes }
    })
    const series = [{ name, of: (context) => calculators.kvCache(shape, { ...about, context }).bytes }, ...others]
    const end = Math.max(131072, 2 ** Math.ceil(Math.log2(about.context)))
    const xs = []
    for (let x = 1024; x <= end; x *= 2) xs.push(x)
    for (const s of series) s.ys = xs.map(s.of)
    const weights = calculators.parameters(shape).total * 2
    const row = (said, n) => [said, decimal(n), binary(n), percent(n / found.bytes)]
    return {
      headline: `${name}: the cache of ${many(about.batch, "text", "texts")} of ${plain(about.context)} tokens takes ${bytes(found.bytes)}. The next token of each adds ${bytes(found["one more token"])}.`,
      table: tableOf(["", "decimal", "binary", "of the cache"], [
        row("Cache", found.bytes),
        row("Layers that see everything", found["full layers"]),
        row("Layers with a window", found["windowed layers"]),
        ...others.map((s) => row(`With ${s.name}`, s.of(about.context))),
        row("Weights in 16 bits, for comparison", weights),
      ]),
      plot: (width) => lines(width, `Bytes of the cache against context, for ${name} and for the same model with other kinds of attention`, xs, series, {
        x: "context, tokens", y: "bytes of the cache", sayX: (v) => `${v / 1024}K`, sayY: decimal, mark: about.context,
      }),
      twin: tableOf(["Tokens", ...series.map((s) => s.name)],
        xs.map((x, at) => [plain(x), ...series.map((s) => decimal(s.ys[at]))])),
    }
  }

  function parametersOf({ name, shape }) {
    const found = calculators.parameters(shape)
    if (!Number.isSafeInteger(found.total)) return { wrong: ["num_layers", TOO_LARGE] }
    const { total, active, ...parts } = found
    const used = { ...parts, experts: parts.experts - (total - active) }
    const names = Object.keys(parts).filter((part) => parts[part])
    const rows = names.map((part) => [part, plain(parts[part]), percent(parts[part] / total), plain(used[part])])
    const sizes = [32, 16, 8, 4].map((bits) => [`Weights in ${bits} bits`, bytes((total * bits) / 8), "", bytes((active * bits) / 8)])
    const idle = active < total ? ` A token uses ${count(active)} of them, ${percent(active / total)}.` : ""
    return {
      headline: `${name}: ${count(total)} parameters, ${plain(total)} to be exact.${idle}`,
      table: tableOf(["Part", "parameters", "of all", "a token uses"],
        [...rows, ["All", plain(total), "100%", plain(active)], ...sizes]),
      plot: (width) => bars(width, `Parameters of ${name} by part: all, and those that a token uses`, names, [
        { name: "all", parts: names.map((part) => parts[part]) },
        { name: "a token", parts: names.map((part) => used[part]) },
      ], (n) => count(n)),
      twin: tableOf(["Part", "all", "a token uses"], names.map((part) => [part, plain(parts[part]), plain(used[part])])),
    }
  }

  const HELD = ["weights", "float32 copy", "gradients", "optimizer", "activations", "logits"]
  function training({ name, shape }, about) {
    const methods = ["full", "LoRA", "QLoRA"].map((method) => ({
      method, ...calculators.trainingMemory(shape, { ...about, method }),
    }))
    const found = methods.find((m) => m.method === about.method)
    if (methods.some((m) => !Number.isSafeInteger(m.total))) return { wrong: ["context", TOO_LARGE] }
    const names = HELD.filter((part) => methods.some((m) => m[part]))
    const trained = `${count(found.trained)} trained parameters`
    const method = about.method === "full" ? "full training" : `${about.method} of rank ${plain(about.rank)}`
    return {
      headline: `${name}, ${method}: a step of ${many(about.batch, "text", "texts")} of ${plain(about.context)} tokens holds ${bytes(found.total)}, with ${trained}.`,
      table: tableOf(["", "decimal", "binary", "of all"], [
        ...HELD.map((part) => [part, decimal(found[part]), binary(found[part]), percent(found[part] / found.total)]),
        ["all", decimal(found.total), binary(found.total), "100%"],
      ]),
      plot: (width) => bars(width, `Memory of a training step of ${name} by part, for full training, LoRA and QLoRA`, names,
        methods.map((m) => ({ name: m.method, parts: names.map((part) => m[part]), chosen: m === found })), decimal),
      twin: tableOf(["Part", ...methods.map((m) => m.method)],
        [...names, "total"].map((part) => [part, ...methods.map((m) => decimal(m[part]))])),
    }
  }

  function speed({ name, shape }, given) {
    const { chip, peak, bandwidth, memory, prompt, answer, ...rest } = given
    const about = { ...rest, peak: peak * 1e12, bandwidth: bandwidth * 1e9 }
    const one = (fresh, past, batch = about.batch) => calculators.roofline(shape, { ...about, fresh, past, batch })
    const passes = [
      [`Prompt of ${plain(prompt)} tokens`, one(prompt, 0)],
      ["First token after it", one(1, prompt)],
      ["Last token of the answer", one(1, prompt + answer - 1)],
    ]
    const total = calculators.answerSeconds(shape, { ...about, prompt, answer })
    const rate = answer > 1 ? (answer - 1) / total.later : 1 / passes[1][1].seconds
    const weights = (calculators.parameters(shape).total * about.weight_bits) / 8
    const kept = calculators.kvCache(shape, { context: prompt + answer, batch: about.batch, bits: about.cache_bits }).bytes
    const room = about.chips * memory * 1e9
    const fits = weights + kept <= room
    const batches = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    const steps = batches.map((batch) => ({ batch, ...one(1, prompt, batch) }))
    const limit = (pass) => (pass.computing > pass.moving ? "computing" : "memory")
    const points = [
      { name: "prompt", ...passes[0][1], kind: "prompt" },
      ...steps.map((step) => ({ name: `${step.batch}`, ...step, kind: "step" })),
    ]
    return {
      headline: `${name} on ${many(about.chips, "chip", "chips")} (${chip}), at best: first token after ${seconds(total.first)}, then ${digits(rate)} tokens a second for each text, ${digits(rate * about.batch)} for all. Weights and cache take ${bytes(weights + kept)}: ${fits ? "they fit" : "they do NOT fit"} into ${bytes(room)}.`,
      table: tableOf(["Pass", "operations", "bytes moved", "computing", "moving", "limit"],
        passes.map(([said, p]) => [said, flops(p.operations), decimal(p.bytes), seconds(p.computing), seconds(p.moving), limit(p)])),
      plot: (width) => roof(width, `Operations a second against operations a byte on ${chip}: the roof, the prompt's pass and single steps of decode at batches from 1 to 256`, about, points),
      twin: tableOf(["Pass", "operations a byte", "reached, of the peak", "time", "tokens a second"], [
        ["Prompt", digits(points[0].intensity), percent(reached(points[0], about)), seconds(points[0].seconds), digits((about.batch * prompt) / points[0].seconds)],
        ...steps.map((p) => [`Decode, batch ${p.batch}`, digits(p.intensity), percent(reached(p, about)), seconds(p.seconds), digits(p.batch / p.seconds)]),
      ]),
    }
  }
  const reached = (pass, about) => pass.operations / pass.seconds / (about.chips * about.peak)

  function roof(width, label, about, points) {
    const [left, right, top, bottom] = [68, width - 14, 14, TALL - 40]
    const ridge = about.peak / about.bandwidth
    const low = Math.min(0.5, ...points.map((p) => p.intensity)) / 1.5
    const high = Math.max(4 * ridge, ...points.map((p) => p.intensity)) * 1.5
    const x = axis(low, high, left, right)
    const peak = about.peak * about.chips, y = axis((low / ridge) * peak, peak * 1.6, bottom, top)
    const shown = []
    const inner = [
      ...decades((low / ridge) * peak, peak * 1.6, 6).map((v) =>
        rule(left, y(v), right, y(v), "calc-grid") + text(left - 6, y(v) + 4, `${flops(v)}/s`.replace("FLOP/s", ""), "end")),
      ...decades(low, high, Math.max(2, Math.floor((right - left) / 60))).map((v) =>
        rule(x(v), bottom, x(v), bottom + 4, "calc-axis") + text(x(v), bottom + 17, plain(v))),
      rule(left, bottom, right, bottom, "calc-axis"),
      text((left + right) / 2, TALL - 4, "operations a byte; upwards operations a second"),
      `<polyline points="${left},${y((low / ridge) * peak).toFixed(1)} ${x(ridge).toFixed(1)},${y(peak).toFixed(1)} ${right},${y(peak).toFixed(1)}" class="calc-line calc-0"/>`,
      ...points.map((p) => {
        const at = [x(p.intensity), y(p.operations / p.seconds)]
        const free = shown.every(([a, b]) => Math.abs(a - at[0]) > 22 || Math.abs(b - at[1]) > 14)
        if (free) shown.push(at)
        const dot = p.kind === "prompt"
          ? `<rect x="${(at[0] - 5).toFixed(1)}" y="${(at[1] - 5).toFixed(1)}" width="10" height="10" class="calc-dot calc-1"/>`
          : `<circle cx="${at[0].toFixed(1)}" cy="${at[1].toFixed(1)}" r="4" class="calc-dot calc-2"/>`
        const side = at[0] > right - 50 ? "end" : "start"
        return dot + (free ? text(at[0] + (side === "end" ? 0 : 4), at[1] + 18, p.name, side) : "")
      }),
    ]
    const key = `<ul class="calc-legend"><li><svg width="26" height="10" aria-hidden="true"><line x1="0" y1="5" x2="26" y2="5" class="calc-line calc-0"/></svg>roof</li>
      <li><svg width="12" height="12" aria-hidden="true"><rect x="1" y="1" width="10" height="10" class="calc-dot calc-1"/></svg>prompt</li>
      <li><svg width="12" height="12" aria-hidden="true"><circle cx="6" cy="6" r="4" class="calc-dot calc-2"/></svg>a step of decode, by batch</li></ul>`
    return frame(width, label, inner.join("")) + key
  }

  const CALCULATORS = { cache, parameters: parametersOf, training, speed }

  /* All together */

  const plots = new Map() // place: how to draw at a width
  const widths = new WeakMap()
  const widthOf = (place) => Math.max(260, Math.min(720, Math.floor(place.clientWidth)))
  function draw(place) {
    const width = widthOf(place)
    widths.set(place, width)
    place.innerHTML = plots.get(place)(width)
  }
  const resized = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (plots.has(target) && widthOf(target) !== widths.get(target)) draw(target)
    }
  })
  for (const box of boxes) resized.observe(box.querySelector("[data-plot]"))

  let speaking
  function update(speak = true) {
    chooseChip()
    const model = readModel()
    for (const box of boxes) {
      const form = forms[box.dataset.calculator]
      const part = (name) => box.querySelector(`[data-${name}]`)
      const values = form ? read(form) : {}
      let found = model && values && CALCULATORS[box.dataset.calculator](model, values)
      if (found?.wrong) {
        const [name, said] = found.wrong
        const field = form?.elements[name] || fieldOf(name)
        show(field, `${labelOf(field)} ${said}`)
        found = null
      }
      box.classList.toggle("calc-stale", !found)
      if (!found) {
        part("headline").textContent = model
          ? "Not calculated: a field here needs another value."
          : "Not calculated: the sizes of the model don't fit together, see above."
        continue
      }
      part("headline").textContent = found.headline
      part("table").innerHTML = found.table
      part("twin").innerHTML = found.twin
      plots.set(part("plot"), found.plot)
      draw(part("plot"))
    }
    clearTimeout(speaking)
    if (speak) speaking = setTimeout(announce, 700) // when the typing is over
  }
  let last
  function announce() {
    const box = document.querySelector(`[data-calculator="${last}"]`) || boxes[0]
    const status = box.querySelector("[data-status]")
    status.textContent = box.querySelector("[data-headline]").textContent
  }

  function chooseChip() {
    const { chip, peak, bandwidth, memory } = forms.speed.elements
    const own = chip.value === OWN_CHIP
    const known = chips.find((c) => c.name === chip.value)
    for (const field of [peak, bandwidth, memory]) field.disabled = !own
    if (known) {
      peak.value = known.peak / 1e12
      bandwidth.value = known.bandwidth / 1e9
      memory.value = known.memory / 1e9
    }
  }

  /* The address keeps what differs from the page as it comes. */

  const START = "#?"
  const keyOf = (form, field) => (form === forms.model ? field.name : `${form.dataset.form}.${field.name}`)
  const stateOf = (field) => (field.type === "checkbox" ? String(field.checked) : field.value)
  const everyField = () =>
    Object.values(forms).flatMap((form) => controls(form).map((field) => [keyOf(form, field), field]))
  function state() {
    const parts = new URLSearchParams()
    const chosen = fieldOf("model").value
    for (const [key, field] of everyField()) {
      const size = field.form === forms.model && field !== fieldOf("model")
      if (field.disabled || (size && chosen !== OWN)) continue
      if (stateOf(field) !== (size ? "" : defaults.get(key))) parts.set(key, stateOf(field))
    }
    return parts.toString()
  }
  function write() {
    const said = state()
    const bare = location.href.replace(/#.*/, "")
    history.replaceState(null, "", said ? `${bare}${START}${said}` : bare)
  }
  function restore() {
    for (const [key, field] of everyField()) {
      if (defaults.has(key)) put(field, defaults.get(key))
    }
    const given = location.hash.startsWith(START)
      ? new URLSearchParams(location.hash.slice(START.length)) : new URLSearchParams()
    const wanted = given.get("model") ?? defaults.get("model")
    const known = models.find((m) => m.name === wanted)
    fieldOf("model").value = known ? wanted : OWN
    fill(known ? known.shape : { ...SHAPE, ...models[0]?.shape })
    for (const [key, field] of everyField()) {
      if (key !== "model" && given.has(key)) put(field, given.get(key))
    }
    for (const [key, field] of everyField()) {
      // A link of another version may name a choice that isn't there.
      if (field.options && field.selectedIndex < 0) field.value = defaults.get(key)
    }
    update(false)
  }

  const defaults = new Map()
  defaults.set("model", fieldOf("model").dataset.default)
  for (const [key, field] of everyField()) {
    if (field.form === forms.model) continue
    const chosen = field.options && [...field.options].find((o) => o.defaultSelected)
    const first = field.options && (chosen || field.options[0]).value
    defaults.set(key, field.options ? first : field.type === "checkbox" ? String(field.defaultChecked) : field.defaultValue)
  }

  const said = forms.model.querySelector("[data-said]")
  function tell(words) {
    said.textContent = words
    setTimeout(() => (said.textContent = ""), 6000)
  }
  const actions = {
    read() {
      const area = document.getElementById("calc-config")
      let shape
      try {
        shape = calculators.shapeOf(JSON.parse(area.value))
      } catch (error) {
        show(area, error instanceof SyntaxError ? "This isn't JSON: take the whole file, braces included" : error.message)
        return
      }
      show(area, "")
      fieldOf("model").value = OWN
      fill(shape)
      changed()
      tell("Read: the sizes above are those of the file.")
    },
    async link() {
      write()
      try {
        await navigator.clipboard.writeText(location.href)
        tell("Copied.")
      } catch {
        tell("Could not copy: the address bar holds the link.")
      }
    },
    reset() {
      history.replaceState(null, "", location.href.replace(/#.*/, ""))
      document.getElementById("calc-config").value = ""
      restore()
      tell("As it was at first.")
    },
  }
  function changed() {
    update()
    write()
  }
  for (const form of Object.values(forms)) {
    form.addEventListener("submit", (event) => event.preventDefault())
    form.addEventListener("click", ({ target }) => actions[target.dataset.do]?.())
    form.addEventListener("input", ({ target }) => {
      if (!target.name) return
      last = form === forms.model ? boxes[0].dataset.calculator : form.dataset.form
      if (target === fieldOf("model")) {
        const known = models.find((m) => m.name === target.value)
        if (known) fill(known.shape)
      }
      changed()
    })
  }
  addEventListener("hashchange", () => location.hash.startsWith(START) && restore())
  restore()
})()
