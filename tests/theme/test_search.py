"""What readers type finds its page, soon after the last key, and no page loads the index for it."""

import json
import re
import statistics
from types import SimpleNamespace

import pytest
from playwright.sync_api import expect

from tests.browser import watched
from theme import search

# What is typed: the pages that answer it. One of them comes within the first three.
QUERIES = {
    "MLA": "attention/mla",
    "kv cache size": "attention/kv_cache",
    "repeat_interleave": "attention/gqa",
    "rope half or interleaved": "position/rope reference/conventions",
    "why 1/sqrt d": "attention/scaled_dot_product",
    "NF4": "peft/qlora",
    "attention mask": "attention/scaled_dot_product",
    "top k routing": "moe/mixture_of_experts",
    "grouped query attention": "attention/gqa",
    "lora alpha": "peft/lora",
    "left padding": "attention/kv_cache",
    "q_proj": "attention/multi_head attention/gqa",
    "perplexity": "foundations/what_is_a_language_model",
    "rotary": "position/rope",
    "yarn": "position/context_extension",
    "load balancing": "moe/mixture_of_experts",
    "image tokens": "multimodal/llava",
    "gptq": "quantization/gptq",
    "flash attention memory": "attention/flash_attention",
    "speculative": "moe/multi_token_prediction",
    "sliding window": "attention/sliding_window",
    "softmax overflow": "foundations/softmax_and_cross_entropy",
    "weight tying": "models/gpt2",
    "mixture of experts active parameters": "models/dense_and_moe",
    "4 bit": "peft/qlora",
    "GroupedQueryAttention": "attention/gqa",
    "rmsnorm": "layers/rmsnorm",
    "positional encoding": "position/sinusoidal_and_learned",
    "long context": "position/context_extension",
    "merge adapter": "peft/lora",
    # These have no entry in search.yml.
    "how does attention work": "attention/scaled_dot_product",
    "vision transformer patches": "multimodal/vit",
    "deepseek v3 fp8": "models/deepseek_v3",
    "shared experts": "moe/deepseek_moe",
    "gelu tanh": "layers/swiglu reference/conventions",
    "causal mask": "attention/scaled_dot_product",
    "eckart young": "foundations/svd",
    "pre-norm vs post-norm": "layers/layer_norm",
    "llama.cpp": "quantization/gguf",
    "activation outliers": "quantization/int8",
    "backprop": "foundations/backpropagation",
    "safetensors": "reference/your_checkpoint",
    "Llama": "models/llama",
    "UnitOffset": "layers/rmsnorm",
    "dot_product": "attention/scaled_dot_product attention/flash_attention",
}
SOON = 100  # milliseconds, median of all queries
# Empties the box, types, and waits for results: milliseconds from the key to the list, addresses.
ASK = """(words) => new Promise((resolve) => {
  const box = document.querySelector(".md-search__input")
  const list = document.querySelector(".md-search-result__list")
  const type = (text) => {
    box.value = text
    box.dispatchEvent(new KeyboardEvent("keyup", { bubbles: true }))
  }
  const changed = (full, act) => {
    const observer = new MutationObserver(() => {
      if (Boolean(list.children.length) !== full) return
      observer.disconnect()
      setTimeout(act)
    })
    observer.observe(list, { childList: true })
  }
  const ask = () => {
    let end
    const begin = performance.now()
    const observer = new MutationObserver(() => { end ??= performance.now() })
    observer.observe(list, { childList: true })
    changed(true, () => {
      observer.disconnect()
      const links = list.querySelectorAll(".md-search-result__item > .md-search-result__link")
      resolve([end - begin, [...links].map((link) => link.getAttribute("href"))])
    })
    type(words)
  }
  if (!list.children.length) return ask()
  changed(false, ask)
  type("")
})"""


def opened(tab, base: str) -> None:
    tab.goto(base + "index.html")
    tab.locator(".md-search__input").click()
    ready = tab.locator(".md-search-result__meta")
    expect(ready).to_have_text("Type to start searching", timeout=60_000)


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_what_is_typed_finds_its_page_soon(browser, site, address, scheme):
    base = address if scheme == "http" else f"{site.as_uri()}/"
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab, troubles = watched(context, base)
    opened(tab, base)
    late, times = [], []
    for words, right in QUERIES.items():
        asked = [tab.evaluate(ASK, words) for _ in range(3)]
        times.append(min(milliseconds for milliseconds, _ in asked))  # others use this machine too
        links = [link.removeprefix(base) for link in asked[0][1]]
        found = list(dict.fromkeys(link.partition(".html")[0] for link in links))  # pages
        if not set(found[:3]) & set(right.split()):
            late.append(f"{words}: {', '.join(found[:5])}")
    context.close()
    print(f"{scheme}: median {statistics.median(times):.0f} ms, at most {max(times):.0f} ms")
    assert not late, "\n".join(late)
    assert statistics.median(times) <= SOON
    assert not troubles, "\n".join(troubles)


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_the_index_is_loaded_when_the_search_is_opened(browser, site, address, scheme):
    base = address if scheme == "http" else f"{site.as_uri()}/"
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab, troubles = watched(context, base)
    loaded = []
    tab.on("request", lambda request: loaded.append(request.url))
    # Where the search led: what was found is marked, without the index.
    tab.goto(base + "attention/gqa.html?h=cache")
    expect(tab.locator("mark[data-md-highlight]").first).to_be_attached()
    tab.wait_for_load_state("networkidle")
    assert loaded and not [url for url in loaded if "search_index" in url]
    opened(tab, base)
    assert len([url for url in loaded if "search_index" in url]) == 1
    context.close()
    assert not troubles, "\n".join(troubles)


