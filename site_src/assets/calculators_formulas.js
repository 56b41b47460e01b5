/* What snippets/common/model_shape.py and snippets/reference/ compute, in the same order of sums and
   products: whole numbers below 2^53 and floating point come out the same to the bit. Sizes have
   Python's names. Tested against it in tests/theme/test_calculators.py. */
const calculators = (() => {
  const SHAPE = {
    vocab_size: 0, hidden_size: 0, num_layers: 0, num_heads: 0, num_kv_heads: 0, head_dim: 0,
    intermediate_size: 0, gated: true, tied: false, positions: 0, kv_lora_rank: 0,
    q_lora_rank: 0, qk_nope_head_dim: 0, qk_rope_head_dim: 0, v_head_dim: 0, window: 0,
    windowed_layers: 0, num_experts: 0, experts_per_token: 0, moe_intermediate_size: 0,
    shared_experts: 0, expert_layers: 0, layer_norms: 2, norm_bias: false, head_norms: false,
    qkv_bias: false, o_bias: false, mlp_bias: false,
  }
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0)

  /* snippets/common/model_shape.py */

  function problem(s) {
    for (const name in SHAPE) {
      if (typeof SHAPE[name] === "number" && s[name] < 0) return [name, "must not be below 0"]
    }
    for (const name of ["vocab_size", "hidden_size", "num_layers", "num_heads"]) {
      if (s[name] < 1) return [name, "must be at least 1"]
    }
    if (s.kv_lora_rank) {
      for (const name of ["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]) {
        if (s[name] < 1) return [name, "must be at least 1 in latent attention"]
      }
    } else if (s.num_kv_heads < 1 || s.num_heads % s.num_kv_heads) {
      return ["num_kv_heads", "must divide the number of query heads"]
    } else if (s.head_dim < 1) {
      return ["head_dim", "must be at least 1"]
    }
    if (s.windowed_layers > s.num_layers) {
      return ["windowed_layers", "must not be more than there are layers"]
    }
    if (s.windowed_layers && !s.window) {
      return ["window", "must be at least 1 where layers have a window"]
    }
    if (s.expert_layers > s.num_layers) {
      return ["expert_layers", "must not be more than there are layers"]
    }
    if (s.expert_layers) {
      if (!(1 <= s.experts_per_token && s.experts_per_token <= s.num_experts)) {
        return ["experts_per_token", "must be from 1 to the number of experts"]
      }
      if (!s.moe_intermediate_size) {
        return ["moe_intermediate_size", "must be at least 1 where layers have experts"]
      }
      if (s.mlp_bias) return ["mlp_bias", "is not known of models with experts"]
    }
    if (s.expert_layers < s.num_layers && !s.intermediate_size) {
      return ["intermediate_size", "must be at least 1 where layers have no experts"]
    }
    return null
  }

  function needed(config, key) {
    if (config[key] === undefined) throw new Error(`${key}: is missing`)
    return config[key]
  }
  const layersWhere = (count, wanted) => sum(Array.from({ length: count }, (_, i) => +wanted(i)))

  function gpt2(c) {
    const d = needed(c, "n_embd"), h = needed(c, "n_head")
    return {
      vocab_size: needed(c, "vocab_size"), hidden_size: d, num_layers: needed(c, "n_layer"),
      num_heads: h, num_kv_heads: h, head_dim: Math.floor(d / h),
      intermediate_size: c.n_inner || 4 * d, gated: false, tied: c.tie_word_embeddings ?? true,
      positions: needed(c, "n_positions"),
      norm_bias: true, qkv_bias: true, o_bias: true, mlp_bias: true,
    }
  }
  function llama(c) {
    const d = needed(c, "hidden_size"), h = needed(c, "num_attention_heads")
    const bias = c.attention_bias || false
    return {
      vocab_size: needed(c, "vocab_size"), hidden_size: d,
      num_layers: needed(c, "num_hidden_layers"), num_heads: h,
      num_kv_heads: c.num_key_value_heads || h, head_dim: c.head_dim || Math.floor(d / h),
      intermediate_size: needed(c, "intermediate_size"), tied: c.tie_word_embeddings || false,
      qkv_bias: bias, o_bias: bias, mlp_bias: c.mlp_bias || false,
    }
  }
  function mistral(c) {
    const window = c.sliding_window || 0
    const limited = window ? needed(c, "num_hidden_layers") : 0
    return { ...llama(c), window, windowed_layers: limited }
  }
  const mixtral = (c) => ({
    ...mistral(c),
    num_experts: needed(c, "num_local_experts"),
    experts_per_token: needed(c, "num_experts_per_tok"),
    moe_intermediate_size: needed(c, "intermediate_size"),
    expert_layers: needed(c, "num_hidden_layers"),
  })
  function qwenWindow(c) {
    const window = c.sliding_window || 0
    if (!window || !c.use_sliding_window) return {}
    const limited = c.layer_types
      ? c.layer_types.filter((kind) => kind === "sliding_attention").length
      : Math.max(0, needed(c, "num_hidden_layers") - needed(c, "max_window_layers"))
    return { window, windowed_layers: limited }
  }
  const qwen2 = (c) => ({ ...llama(c), ...qwenWindow(c), qkv_bias: true, o_bias: false })
  const qwen3 = (c) => ({
    ...llama(c), ...qwenWindow(c), head_dim: c.head_dim || 128, head_norms: true,
  })
  function qwen3Moe(c) {
    const skipped = c.mlp_only_layers || [], step = c.decoder_sparse_step || 1
    const d = needed(c, "hidden_size"), h = needed(c, "num_attention_heads")
    return {
      ...qwen3(c),
      head_dim: c.head_dim || Math.floor(d / h),
      num_experts: c.num_experts || needed(c, "num_local_experts"),
      experts_per_token: needed(c, "num_experts_per_tok"),
      moe_intermediate_size: needed(c, "moe_intermediate_size"),
      expert_layers: layersWhere(
        needed(c, "num_hidden_layers"), (i) => !skipped.includes(i) && (i + 1) % step === 0,
      ),
    }
  }
  function gemma3(given) {
    const c = {
      vocab_size: 262208, num_attention_heads: 8, num_key_value_heads: 4, head_dim: 256,
      tie_word_embeddings: true, sliding_window: 4096, ...given,
    }
    const layers = needed(c, "num_hidden_layers"), window = c.sliding_window || 0
    const limited = c.layer_types
      ? c.layer_types.filter((kind) => kind === "sliding_attention").length
      : layers - Math.floor(layers / (c.sliding_window_pattern || 6))
    return {
      ...llama(c), window, windowed_layers: window ? limited : 0, layer_norms: 4,
      head_norms: true,
    }
  }
  function deepseek(c) {
    const dense = c.first_k_dense_replace || 0, step = c.moe_layer_freq || 1
    const experts = c.n_routed_experts || 0
    return {
      ...llama(c),
      kv_lora_rank: needed(c, "kv_lora_rank"),
      q_lora_rank: c.q_lora_rank || 0,
      qk_nope_head_dim: needed(c, "qk_nope_head_dim"),
      qk_rope_head_dim: needed(c, "qk_rope_head_dim"),
      v_head_dim: needed(c, "v_head_dim"),
      num_experts: experts,
      experts_per_token: c.num_experts_per_tok || 0,
      moe_intermediate_size: c.moe_intermediate_size || 0,
      shared_experts: c.n_shared_experts || 0,
      expert_layers: layersWhere(
        needed(c, "num_hidden_layers"), (i) => experts && i >= dense && i % step === 0,
      ),
    }
  }
  const READERS = {
    gpt2, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe: qwen3Moe, gemma3,
    gemma3_text: gemma3, deepseek_v2: deepseek, deepseek_v3: deepseek,
  }

  function shapeOf(given) {
    const kind = given.model_type, config = { ...given, ...given.text_config }
    if (!Object.hasOwn(READERS, kind)) {
      const known = Object.keys(READERS).join(", ")
      throw new Error(`model_type: ${kind} isn't known, only ${known}`)
    }
    const shape = { ...SHAPE, ...READERS[kind](config) }
    const found = problem(shape)
    if (found) throw new Error(found.join(": "))
    return shape
  }

  /* snippets/reference/calculators.py */

  function mlp(s, width) {
    const into = [width, s.hidden_size]
    return [...(s.gated ? [into, into] : [into]), [s.hidden_size, width]]
  }

  function matrices(s) {
    const d = s.hidden_size, h = s.num_heads, layers = s.num_layers
    const n = s.qk_nope_head_dim, p = s.qk_rope_head_dim, e = s.v_head_dim
    const c = s.kv_lora_rank, r = s.q_lora_rank
    const q = h * s.head_dim, kv = s.num_kv_heads * s.head_dim
    const queries = r ? [[r, d], [h * (n + p), r]] : [[h * (n + p), d]]
    const attention = c
      ? [...queries, [c + p, d], [h * (n + e), c], [d, h * e]]
      : [[q, d], [kv, d], [kv, d], [d, q]]
    const found = []
    const add = (part, sizes, count, used) => {
      for (const [outputs, inputs] of sizes) {
        found.push({ part, outputs, inputs, size: outputs * inputs, count, used })
      }
    }
    add("attention", attention, layers, layers)
    const sparse = s.expert_layers, dense = layers - sparse
    if (dense) add("MLP", mlp(s, s.intermediate_size), dense, dense)
    if (sparse) {
      const m = s.moe_intermediate_size
      add("experts", mlp(s, m), sparse * s.num_experts, sparse * s.experts_per_token)
      if (s.shared_experts) add("shared experts", mlp(s, s.shared_experts * m), sparse, sparse)
      add("routers", [[s.num_experts, d]], sparse, sparse)
    }
    return found
  }

  function vectors(s) {
    const norm = s.hidden_size * (s.norm_bias ? 2 : 1)
    let layer = s.layer_norms * norm
    if (s.kv_lora_rank) {
      layer += s.q_lora_rank + s.kv_lora_rank
      if (s.qkv_bias) layer += s.q_lora_rank + s.kv_lora_rank + s.qk_rope_head_dim
    } else {
      if (s.head_norms) layer += 2 * s.head_dim
      if (s.qkv_bias) layer += (s.num_heads + 2 * s.num_kv_heads) * s.head_dim
    }
    if (s.o_bias) layer += s.hidden_size
    if (s.mlp_bias) layer += s.intermediate_size * (s.gated ? 2 : 1) + s.hidden_size
    return s.num_layers * layer + norm
  }

  function parameters(s) {
    const table = s.vocab_size * s.hidden_size
    const parts = {
      embedding: table, positions: s.positions * s.hidden_size, attention: 0, MLP: 0,
      experts: 0, "shared experts": 0, routers: 0, "norms and biases": vectors(s),
      head: s.tied ? 0 : table,
    }
    let idle = 0
    for (const matrix of matrices(s)) {
      parts[matrix.part] += matrix.size * matrix.count
      idle += matrix.size * (matrix.count - matrix.used)
    }
    const total = sum(Object.values(parts))
    return { ...parts, total, active: total - idle }
  }

  const toBytes = (numbers, bits) => Math.ceil((numbers * bits) / 8)

  function kvCache(s, { context, batch, bits }) {
    const numbers = s.kv_lora_rank
      ? s.kv_lora_rank + s.qk_rope_head_dim
      : 2 * s.num_kv_heads * s.head_dim
    const limited = s.windowed_layers
    const full = batch * numbers * (s.num_layers - limited) * context
    const held = limited ? Math.min(context, s.window - 1) : 0
    const windowed = batch * numbers * limited * held
    let growing = s.num_layers - limited
    if (limited && context < s.window - 1) growing += limited
    return {
      bytes: toBytes(full + windowed, bits),
      "full layers": toBytes(full, bits),
      "windowed layers": toBytes(windowed, bits),
      "one more token": toBytes(batch * numbers * growing, bits),
    }
  }

  function withAttention(s, kind) {
    const h = s.num_heads, width = s.kv_lora_rank ? s.qk_nope_head_dim : s.head_dim
    if (kind === "MLA") {
      return {
        ...s, kv_lora_rank: 512, q_lora_rank: 0, qk_nope_head_dim: width, qk_rope_head_dim: 64,
        v_head_dim: width, window: 0, windowed_layers: 0,
      }
    }
    if (kind === "window") return { ...s, window: 4096, windowed_layers: s.num_layers }
    const groups = { MHA: h, GQA: h % 8 === 0 ? h / 8 : h, MQA: 1 }
    return {
      ...s, num_kv_heads: groups[kind], head_dim: width, kv_lora_rank: 0, window: 0,
      windowed_layers: 0,
    }
  }

  /* snippets/reference/training_memory.py */

  const PRECISIONS = { mixed: [2, 2, 4, 4], bfloat16: [2, 2, 0, 2], float32: [4, 4, 0, 4] }
  const STATES = { AdamW: 2, "SGD with momentum": 1, SGD: 0 }
  const TARGETS = {
    attention: ["attention"],
    "all matrices": ["attention", "MLP", "experts", "shared experts"],
  }
  const ADAPTER = 4

  function adapterParameters(s, { rank, targets }) {
    const adapted = matrices(s).filter((m) => TARGETS[targets].includes(m.part))
    return sum(adapted.map((m) => rank * (m.inputs + m.outputs) * m.count))
  }

  function nf4Bytes(size) {
    const scales = Math.ceil(size / 64)
    return Math.ceil(size / 2) + scales + 4 * Math.ceil(scales / 256) + 4
  }

  function frozenBytes(s, method, precision) {
    const weight = PRECISIONS[precision][0], total = parameters(s).total
    if (method === "LoRA") return weight * total
    const packed = matrices(s).filter((m) => m.part !== "routers")
    const outside = total - sum(packed.map((m) => m.size * m.count))
    return weight * outside + sum(packed.map((m) => nf4Bytes(m.size) * m.count))
  }

  function layerActivations(s, experts) {
    const d = s.hidden_size, h = s.num_heads
    let numbers = s.layer_norms * d + d
    if (s.kv_lora_rank) {
      const key = s.qk_nope_head_dim + s.qk_rope_head_dim
      numbers += 2 * s.q_lora_rank + 2 * s.kv_lora_rank
      numbers += 2 * h * key + 2 * h * s.v_head_dim
    } else {
      const q = h * s.head_dim, kv = s.num_kv_heads * s.head_dim
      numbers += 2 * q + 2 * kv
      if (s.head_norms) numbers += q + kv
    }
    numbers += d
    const inner = s.gated ? 4 : 2
    if (!experts) return numbers + inner * s.intermediate_size
    const m = s.moe_intermediate_size
    return numbers + s.experts_per_token * (2 * d + inner * m) + s.shared_experts * inner * m
  }

  function activationBytes(s, { context, batch, precision, kept, dropout }) {
    const width = PRECISIONS[precision][0], tokens = batch * context, d = s.hidden_size
    const masks = dropout ? 2 * d : 0
    const dense = s.num_layers - s.expert_layers
    const plain = width * layerActivations(s, false) + masks
    const sparse = width * layerActivations(s, true) + masks
    const scores = (dropout ? 2 * width + 1 : width) * s.num_heads * context
    let layers
    if (kept === "layer inputs") {
      const whole = Math.max(dense ? plain : 0, s.expert_layers ? sparse : 0)
      layers = tokens * (s.num_layers * width * d + whole)
    } else {
      layers = tokens * (dense * plain + s.expert_layers * sparse)
      if (kept === "everything") layers += tokens * s.num_layers * scores
    }
    return { layers, ends: tokens * (2 * width * d + 4 * s.vocab_size + (dropout ? d : 0)) }
  }

  function trainingMemory(s, about) {
    let [weight, gradient, master, state] = PRECISIONS[about.precision]
    let trained = parameters(s).total, weights = weight * trained
    if (about.method !== "full") {
      trained = adapterParameters(s, about)
      weights = frozenBytes(s, about.method, about.precision) + ADAPTER * trained
      gradient = ADAPTER
      master = 0
      state = ADAPTER
    }
    const kept = activationBytes(s, about)
    const found = {
      weights,
      "float32 copy": master * trained,
      gradients: gradient * trained,
      optimizer: STATES[about.optimizer] * state * trained,
      activations: kept.layers,
      logits: kept.ends,
    }
    return { ...found, total: sum(Object.values(found)), trained }
  }

  /* snippets/reference/roofline.py */

  function pairs(fresh, past, window) {
    if (!window) return fresh * past + (fresh * (fresh + 1)) / 2
    const short = Math.max(0, Math.min(past + fresh, window) - past)
    return short * past + (short * (short + 1)) / 2 + (fresh - short) * window
  }

  function pairFlops(s, absorbed) {
    if (!s.kv_lora_rank) return 4 * s.num_heads * s.head_dim
    const p = s.qk_rope_head_dim, c = s.kv_lora_rank
    return 2 * s.num_heads * (absorbed ? 2 * c + p : s.qk_nope_head_dim + p + s.v_head_dim)
  }

  function operations(s, { fresh, past, batch }) {
    const used = sum(matrices(s).map((m) => m.size * m.used))
    let seen = (s.num_layers - s.windowed_layers) * pairs(fresh, past, 0)
    seen += s.windowed_layers * pairs(fresh, past, s.window)
    const found = {
      matrices: 2 * used * (batch * fresh),
      attention: pairFlops(s, fresh === 1) * seen * batch,
      head: 2 * s.vocab_size * s.hidden_size * batch,
    }
    return { ...found, total: found.matrices + found.attention + found.head }
  }

  function power(base, exponent) {
    let result = 1
    while (exponent) {
      if (exponent % 2) result = result * base
      base = base * base
      exponent = Math.floor(exponent / 2)
    }
    return result
  }

  function expertsMet(s, tokens) {
    const e = s.num_experts
    return e * (1 - power(1 - s.experts_per_token / e, tokens))
  }

  function traffic(s, { fresh, past, batch, weight_bits, cache_bits }) {
    const counts = parameters(s)
    let numbers = counts.total - counts.experts
    if (!s.tied) numbers = numbers - counts.embedding + batch * fresh * s.hidden_size
    if (s.expert_layers) {
      const one = sum(mlp(s, s.moe_intermediate_size).map(([o, i]) => o * i))
      numbers = numbers + s.expert_layers * one * expertsMet(s, batch * fresh)
    }
    const weights = (numbers * weight_bits) / 8
    const read = kvCache(s, { context: past, batch, bits: cache_bits }).bytes
    const written = kvCache(s, { context: fresh, batch, bits: cache_bits }).bytes
    return { weights, cache: read + written, total: weights + (read + written) }
  }

  function roofline(s, about) {
    const flops = operations(s, about).total, moved = traffic(s, about).total
    const computing = flops / (about.chips * about.peak)
    const moving = moved / (about.chips * about.bandwidth)
    return {
      operations: flops, bytes: moved, computing, moving, seconds: Math.max(computing, moving),
      intensity: flops / moved, ridge: about.peak / about.bandwidth,
    }
  }

  function answerSeconds(s, { prompt, answer, ...about }) {
    const first = roofline(s, { ...about, fresh: prompt, past: 0 }).seconds
    let later = 0
    for (let number = 1; number < answer; number++) {
      later = later + roofline(s, { ...about, fresh: 1, past: prompt + number - 1 }).seconds
    }
    return { first, later, total: first + later }
  }

  return {
    SHAPE, problem, shapeOf, matrices, parameters, kvCache, withAttention, trainingMemory,
    activationBytes, operations, traffic, roofline, answerSeconds,
  }
})()
