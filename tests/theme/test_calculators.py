"""The calculators: the script computes what Python does, and the page can be used."""

import json
import random
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from playwright.sync_api import expect

from snippets.common.model_shape import ModelShape, problem, shape_of
from snippets.common.study import CONTEXT
from snippets.reference import calculators as sums
from snippets.reference import roofline as speed
from snippets.reference import training_memory as training
from tests.browser import served, watched
from tests.small_models import GROUPED, MODELS, built
from tests.test_browser import AXE, RULES, RUN_AXE
from theme import calculator_forms as forms
from theme import calculators, csp

ASSETS = Path(__file__).parents[2] / "site_src/assets"
CHIPS = json.loads((ASSETS / "chips.json").read_text())
FORMULAS = ASSETS / "calculators_formulas.js"
LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
TINY = LLAMA | {"hidden_size": 768, "num_hidden_layers": 3}


# The same numbers


def random_shape(draw: random.Random) -> ModelShape:
    """Sizes up to those of the largest models; half are latent, half have experts or windows."""
    g = draw.choice([1, 2, 4, 8])
    layers = draw.randint(1, 130)
    sizes = dict(
        vocab_size=draw.randint(1, 300_000), hidden_size=draw.randint(1, 20_000),
        num_layers=layers, num_heads=g * draw.randint(1, 16), num_kv_heads=g,
        head_dim=draw.randint(1, 300), intermediate_size=draw.randint(1, 60_000),
        positions=draw.choice([0, 1024]), layer_norms=draw.choice([2, 4]),
    )  # fmt: skip
    for switch in ("gated", "tied", "norm_bias", "head_norms", "qkv_bias", "o_bias"):
        sizes[switch] = draw.random() < 0.5
    if draw.random() < 0.4:
        sizes |= dict(kv_lora_rank=draw.randint(1, 700), q_lora_rank=draw.choice([0, 1536]),
                      qk_nope_head_dim=draw.randint(1, 200), qk_rope_head_dim=draw.randint(1, 99),
                      v_head_dim=draw.randint(1, 200))  # fmt: skip
    if draw.random() < 0.5:
        sizes |= dict(window=draw.randint(1, 9000), windowed_layers=draw.randint(0, layers))
    if draw.random() < 0.5:
        e = draw.randint(1, 256)
        sizes |= dict(num_experts=e, experts_per_token=draw.randint(1, e),
                      moe_intermediate_size=draw.randint(1, 4000),
                      shared_experts=draw.choice([0, 1, 2]),
                      expert_layers=draw.randint(0, layers))  # fmt: skip
    else:
        sizes["mlp_bias"] = draw.random() < 0.5
    return ModelShape(**sizes)


def a_pass(draw: random.Random) -> dict:
    chip = draw.choice(CHIPS)
    return dict(batch=draw.randint(1, 500), weight_bits=draw.choice([4, 8, 16]),
                cache_bits=draw.choice([4, 8, 16]), chips=draw.randint(1, 64),
                peak=chip["peak"] * draw.random(), bandwidth=chip["bandwidth"] * draw.random()
                )  # fmt: skip


def of_cache(draw):
    return dict(context=draw.randint(1, 200_000), batch=draw.randint(1, 64),
                bits=draw.choice([4, 8, 16, 32]))  # fmt: skip


def of_training(draw):
    return dict(
        method=draw.choice(training.METHODS), precision=draw.choice([*training.PRECISIONS]),
        optimizer=draw.choice([*training.STATES]), context=draw.randint(1, 9000),
        batch=draw.randint(1, 8), kept=draw.choice(training.KEPT), dropout=draw.random() < 0.5,
        rank=draw.randint(1, 256), targets=draw.choice([*training.TARGETS]),
    )  # fmt: skip


def of_pass(draw):
    new = draw.choice([1, 1, draw.randint(2, 20_000)])
    return a_pass(draw) | {"new": new, "past": draw.randint(0, 200_000)}


def of_answer(draw):
    return a_pass(draw) | {"prompt": draw.randint(1, 9000), "answer": draw.randint(1, 30)}


PAIRS = {  # the script's name: Python's function, and how its other inputs are drawn
    "kvCache": (sums.kv_cache, of_cache),
    "parameters": (sums.parameters, lambda draw: {}),
    "trainingMemory": (training.training_memory, of_training),
    "roofline": (speed.roofline, of_pass),
    "answerSeconds": (speed.answer_seconds, of_answer),
}
RUN = """([name, inputs]) => inputs.map(([shape, about]) => calculators[name](
  shape, typeof about === "string" ? about : { ...about, fresh: about.new }))"""


