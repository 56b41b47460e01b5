"""Modules against their counterparts in transformers or torch: same weights, same inputs.

Each pair is two functions of no argument that do the same work, checked once to give the same.
Rounds run both in turn, in either order, and what is printed is the median of the rounds' ratios.
Bounds stand where the issue of speed is the module's own (what it keeps, how it groups); the
rest is matrix products that both sides leave to torch, printed for those who wonder.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config, DynamicCache, LlamaConfig, MistralConfig, MixtralConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.mixtral import modeling_mixtral as mixtral

from snippets.attention.flash_attention import flash_attention
from snippets.attention.gqa import GroupedQueryAttention, grouped_attention
from snippets.attention.kv_cache import LayerCache
from snippets.attention.mla import MultiHeadLatentAttention
from snippets.attention.sliding_window import SlidingWindowAttention
from snippets.common.memory import peak_bytes
from snippets.layers.layer_norm import LayerNorm
from snippets.layers.rmsnorm import RMSNorm
from snippets.layers.swiglu import GatedMLP
from snippets.moe.mixture_of_experts import MixtureOfExperts, grouped_experts, top_k_routing
from snippets.position.rope import inverse_frequencies, rope_table, rotate

D, H, G, K = 1024, 16, 4, 64  # hidden size, heads, key-value heads, head dim
PROMPT, NEW = 1024, 64  # tokens
AT_MOST = 1.05

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Fresh:
    """Work that can be done once: `prepare` makes it anew, untimed."""

    prepare: Callable[[], Run]


class Pair(NamedTuple):
    name: str
    peer: str
    bound: float | None  # of our time by theirs
    ours: Run | Fresh
    theirs: Run | Fresh


def pairs() -> Iterator[Pair]:
    hf = "transformers"
    yield Pair("decode with cache, gqa", hf, AT_MOST, *gqa_decode())
    yield Pair("decode with cache, mla", hf, AT_MOST, *mla_decode())
    yield Pair("decode with cache, sliding_window", hf, AT_MOST, *window_decode())
    loop, grouped = experts()
    yield Pair("64 experts, the layer", hf + "' grouped_mm", AT_MOST, *grouped)
    yield Pair("64 experts, grouped", "a loop over experts", 1 / 1.5, *loop)
    yield Pair("gqa, whole text", hf, None, *gqa_whole())
    yield Pair("rope", hf, None, *rope())
    sizes = {"hidden_size": D, "intermediate_size": 2816}
    swiglu = GatedMLP(**sizes), llama.LlamaMLP(config(**sizes))
    yield Pair("swiglu", hf, None, *same(*swiglu, tokens()))
    yield Pair("rmsnorm", hf, None, *same(RMSNorm(hidden_size=D), llama.LlamaRMSNorm(D), tokens()))
    norms = LayerNorm(hidden_size=D), nn.LayerNorm(D)
    yield Pair("layer_norm", "torch", None, *same(*norms, tokens()))


def growth() -> list[tuple[str, float]]:
    """How peak memory grows when the text doubles: twice is linear, four times quadratic."""

    def peak(attention: Callable, t: int) -> int:
        q, k, v = (torch.randn(1, 2, t, 16, requires_grad=True) for _ in range(3))
        return peak_bytes(lambda: attention(q, k, v).sum().backward())

    found = []
    for name, attention in (("flash", flash_attention), ("plain", grouped_attention)):
        peaks = [peak(attention, t) for t in (256, 512, 1024)]
        # Of the growth, so that what the tiles take, which doesn't grow, is left out.
        found.append((name, (peaks[2] - peaks[1]) / (peaks[1] - peaks[0])))
    return found


def tokens(t: int = 512) -> Tensor:
    return torch.randn(1, t, D)


def same(ours: nn.Module, theirs: nn.Module, *inputs) -> tuple[Run, Run]:
    """Two modules with the same weights on the same inputs."""
    theirs.load_state_dict(ours.state_dict())
    return lambda: ours(*inputs), lambda: theirs(*inputs)


def config(kind: type = LlamaConfig, **changes):
    sizes = {"hidden_size": D, "num_attention_heads": H, "num_key_value_heads": G, "head_dim": K}
    return kind(**(sizes | {"attn_implementation": "sdpa"} | changes))


def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
    return rope_table(inverse_frequencies(head_dim=K), positions)


def doubled(rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """transformers' tables: both halves, with an axis for the batch."""
    cos, sin = (torch.cat((table, table), dim=-1)[None] for table in rotation)
    return cos, sin


def rope() -> tuple[Run, Run]:
    q, k, rotation = torch.randn(1, H, 512, K), torch.randn(1, G, 512, K), tables(torch.arange(512))
    both = doubled(rotation)
    return (
        lambda: rotate(q, *rotation).sum() + rotate(k, *rotation).sum(),
        lambda: sum(x.sum() for x in llama.apply_rotary_pos_emb(q, k, *both)),
    )


def gqa() -> tuple[GroupedQueryAttention, llama.LlamaAttention]:
    ours = GroupedQueryAttention(hidden_size=D, num_heads=H, num_kv_heads=G, head_dim=K)
    theirs = llama.LlamaAttention(config(), layer_idx=0)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gqa_whole() -> tuple[Run, Run]:
    ours, theirs = gqa()
    x, rotation = tokens(), tables(torch.arange(512))
    both = doubled(rotation)
    return lambda: ours(x, rotation), lambda: theirs(x, both, None)[0]


