"""The calculators' fields, with labels, units and ranges, and the forms made of them.

The script takes the ranges from the form: nothing of this stands there again.
"""

import html
from typing import NamedTuple


class Number(NamedTuple):
    name: str
    label: str
    default: int
    low: int
    high: int
    unit: str = ""


class Choice(NamedTuple):
    name: str
    label: str
    options: dict[str, str]  # value: what it is called; the first is chosen


class Switch(NamedTuple):
    name: str
    label: str
    default: bool = False


Field = Number | Choice | Switch
BITS = {"16": "16 (bfloat16)", "8": "8", "4": "4"}
# A field for each of ModelShape's.
SIZES: dict[str, list[Field]] = {
    "Model": [
        Number("vocab_size", "Vocabulary", 0, 1, 10_000_000, "tokens"),
        Number("hidden_size", "Hidden size d", 0, 1, 1_000_000),
        Number("num_layers", "Layers", 0, 1, 10_000),
        Number("intermediate_size", "MLP width f", 0, 0, 10_000_000),
        Switch("gated", "The MLP has a gate", True),
        Switch("tied", "The head is the embedding"),
    ],
    "Attention": [
        Number("num_heads", "Query heads h", 0, 1, 10_000),
        Number("num_kv_heads", "Key-value heads g", 0, 0, 10_000),
        Number("head_dim", "Head dim k", 0, 0, 100_000),
        Number("window", "Window", 0, 0, 10_000_000, "tokens"),
        Number("windowed_layers", "Layers with a window", 0, 0, 10_000),
    ],
    "Latent attention (0: none)": [
        Number("kv_lora_rank", "Latent c of keys and values", 0, 0, 100_000),
        Number("q_lora_rank", "Latent of queries", 0, 0, 100_000),
        Number("qk_nope_head_dim", "Features that don't turn, n", 0, 0, 100_000),
        Number("qk_rope_head_dim", "Features that turn, p", 0, 0, 100_000),
        Number("v_head_dim", "Features of a value, e", 0, 0, 100_000),
    ],
    "Experts (0: none)": [
        Number("expert_layers", "Layers with experts", 0, 0, 10_000),
        Number("num_experts", "Experts of a layer", 0, 0, 100_000),
        Number("experts_per_token", "Experts a token uses", 0, 0, 100_000),
        Number("moe_intermediate_size", "Width of an expert", 0, 0, 10_000_000),
        Number("shared_experts", "Shared experts", 0, 0, 1_000),
    ],
    "Positions, norms, biases": [
        Number("positions", "Learned positions", 0, 0, 10_000_000),
        Number("layer_norms", "Norms in a layer", 2, 0, 8),
        Switch("norm_bias", "Norms have a bias"),
        Switch("head_norms", "Queries and keys are normed"),
        Switch("qkv_bias", "Queries, keys, values have biases"),
        Switch("o_bias", "Attention's output has a bias"),
        Switch("mlp_bias", "The MLP has biases"),
    ],
}
FORMS: dict[str, list[Field]] = {
    "cache": [
        Number("context", "Context", 32768, 1, 10_000_000, "tokens of each text"),
        Number("batch", "Batch", 1, 1, 65_536, "texts"),
        Choice("bits", "Bits of a number", BITS | {"32": "32 (float32)"}),
    ],
    "parameters": [],
    "training": [
        Choice("method", "Method", {m: m for m in ("full", "LoRA", "QLoRA")}),
        Choice(
            "precision",
            "Precision",
            {
                "mixed": "16 bits, with a float32 copy",
                "bfloat16": "bfloat16 only",
                "float32": "float32",
            },
        ),
        Choice("optimizer", "Optimizer", {o: o for o in ("AdamW", "SGD with momentum", "SGD")}),
        Number("context", "Context", 4096, 1, 10_000_000, "tokens of each text"),
        Number("batch", "Batch", 1, 1, 65_536, "texts of one forward pass"),
        Choice(
            "kept",
            "Kept for the backward pass",
            {
                "no scores": "all but attention scores (FlashAttention)",
                "everything": "everything, scores too",
                "layer inputs": "layer inputs only (recomputation)",
            },
        ),
        Number("rank", "Rank of adapters", 16, 1, 65_536),
        Choice(
            "targets",
            "Adapters at",
            {"all matrices": "all matrices", "attention": "attention only"},
        ),
        Switch("dropout", "Dropout"),
    ],
    "speed": [
        Number("chips", "Chips", 1, 1, 100_000, "that share the work evenly"),
        Number("prompt", "Prompt", 2048, 1, 10_000_000, "tokens"),
        Number("answer", "Answer", 256, 1, 16_384, "tokens"),
        Number("batch", "Batch", 1, 1, 65_536, "texts"),
        Choice("weight_bits", "Bits of a weight", BITS),
        Choice("cache_bits", "Bits of a cached number", BITS),
    ],
}
TITLES = {
    "cache": "KV cache",
    "parameters": "Parameters",
    "training": "Training memory",
    "speed": "Prefill and decode",
}
OWN = "Own sizes"
LONG = 18  # letters of a choice that takes two columns