@pytest.fixture(scope="module")
def script(browser):
    """A tab that holds the formulas and nothing else."""
    tab = browser.new_page()
    tab.add_script_tag(path=FORMULAS)
    yield tab
    tab.close()


def different(script, name: str, function, inputs: list) -> list:
    """The inputs for which the script's result isn't Python's, to the last bit."""
    theirs = script.evaluate(RUN, [name, [[asdict(shape), about] for shape, about in inputs]])
    wrong = []
    for (shape, about), found in zip(inputs, theirs, strict=True):
        right = function(shape, about) if isinstance(about, str) else function(shape, **about)
        right = asdict(right) if isinstance(right, ModelShape) else right
        # All numbers of the script are doubles; a whole one above 2^53 comes over as an integer
        # of its shortest digits.
        if {k: float(v) for k, v in right.items()} != {k: float(v) for k, v in found.items()}:
            wrong.append((shape, about, right, found))
    return wrong


@pytest.mark.parametrize("name", PAIRS)
def test_the_script_computes_what_python_does(script, name):
    function, about = PAIRS[name]
    draw = random.Random(name)
    inputs = [(random_shape(draw), about(draw)) for _ in range(200)]
    assert different(script, name, function, inputs) == []
    if name != "parameters":  # whose results are whole: a sum in another order is the same
        values = [v for s, a in inputs[:20] for v in function(s, **a).values()]
        assert len({*values}) > 40 and all(v >= 0 for v in values)


def test_the_script_exchanges_attention_as_python_does(script):
    draw = random.Random(1)
    kinds = ("MHA", "GQA", "MQA", "MLA", "window")
    inputs = [(random_shape(draw), draw.choice(kinds)) for _ in range(200)]
    assert different(script, "withAttention", sums.with_attention, inputs) == []


def test_a_difference_of_one_byte_would_be_seen(script):
    shape, about = shape_of(LLAMA), {"context": 1000, "batch": 1, "bits": 16}

    def off_by_one(shape, **about):
        return sums.kv_cache(shape, **about) | {"bytes": 1}

    assert len(different(script, "kvCache", off_by_one, [(shape, about)])) == 1


def test_the_script_refuses_what_python_refuses(script):
    draw, inputs = random.Random(2), []
    for _ in range(400):
        sizes = asdict(random_shape(draw))
        for name in draw.sample([f.name for f in fields(ModelShape)], 2):
            if not isinstance(sizes[name], bool):
                sizes[name] = draw.choice([-1, 0, 1, 7, 500])
        inputs.append(sizes)
    found = script.evaluate("all => all.map(s => calculators.problem(s))", inputs)
    right = []
    for sizes in inputs:
        shape = object.__new__(ModelShape)
        shape.__dict__.update(sizes)
        said = problem(shape)
        right.append(list(said) if said else None)
    assert found == right and 20 < right.count(None) < 380


@pytest.mark.parametrize("name", MODELS)
def test_the_script_reads_configs_as_python_does(script, name):
    _, config = built(name)
    config = json.loads(json.dumps(config))
    assert script.evaluate("c => calculators.shapeOf(c)", config) == asdict(shape_of(config))


@pytest.mark.parametrize("kind, left_out", [
    ("gemma3_text", ["vocab_size", "num_attention_heads", "num_key_value_heads"]),
    ("llama", ["num_key_value_heads"]),
    ("qwen3", ["num_key_value_heads"]),
    ("mistral", ["sliding_window"]),
])  # fmt: skip
def test_the_script_knows_the_same_defaults(script, kind, left_out):
    config = {"vocab_size": 101, "model_type": kind, "max_window_layers": 1} | GROUPED
    config = {key: value for key, value in config.items() if key not in left_out}
    read = "c => calculators.shapeOf(c)"
    assert script.evaluate(read, config) == asdict(shape_of(config))
    inside = {"model_type": kind, "text_config": config}
    assert script.evaluate(read, inside) == asdict(shape_of(inside))


