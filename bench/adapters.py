"""A training step of a LoRA model against peft's, on the same model: SmolLM2 as `Llama` here.

Both adapt all linear layers but the head, from the same random A and B, and take the same tokens.
The memory is the most that tensors made in one step take, weights and earlier state apart.
"""

import copy
from functools import partial
from pathlib import Path

import peft
import torch
from torch import nn

from snippets.common.adapt import adapt
from snippets.common.memory import peak_bytes
from snippets.models.llama import Llama
from snippets.peft.lora import LoRA

from .models import trained
from .modules import AT_MOST, Fresh, Pair

SMOLLM2 = Path("build/weights/smollm2")
R, ALPHA, T = 8, 16, 128


def steps() -> Pair:
    torch.manual_seed(0)
    ours = Llama.from_pretrained(SMOLLM2, dtype=torch.float32)
    theirs = copy.deepcopy(ours)
    layers = adapt(ours, "all-linear", partial(LoRA, r=R, lora_alpha=ALPHA))
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(layers), bias="none")
    theirs = peft.inject_adapter_in_model(config, theirs)
    with torch.no_grad():
        for name, layer in layers.items():
            other = theirs.get_submodule(name)
            nn.init.normal_(layer.lora_B.weight, std=0.01)
            other.lora_A["default"].weight.copy_(layer.lora_A.weight)
            other.lora_B["default"].weight.copy_(layer.lora_B.weight)
    ids = torch.randint(3, 49152, (2, T))
    return Pair(
        "LoRA on all layers of SmolLM2, training step",
        f"peft {peft.__version__}",
        AT_MOST,
        *(trained(model, ids) for model in (ours, theirs)),
    )


def peaks(pair: Pair) -> tuple[int, int]:
    """Bytes at most alive in one step, ours and theirs."""

    def peak(run: Fresh) -> int:
        return peak_bytes(run.prepare())

    return peak(pair.ours), peak(pair.theirs)
