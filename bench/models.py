"""Models against transformers: same checkpoint folder, same tokens, interleaved.

SmolLM2 writes text; its floor is what reading all weight matrices once for each token takes, as
products with a vector, by the kernel that `generate` has. Prefill and a training step are timed
for each model of `MODELS`, at sizes where the matrices dominate, and printed without a bound.
"""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from snippets.common.generate import generate
from snippets.common.onednn import product
from snippets.models.deepseek_v2 import DeepseekV2
from snippets.models.deepseek_v3 import DeepseekV3
from snippets.models.gemma3 import Gemma3
from snippets.models.gpt2 import GPT2
from snippets.models.llama import Llama
from snippets.models.mistral import Mistral
from snippets.models.mixtral import Mixtral
from snippets.models.qwen import Qwen2, Qwen3, Qwen3Moe

from .modules import Fresh, Pair, Run, seconds

SMOLLM2 = Path("build/weights/smollm2")
PROMPT, NEW = 64, 64  # tokens
V, D, F_, T = 2048, 512, 1376, 256  # vocabulary, hidden size, of the network, tokens
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F_,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts_per_tok": 2, "num_hidden_layers": 2}
LATENT = SIZES | EXPERTS | {
    "num_key_value_heads": 8,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": F_ // 4,
    "first_k_dense_replace": 1,
}  # fmt: skip
del LATENT["head_dim"]
GPT2_SIZES = {"vocab_size": V, "n_embd": D, "n_layer": 4, "n_head": 8, "n_positions": 512}
GPT2_SIZES |= {"bos_token_id": None, "eos_token_id": None}  # else beyond V
MODELS = {
    "gpt2": (GPT2, transformers.GPT2LMHeadModel, GPT2_SIZES),
    "llama": (Llama, transformers.LlamaForCausalLM, SIZES),
    "mistral": (Mistral, transformers.MistralForCausalLM, SIZES | {"sliding_window": 64}),
    "mixtral": (Mixtral, transformers.MixtralForCausalLM, SIZES | EXPERTS),
    "qwen2": (Qwen2, transformers.Qwen2ForCausalLM, SIZES),
    "qwen3": (Qwen3, transformers.Qwen3ForCausalLM, SIZES),
    "qwen3_moe": (
        Qwen3Moe,
        transformers.Qwen3MoeForCausalLM,
        SIZES | EXPERTS | {"num_experts": 8, "moe_intermediate_size": F_ // 4},
    ),
    "gemma3": (Gemma3, transformers.Gemma3ForCausalLM, SIZES | {"sliding_window": 64}),
    "deepseek_v2": (
        DeepseekV2,
        transformers.DeepseekV2ForCausalLM,
        LATENT | {"topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": (DeepseekV3, transformers.DeepseekV3ForCausalLM, LATENT),
}


def writing() -> tuple[Pair, Run]:
    """SmolLM2 through `generate` and through transformers', and its floor for as many tokens."""
    ours = Llama.from_pretrained(SMOLLM2, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    ids = torch.randint(3, 49152, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    ends = {"eos_token_id": None, "pad_token_id": 0}  # both write all tokens
    matrices = [w for w in ours.parameters() if w.ndim == 2]

    @torch.no_grad()
    def floor() -> Tensor:
        vectors = {w.shape[1]: torch.randn(1, w.shape[1]) for w in matrices}
        for _ in range(NEW):
            for weight in matrices:
                y = product(vectors[weight.shape[1]], weight)
        return y

    return Pair(
        "SmolLM2 writes, greedy",
        "transformers' generate",
        1 / 1.25,
        lambda: generate(ours, ids, max_new_tokens=NEW),
        lambda: theirs.generate(ids, max_new_tokens=NEW, do_sample=False, **ends),
    ), floor


def pairs() -> Iterator[Pair]:
    for name, (ours_class, theirs_class, sizes) in MODELS.items():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            theirs_class(theirs_class.config_class(**sizes)).save_pretrained(folder)
            ours = ours_class.from_pretrained(folder)
            theirs = theirs_class.from_pretrained(folder)
        ids = torch.randint(3, V, (2, T))
        prefill = (prefilled(ours, ids), prefilled(theirs, ids))
        yield Pair(f"{name}, prefill", "transformers", None, *prefill)
        step = (trained(ours, ids), trained(theirs, ids))
        yield Pair(f"{name}, training step", "transformers", None, *step)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    found = model(input_ids=ids)
    return found if isinstance(found, Tensor) else found.logits


def prefilled(model: nn.Module, ids: Tensor) -> Run:
    @torch.no_grad()
    def run() -> Tensor:
        return logits(model, ids)

    return run


def trained(model: nn.Module, ids: Tensor) -> Fresh:
    """Forward, backward and a step of AdamW; the loss is given back."""

    def prepare() -> Run:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # the same work each round

        @torch.enable_grad()
        def step() -> Tensor:
            loss = F.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    return Fresh(prepare)


def share_of_floor(pair: Pair, floor: Run, rounds: int) -> float:
    """The floor's time by ours, the median over rounds that run one after the other."""
    shares = []
    for _ in range(rounds):
        least = seconds(floor, 1)
        shares.append(least / seconds(pair.ours, 1))
    return statistics.median(shares)