def test_the_script_refuses_configs_with_pythons_words(script):
    read = "c => { try { calculators.shapeOf(c); return '' } catch (e) { return e.message } }"
    gone = {k: v for k, v in LLAMA.items() if k != "hidden_size"}
    bad_heads = LLAMA | {"num_key_value_heads": 5}
    for config in (gone, bad_heads, {"model_type": "mamba"}, {"model_type": "toString"}):
        with pytest.raises(ValueError) as refused:
            shape_of(config)
        assert script.evaluate(read, config) == str(refused.value)


# The build


class Engine:
    """What the hook asks of the page engine."""

    order = ("models/b", "models/a")

    def __init__(self, **records):
        self.entries = {
            f"models/{page}.md": {"outputs": [[{"kind": "text"}, {"proof": record}]]}
            for page, record in records.items()
        }


def record(name: str, read: dict, **changes) -> dict:
    shape = shape_of(read)
    counts = sums.parameters(shape)
    counted = {"config": read, "parameters": counts["total"], "active": counts["active"],
               "context": CONTEXT, "cache bytes":
               sums.kv_cache(shape, context=CONTEXT, batch=1, bits=16)["bytes"]}  # fmt: skip
    return {"study": name, "facts": {}, "counted": counted | changes}


def test_presets_are_what_pages_counted_in_their_order():
    engine = Engine(a=record("A", LLAMA), b=record("B", TINY), c={"oracle": "torch"})
    found = calculators.presets(engine)
    assert [(m.name, m.page) for m in found] == [("B", "models/b.md"), ("A", "models/a.md")]
    assert found[1].shape == shape_of(LLAMA)


@pytest.mark.parametrize("changes, said", [
    ({"parameters": 8_030_261_249}, "models/a.md: A has 8,030,261,249 parameters, the calculators"),
    ({"active": 1}, "models/a.md: A has 1 active, the calculators say 8,030,261,248"),
    ({"cache bytes": 5}, "models/a.md: A has 5 cache bytes, the calculators say 4,294,967,296"),
    ({"config": {"model_type": "mamba"}}, "models/a.md: A is no preset: model_type: mamba isn't"),
])  # fmt: skip
def test_a_preset_that_differs_from_its_model_is_a_warning(caplog, changes, said):
    assert calculators.presets(Engine(a=record("A", LLAMA, **changes))) == []
    assert said in caplog.text and caplog.records[0].levelname == "WARNING"


def test_every_size_has_a_field_and_every_argument_too():
    named = [field.name for group in forms.SIZES.values() for field in group]
    assert sorted(named) == sorted(field.name for field in fields(ModelShape))
    draw = random.Random(0)
    assert {f.name for f in forms.FORMS["cache"]} == of_cache(draw).keys()
    assert {f.name for f in forms.FORMS["training"]} == of_training(draw).keys()
    options = {f.name: [*f.options] for f in forms.FORMS["training"] if hasattr(f, "options")}
    assert options == {
        "method": [*training.METHODS], "precision": [*training.PRECISIONS],
        "optimizer": [*training.STATES], "kept": ["no scores", "everything", "layer inputs"],
        "targets": ["all matrices", "attention"],
    }  # fmt: skip
    assert {*options["kept"]} == {*training.KEPT} and {*options["targets"]} == {*training.TARGETS}


def test_every_chip_has_its_numbers_and_its_source():
    for chip in CHIPS:
        assert chip["source"].startswith("https://") and chip["says"]
        assert 100 < chip["peak"] / chip["bandwidth"] < 600 and chip["memory"] >= 16e9


# The page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The calculators alone, under the site's policy, with two models; served."""
    folder = tmp_path_factory.mktemp("calculators")
    (folder / "assets").symlink_to(ASSETS)
    models = [{"name": name, "shape": asdict(shape_of(config))}
              for name, config in {"Llama 8B": LLAMA, "Tiny": TINY}.items()]  # fmt: skip
    data = json.dumps({"models": models, "chips": CHIPS})
    (folder / "data.js").write_text(f"const calculatorsData = {data};\n")
    parts = "".join(f"<h2>{n}</h2>{forms.calculator(n, CHIPS)}" for n in forms.FORMS)
    sheets = ("palette.css", "site.css", "calculators.css")
    styles = "".join(f'<link rel="stylesheet" href="assets/{s}">' for s in sheets)
    scripts = ("data.js", *calculators.SCRIPTS[1:])
    body = "".join(f'<script src="{s}"></script>' for s in scripts)
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Calculators</title>'
        '<link rel="icon" href="data:,">'
        f"{styles}<style>.fp-unseen{{font-size:1px}}html{{font-size:20px}}"
        ":root{--md-default-bg-color:#fff;--md-default-fg-color:#000}</style></head>"
        f'<body data-md-color-scheme="default" class="md-typeset"><main><h1>Calculators</h1>'
        f"{forms.model_form(['Llama 8B', 'Tiny'])}{parts}</main>{body}</body></html>"
    )
    policy = f'<meta http-equiv="Content-Security-Policy" content="{csp.policy(text)}">'
    text = text.replace(csp.FIRST, csp.FIRST + policy)
    (folder / "index.html").write_text(text)
    with served(folder) as base:
        yield base, folder