def test_typing_on_ends_with_the_last_word(tab_with_search):
    tab = tab_with_search
    tab.locator(".md-search__input").press_sequentially("perplexity", delay=20)
    best = tab.locator(".md-search-result__link").first
    expect(best).to_have_attribute("href", re.compile("what_is_a_language_model"))
    tab.keyboard.press("Enter")
    expect(tab).to_have_url(re.compile("what_is_a_language_model"))


@pytest.fixture
def tab_with_search(browser, address):
    tab = browser.new_page()
    opened(tab, address)
    yield tab
    tab.close()


def test_a_page_unknown_to_the_search_fails_the_build(shell):
    words = shell.root / "site_src/search.yml"
    words.write_text("a: [zebra crossing]\n")
    shell.page("a.md", "# A\n\nWords.")
    code, output = shell.build()
    assert code == 0, output
    index = json.loads((shell.site / "search/search_index.json").read_text("utf-8"))
    assert {s["location"]: s.get("names") for s in index["docs"]}["a.html"] == ["zebra crossing"]
    assert not (shell.site / "search.yml").exists()
    words.write_text("b: [zebra crossing]\n")
    code, output = shell.build()
    assert code == 1 and "search: there is no b, which 'zebra crossing' should lead to" in output


def test_of_code_stays_what_is_new():
    first = "import torch\nx = torch.randn(2)\n    y = x"
    again = "x = torch.randn(3)\ny = masked_fill(x)"
    sections = [
        {"location": "a.html", "text": f"<p>x = randn</p> <pre><code>{first}</code></pre>"},
        {"location": "a.html#b", "text": f"<pre><code>{again}</code></pre>"},
        {"location": "b.html", "text": f"<pre><code>{again}</code></pre>"},
    ]
    search.shorten(sections)
    assert [section["text"] for section in sections] == [
        "<p>x = randn</p> <pre><code>x = torch.randn(2)</code></pre>",
        "<pre><code>y = masked_fill(x)</code></pre>",
        f"<pre><code>{again}</code></pre>",
    ]


def test_a_page_is_known_by_what_its_module_defines():
    code = """
class Block:
    def __init__(self):
        self.q_proj = Linear()
        self._hidden = 1
def attend(): ...
def _helper(): ...
"""
    assert search.definitions(code) == ["Block", "attend", "q_proj"]


def test_names_are_found_by_their_parts():
    def unseen(text):
        return re.findall(r"<i hidden> (.*?)</i>", search.with_parts(text))

    assert unseen("q_proj") == ["proj"]
    assert unseen("RMSNorm") == ["norm"]
    assert unseen("GroupedQueryAttention") == ["queryattention attention"]
    assert unseen("a scaled_dot_product") == ["dot_product product"]
    assert unseen("nn.RMSNorm(x), RMSNorm(y), LayerNorm") == ["norm"]  # once a section
    for plain in ("plain words", "__init__", "<p>LLM</p>", "x_1", "A &lt; B"):
        assert search.with_parts(plain) == plain


def test_a_name_is_one_word_to_the_search(site):
    index = json.loads((site / "search/search_index.json").read_text("utf-8"))
    words = re.compile(index["config"]["separator"]).split(
        "np.random.default_rng(0); q_proj=nn.RMSNorm(1.5) -&gt; key-value/head, F.sdpa[x_1]"
    )
    assert {"default_rng", "q_proj", "RMSNorm", "1.5", "key", "value", "sdpa", "x_1"} <= set(words)


def test_outputs_stay_out_of_the_search(site, report):
    index = json.loads((site / "search/search_index.json").read_text("utf-8"))
    text = " ".join(section["text"] for section in index["docs"])
    assert "Forty untrained blocks" in text and "rms_normalize" in text
    assert "after 16 blocks the typical size is " not in text


def test_words_with_digits_keep_their_nodes_apart(browser, site):
    context = browser.new_context()
    tab = context.new_page()
    opened(tab, f"{site.as_uri()}/")  # where lunr is in a frame, and not in a worker
    texts = tab.evaluate(
        """() => {
          const { lunr } = document.querySelector("iframe[title=Search]").contentWindow
          const nodes = [{ 1: { id: 234 } }, { 1: { id: 2 }, 3: { id: 4 } }]
          return nodes.map((edges) => Object.assign(new lunr.TokenSet(), { edges }).toString())
        }"""
    )
    context.close()
    assert texts[0] != texts[1]


def test_the_plugin_reads_code_without_its_colours_and_the_page_keeps_them():
    whole = '<p><span data-search-exclude="x">a</span></p><pre><code><span>b</span></code></pre>'
    page, context = SimpleNamespace(content=whole), {}
    search.plain_code(context, page, None, None)
    assert page.content == whole.replace("<span>b</span>", "b")
    search.coloured_code(context, page, None, None)
    assert page.content == whole.replace(' data-search-exclude="x"', "")
    assert context == {}