# As HTML


def control(form: str, field: Field) -> str:
    """A field with its label, its unit and a place for its error."""
    key = f"calc-{form}-{field.name}"
    name = f'id="{key}" name="{field.name}"'
    if isinstance(field, Switch):
        checked = " checked" if field.default else ""
        box = f'<input type="checkbox" {name}{checked}>'
        label = f'<label for="{key}">{field.label}</label>'
        return f'<div class="calc-switch">{box}{label}{error(key)}</div>'
    label = f'<label for="{key}">{html.escape(field.label)}</label>'
    if isinstance(field, Choice):
        options = "".join(f'<option value="{v}">{t}</option>' for v, t in field.options.items())
        inner = f"<select {name}>{options}</select>"
    else:
        about = f' aria-describedby="{key}-unit"' if field.unit else ""
        unit = f'<span class="calc-unit" id="{key}-unit">{field.unit}</span>' if field.unit else ""
        limits = f'value="{field.default}" min="{field.low}" max="{field.high}" step="1"'
        inner = f'<input type="number" inputmode="numeric" required {limits} {name}{about}>{unit}'
    long = isinstance(field, Choice) and max(map(len, field.options.values())) > LONG
    kind = "calc-field calc-long" if long else "calc-field"
    return f'<div class="{kind}">{label}{inner}{error(key)}</div>'


def error(key: str) -> str:
    return f'<span class="calc-error" id="{key}-error" hidden></span>'


def model_form(models: list[str]) -> str:
    chosen = next((m for m in models if "8B" in m), models[0] if models else OWN)
    options = "".join(
        f"<option{' selected' if name == chosen else ''}>{html.escape(name)}</option>"
        for name in [*models, OWN]
    )
    groups = ""
    for legend, fields in SIZES.items():
        inner = "".join(control("model", field) for field in fields)
        groups += f"<fieldset><legend>{legend}</legend>{inner}</fieldset>"
    return f"""<form class="calc-form calc-model" data-form="model" aria-label="Model" novalidate>
<div class="calc-field calc-wide"><label for="calc-model">Model</label>
<select id="calc-model" name="model" data-default="{html.escape(chosen)}">{options}</select></div>
<details class="calc-sizes"><summary>Its sizes, to change</summary>{groups}</details>
<details class="calc-paste"><summary>Read a config.json</summary>
<label for="calc-config">The text of a config.json of one of the families below</label>
<textarea id="calc-config" rows="6" spellcheck="false"></textarea>{error("calc-config")}
<button type="button" data-do="read">Read it</button></details>
<div class="calc-buttons">
<button type="button" data-do="link">Copy link to this calculation</button>
<button type="button" data-do="reset">Start again</button>
<span role="status" data-said></span></div>
<noscript><p>Without JavaScript the fields do nothing. The tables below hold the same results for
every model of the site.</p></noscript>
</form>"""


def chip_fields(chips: list[dict]) -> str:
    """A chosen chip, or one's own."""
    names = [*(html.escape(chip["name"]) for chip in chips), "Own chip"]
    options = "".join(
        f"<option{' selected' if 'H100' in name else ''}>{name}</option>" for name in names
    )
    own = "".join(
        control("speed", field)
        for field in (
            Number("peak", "Peak", 0, 1, 100_000_000, "TFLOP/s in bfloat16"),
            Number("bandwidth", "Memory bandwidth", 0, 1, 10_000_000, "GB/s"),
            Number("memory", "Memory", 0, 1, 1_000_000, "GB"),
        )
    ).replace('step="1"', 'step="any"')
    return (
        '<div class="calc-field calc-long"><label for="calc-speed-chip">Chip</label>'
        f'<select id="calc-speed-chip" name="chip">{options}</select></div>'
        f"{own}"
    )


def calculator(name: str, chips: list[dict]) -> str:
    """A form, and the places that the script fills: headline, table, plot and the plot's table."""
    fields = "".join(control(name, field) for field in FORMS[name])
    if name == "speed":
        fields = chip_fields(chips) + fields
    about = f'class="calc-form" data-form="{name}" aria-label="{TITLES[name]}" novalidate'
    form = f"<form {about}>{fields}</form>" if fields else ""
    return f"""<div class="calc" data-calculator="{name}" data-search-exclude>{form}
<p class="calc-headline" data-headline></p><p class="fp-unseen" role="status" data-status></p>
<div class="calc-results" data-table></div>
<figure class="calc-plot" data-plot></figure>
<details class="calc-twin"><summary>The plot as a table</summary><div data-twin></div></details>
</div>"""