@pytest.fixture
def tab(browser, page):
    base, _ = page
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab, troubles = watched(context, base)
    tab.goto(base)
    yield tab
    context.close()
    assert not troubles, troubles


def headline(tab, name: str):
    return tab.locator(f"[data-calculator={name}] [data-headline]")


def test_results_are_there_at_once_in_both_units(tab):
    expect(headline(tab, "cache")).to_have_text(
        "Llama 8B: the cache of 1 text of 32,768 tokens takes 4.29 GB (4 GiB). "
        "The next token of each adds 131 kB (128 KiB)."
    )
    expect(headline(tab, "parameters")).to_contain_text("8,030,261,248 to be exact")
    expect(headline(tab, "training")).to_contain_text("153 GB (142 GiB)")
    expect(headline(tab, "speed")).to_contain_text("they fit")
    for name in forms.FORMS:
        box = tab.locator(f"[data-calculator={name}]")
        expect(box.locator("figure > svg[role=img]")).to_have_attribute(
            "aria-label", re.compile(r"\w{3,}")
        )
        assert box.locator("[data-table] tbody tr").count() >= 3
        assert box.locator("[data-twin] tbody tr").count() >= 3


def test_a_field_changes_results_address_and_what_is_said(tab):
    tab.get_by_label("Context").first.fill("65536")
    expect(headline(tab, "cache")).to_contain_text("65,536 tokens takes 8.59 GB (8 GiB)")
    assert tab.url.endswith("#?cache.context=65536")
    status = tab.locator("[data-calculator=cache] [data-status]")
    assert status.get_attribute("role") == "status"
    expect(status).to_contain_text("65,536 tokens")  # once the typing is over
    # Another model, by keyboard alone.
    tab.locator("#calc-model").focus()
    tab.keyboard.press("ArrowDown")
    expect(headline(tab, "cache")).to_contain_text("Tiny: the cache")
    assert "model=Tiny" in tab.url and "cache.context=65536" in tab.url


def test_a_link_brings_the_calculation_back(tab, page):
    base, _ = page
    tab.locator(".calc-sizes summary").click()
    tab.get_by_label("Layers", exact=True).fill("40")
    tab.get_by_label("The head is the embedding").check()
    tab.get_by_label("Method").select_option("QLoRA")
    tab.get_by_label("Chip", exact=True).select_option("Own chip")
    tab.get_by_label("Peak").fill("123.5")
    assert tab.locator("#calc-model").input_value() == "Own sizes"
    tab.get_by_role("button", name="Copy link").click()
    expect(tab.locator("[data-said]")).to_have_text("Copied.")
    before = [headline(tab, name).inner_text() for name in forms.FORMS]
    assert "This model" in before[0]
    link = tab.evaluate("navigator.clipboard.readText()")
    other = tab.context.new_page()
    other.goto(link)
    assert [headline(other, name).inner_text() for name in forms.FORMS] == before
    assert other.get_by_label("Peak").input_value() == "123.5"
    other.get_by_role("button", name="Start again").click()
    expect(headline(other, "cache")).to_contain_text("Llama 8B: the cache of 1 text of 32,768")
    assert other.url == base