def gqa_decode() -> tuple[Run, Run]:
    ours, theirs = gqa()
    return (
        decode(lambda x, r, cache: ours(x, r, cache=cache), LayerCache, tables),
        decode(
            lambda x, r, cache: theirs(x, r, None, cache)[0],
            DynamicCache,
            lambda positions: doubled(tables(positions)),
        ),
    )


def mla_decode() -> tuple[Fresh, Fresh]:
    sizes = {"q_lora_rank": 384, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
    sizes |= {"qk_rope_head_dim": K, "v_head_dim": 128}
    ours = MultiHeadLatentAttention(hidden_size=D, num_heads=H, **sizes)
    config = DeepseekV3Config(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=H,
        attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **sizes,
    )
    theirs = deepseek_v3.DeepseekV3Attention(config, layer_idx=0)
    theirs.load_state_dict(ours.state_dict())
    return (
        decode(lambda x, r, cache: ours(x, r, cache=cache), LayerCache, tables),
        decode(
            lambda x, r, cache: theirs(x, r, None, cache)[0],
            DynamicCache,
            lambda positions: doubled(tables(positions)),
        ),
    )


def window_decode() -> tuple[Fresh, Fresh]:
    sizes = {"hidden_size": D, "num_heads": H, "num_kv_heads": G, "head_dim": K}
    ours = SlidingWindowAttention(window=256, **sizes)
    chosen = config(MistralConfig, sliding_window=256, num_hidden_layers=1)
    theirs = mistral.MistralAttention(chosen, layer_idx=0)
    theirs.load_state_dict(ours.state_dict())
    # Their prompt's mask is left out: what it gives isn't timed, and keys don't depend on it.
    return (
        decode(lambda x, r, cache: ours(x, r, cache=cache), ours.new_cache, tables),
        decode(
            lambda x, r, cache: theirs(x, r, None, cache)[0],
            lambda: DynamicCache(config=chosen),
            lambda positions: doubled(tables(positions)),
        ),
    )


def experts() -> tuple[tuple[Run, Run], tuple[Run, Run]]:
    """Ours against a loop over the experts, and the layer against transformers' fastest."""
    d, f, e, k = 256, 128, 64, 6
    layer = MixtureOfExperts(
        hidden_size=d, intermediate_size=f, num_experts=e, num_experts_per_tok=k
    )
    x, stacks = torch.randn(1, 64, d), list(layer.experts.parameters())
    weights, chosen = top_k_routing(layer.gate(x[0]).detach(), k)

    def loop() -> Tensor:
        y = torch.zeros_like(x[0])
        for number, (gate, up, down) in enumerate(zip(*stacks, strict=True)):
            token, choice = torch.where(chosen == number)
            if len(token):
                rows = x[0, token]
                out = F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
                y.index_add_(0, token, out * weights[token, choice, None])
        return y

    sizes = {"hidden_size": d, "intermediate_size": f, "num_local_experts": e}
    theirs = MixtralConfig(num_experts_per_tok=k, **sizes)
    theirs._experts_implementation = "grouped_mm"
    block = mixtral.MixtralSparseMoeBlock(theirs)
    gate, up, down = stacks
    block.load_state_dict(
        {
            "gate.weight": layer.gate.weight,
            "experts.gate_up_proj": torch.cat((gate, up), dim=1),
            "experts.down_proj": down,
        }
    )
    return (
        (lambda: grouped_experts(x[0], weights, chosen, *stacks), loop),
        (lambda: layer(x), lambda: block(x)),
    )


def decode(layer: Callable, new_cache: Callable, tables: Callable) -> Fresh:
    """A prompt is read, not timed; then tokens come one by one."""
    drawn = torch.Generator().manual_seed(0)
    prompt = torch.randn(1, PROMPT, D, generator=drawn)
    texts = torch.randn(NEW, 1, 1, D, generator=drawn)
    first = tables(torch.arange(PROMPT))
    later = [tables(torch.arange(PROMPT + n, PROMPT + n + 1)) for n in range(NEW)]

    def read_prompt() -> Run:
        cache = new_cache()
        layer(prompt, first, cache)
        return lambda: torch.cat([layer(x, r, cache) for x, r in zip(texts, later, strict=True)])

    return Fresh(read_prompt)


def prepared(run: Run | Fresh) -> Run:
    return run.prepare() if isinstance(run, Fresh) else run


def seconds(run: Run | Fresh, repeats: int) -> float:
    ready = prepared(run)
    began = time.perf_counter()
    for _ in range(1 if isinstance(run, Fresh) else repeats):
        ready()
    return time.perf_counter() - began


@torch.no_grad()
def ratio(pair: Pair, rounds: int) -> float:
    """The median over interleaved rounds of our time by theirs.

    Raises:
        AssertionError: the two give different results.
    """
    ours, theirs = pair.ours, pair.theirs
    torch.testing.assert_close(prepared(ours)(), prepared(theirs)(), rtol=1e-3, atol=1e-4)
    repeats = max(1, round(0.1 / seconds(theirs, 1)))
    ratios = []
    for number in range(rounds):
        order = (ours, theirs) if number % 2 else (theirs, ours)
        took = {id(run): seconds(run, repeats) for run in order}
        ratios.append(took[id(ours)] / took[id(theirs)])
    return statistics.median(ratios)
