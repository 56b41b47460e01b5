/* Joins the theme's search worker (theme/search.py): lunr finds the sections, this ranks them.

   lunr adds up all words that begin with what was typed, so the rarest of them, mostly names in
   code, decide the order. Here the best one counts. It also keeps every section of every page,
   with marks in its text, though ten pages are shown. */
{
  const EXACT_BELOW = 3 // letters: what is shorter means itself, not every word that begins so
  const ENDING = /(?<=\w{4})(?:ing|ed|es|s)$/
  const NAME = 16 // what a page is known by, against a title and, at most, 1 for text
  const TITLE = { page: 12, section: 4 }
  const ELSEWHERE = 0.5 // of what stands in other sections of the page
  const PAGES = 12 // kept of all that are found
  const SECTIONS = 4 // and of each page

  const boosts = new Map() // section: the page's boost
  const names = new Map() // section: names, each as its words

  /* Single letters and digits, of which code is full, tell nothing. */
  const tellsSomething = (token) => (token.toString().length > 1 ? token : null)
  lunr.Pipeline.registerFunction(tellsSomething, "tellsSomething")

  const add = lunr.Builder.prototype.add
  lunr.Builder.prototype.add = function (section, ...rest) {
    if (!boosts.size) this.pipeline.add(tellsSomething)
    boosts.set(section.location, section.boost ?? 1)
    const known = (section.names ?? []).map(wordsOf).filter((name) => name.length)
    names.set(section.location, known)
    add.call(this, section, ...rest)
  }

  /* lunr knows the nodes of its word graph by their edges, written without a gap. With digits in
     words, 1 to node 23 and 12 to node 3 were the same, and searches failed on words not there. */
  lunr.TokenSet.prototype.toString = function () {
    if (this._str) return this._str
    const edges = Object.keys(this.edges).sort().map((label) => `${label}${this.edges[label].id}`)
    return [this.final ? 1 : 0, ...edges].join(" ")
  }

  lunr.Index.prototype.search = function (text) {
    let words = []
    const found = this.query((query) => {
      new lunr.QueryParser(text, query).parse()
      const typed = query.clauses.filter((clause) => clause.term.endsWith("*"))
      for (const clause of typed) clause.word = clause.term.slice(0, -1)
      const telling = typed.filter(({ word }) => word.length > 1 && lunr.stopWordFilter(word))
      if (!telling.length) return
      for (const clause of telling) clause.term = rootOf(clause.word) + (isPrefix(clause.word) ? "*" : "")
      query.clauses = query.clauses.filter((clause) => !clause.word || telling.includes(clause))
      words = [...new Set(telling.map(({ word }) => word))]
    })
    return words.length ? best(found, words) : found
  }

  const pageOf = (location) => location.split("#")[0]
  const isPrefix = (word) => word.length >= EXACT_BELOW
  const rootOf = (word) => (isPrefix(word) ? word.replace(ENDING, "") : word)
  const wordsOf = (text) =>
    text.toLowerCase().split(lunr.tokenizer.separator).filter((word) => word.length > 1)

  /* From 0, another word, to 1, the same. */
  function closeness(word, term) {
    if (term === word) return 1
    const root = rootOf(word)
    if (!isPrefix(word) || !term.startsWith(root)) return 0
    return root === rootOf(term) ? 0.9 : (0.5 * root.length) / term.length
  }

  /* The best sections of the best pages, with their scores. */
  function best(found, words) {
    const all = new Set([...boosts.keys()].map(pageOf)).size
    const pages = new Map()
    const sections = found.map((result) => {
      const page = pageOf(result.ref)
      const met = meetings(result, words)
      const known = pages.get(page) ?? met
      pages.set(page, known.map((weight, at) => Math.max(weight, met[at])))
      return { result, page, met }
    })
    const rarity = words.map((_, at) => {
      const having = [...pages.values()].filter((met) => met[at] > 0).length
      return Math.log(1 + all / (having + 0.5))
    })
    const sum = (met) => met.reduce((total, weight, at) => total + weight * rarity[at], 0)
    for (const { result, page, met } of sections) {
      const whole = pages.get(page)
      const share = whole.filter((weight) => weight > 0).length / words.length
      const name = NAME * named(result.ref, words, rarity)
      const score = sum(met) + ELSEWHERE * sum(whole) + name
      result.score = score * share * boosts.get(result.ref)
    }
    sections.sort((a, b) => b.result.score - a.result.score)
    const kept = new Map()
    return sections.filter(({ page }) => {
      const count = kept.get(page) ?? 0
      if (count === SECTIONS || (!count && kept.size === PAGES)) return false
      return kept.set(page, count + 1)
    }).map(({ result }) => result)
  }

  /* How well the section meets each word. The theme calls a word missing unless a term that was
     found begins with it, so found terms are renamed after the word that they stand for. */
  function meetings({ ref, matchData }, words) {
    const title = ref.includes("#") ? TITLE.section : TITLE.page
    const met = words.map(() => 0)
    const terms = {}
    for (const [term, fields] of Object.entries(matchData.metadata)) {
      words.forEach((word, at) => {
        const close = closeness(word, term)
        if (!close) return
        const times = fields.text?.position.length ?? 0
        const weight = times / (times + 2) + (fields.title ? title : 0) + (fields.tags ? 0.5 : 0)
        met[at] = Math.max(met[at], close * Math.max(weight, 0.1))
        terms[term.startsWith(word) ? term : `${word} ${term}`] = fields
      })
    }
    matchData.metadata = terms
    return met
  }

  /* How well one of the section's names is met: all of it, by all words, or in part. */
  function named(section, words, rarity) {
    const values = names.get(section).map((name) => {
      const close = words.map((word) => Math.max(0, ...name.map((part) => closeness(word, part))))
      const parts = name.filter((part) => words.some((word) => closeness(word, part))).length
      const share = (parts / name.length) ** 2
      return share * close.reduce((total, value, at) => total + value * rarity[at], 0)
    })
    return Math.max(0, ...values)
  }
}