@pytest.mark.parametrize("value, said", [
    ("0", "Context must be a whole number from 1 to 10,000,000"),
    ("", "Context must be a whole number from 1 to 10,000,000"),
    ("1.5", "Context must be a whole number from 1 to 10,000,000"),
])  # fmt: skip
def test_a_wrong_value_is_answered_in_words_beside_its_field(tab, value, said):
    field = tab.locator("#calc-cache-context")
    field.fill(value)
    error = tab.locator("#calc-cache-context-error")
    expect(error).to_have_text(said)
    expect(error).to_be_visible()
    assert field.get_attribute("aria-invalid") == "true"
    assert "calc-cache-context-error" in field.get_attribute("aria-describedby")
    expect(headline(tab, "cache")).to_contain_text("Not calculated")
    expect(headline(tab, "training")).to_contain_text("153 GB")  # the others go on
    field.fill("1000")
    expect(error).to_be_hidden()
    assert field.get_attribute("aria-invalid") == "false"
    expect(headline(tab, "cache")).to_contain_text("1,000 tokens")


def test_sizes_that_do_not_fit_name_their_field(tab):
    tab.locator(".calc-sizes summary").click()
    tab.locator("#calc-model-num_kv_heads").fill("5")
    expect(tab.locator("#calc-model-num_kv_heads-error")).to_have_text(
        "Key-value heads g must divide the number of query heads"
    )
    expect(headline(tab, "speed")).to_contain_text("sizes of the model don't fit")


def test_what_cannot_be_counted_exactly_is_not_shown(tab):
    tab.locator("#calc-cache-context").fill("10000000")
    tab.locator("#calc-cache-batch").fill("60000")
    expect(tab.locator("#calc-cache-context-error")).to_contain_text("is too large")
    expect(headline(tab, "cache")).to_contain_text("Not calculated")


def test_a_config_can_be_pasted(tab):
    tab.locator(".calc-paste summary").click()
    area, button = tab.locator("#calc-config"), tab.get_by_role("button", name="Read it")
    area.fill("{ not json")
    button.click()
    expect(tab.locator("#calc-config-error")).to_contain_text("isn't JSON")
    area.fill(json.dumps({"model_type": "mamba"}))
    button.click()
    expect(tab.locator("#calc-config-error")).to_contain_text("mamba isn't known")
    area.fill(json.dumps({"model_type": "mistral", "vocab_size": 32000} | GROUPED))
    button.click()
    expect(tab.locator("#calc-config-error")).to_be_hidden()
    expect(headline(tab, "parameters")).to_contain_text("This model")
    assert "num_layers=5" in tab.url


def test_a_chip_says_its_numbers(tab):
    tab.get_by_label("Chip", exact=True).select_option("Google TPU v5e")
    assert tab.get_by_label("Peak").input_value() == "197"
    assert tab.get_by_label("Peak").is_disabled()
    expect(headline(tab, "speed")).to_contain_text("they do NOT fit")


@pytest.mark.parametrize("width", [320, 390, 1440])
def test_it_fits_the_screen_and_axe_finds_nothing(tab, width):
    tab.set_viewport_size({"width": width, "height": 844})
    for details in tab.locator("details").all():
        details.evaluate("d => { d.open = true }")
    tab.locator("#calc-cache-batch").fill("0")  # an error is shown, too
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # in one call: a plot that is drawn anew for the width meanwhile takes the place of its svg
    drawn = tab.evaluate("[...document.querySelectorAll('figure > svg')].map(s => s.clientWidth)")
    assert len(drawn) == 4 and all(200 < w < width for w in drawn)
    tab.evaluate(AXE)
    assert tab.evaluate(RUN_AXE, [RULES, []]) == []


def test_it_works_from_disk(browser, page):
    _, folder = page
    context = browser.new_context()
    tab, troubles = watched(context, folder.as_uri())
    tab.goto(f"{(folder / 'index.html').as_uri()}#?model=Tiny")
    expect(headline(tab, "cache")).to_contain_text("Tiny: the cache")
    tab.locator("#calc-cache-context").fill("4096")
    expect(headline(tab, "cache")).to_contain_text("4,096 tokens")
    context.close()
    assert not troubles, troubles


def test_the_site_has_every_counted_model(site):
    text = (site / calculators.DATA).read_text("utf-8")
    models = json.loads(text.removeprefix("const calculatorsData = ").removesuffix(";\n"))["models"]
    table = (site / "models/index.html").read_text("utf-8")
    assert len(models) >= 12 and all(model["name"] in table for model in models)
    html = (site / "reference/calculators.html").read_text("utf-8")
    assert "<!-- calculator" not in html
    for model in models:
        assert html.count(f">{model['name']}</a>") == 4  # once in each table for all models
    other = (site / "reference/conventions.html").read_text("utf-8")
    assert "calculators_data.js" in html and "calculators_data.js" not in other
