"""What the calculators say of every model of the site, for readers without JavaScript."""

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from snippets.common.model_shape import ModelShape
from snippets.reference.calculators import kv_cache, parameters
from snippets.reference.roofline import roofline
from snippets.reference.training_memory import training_memory
from theme.tables import boxed


@dataclass(frozen=True)
class Preset:
    name: str
    page: str
    shape: ModelShape


def gib(count: float) -> str:
    return f"{count / 2**30:,.2f}" if count < 100 * 2**30 else f"{count / 2**30:,.0f}"


def cache_table(models: list[Preset], chips: list[dict]) -> list[list[str]]:
    """What a text of these lengths keeps, in 16 bits."""
    lengths = (8192, 32768, 131072)
    rows = [["Model", "GiB at 8,192 tokens", "32,768", "131,072", "KiB for the next token"]]
    for m in models:
        found = [kv_cache(m.shape, context=n, batch=1, bits=16) for n in lengths]
        more = f"{found[0]['one more token'] / 1024:,.1f}"
        rows.append([m.name, *(gib(f["bytes"]) for f in found), more])
    return rows


def parameters_table(models: list[Preset], chips: list[dict]) -> list[list[str]]:
    rows = [["Model", "Parameters", "A token uses", "GB in 16 bits", "GB in 4 bits"]]
    for m in models:
        found = parameters(m.shape)
        total = found["total"]
        counts = [f"{found[key]:,}" for key in ("total", "active")]
        rows.append([m.name, *counts, f"{total * 2 / 1e9:,.1f}", f"{total / 2 / 1e9:,.1f}"])
    return rows


def training_table(models: list[Preset], chips: list[dict]) -> list[list[str]]:
    about: dict[str, Any] = dict(
        precision="mixed", optimizer="AdamW", context=4096, batch=1, kept="no scores",
        dropout=False, rank=16, targets="all matrices",
    )  # fmt: skip
    rows = [["Model", "Full, GiB", "LoRA, GiB", "QLoRA, GiB", "of it activations and logits"]]
    for m in models:
        found = [training_memory(m.shape, method=k, **about) for k in ("full", "LoRA", "QLoRA")]
        held = found[0]["activations"] + found[0]["logits"]
        rows.append([m.name, *(gib(f["total"]) for f in found), gib(held)])
    return rows


def speed_table(models: list[Preset], chips: list[dict]) -> list[list[str]]:
    """On the first chip of 80 GB of the newest kind: as many as hold the weights."""
    chip = next(c for c in chips if "H100" in c["name"])
    rows = [["Model", f"{chip['name']}s", "Prompt of 2,048 tokens, ms", "Tokens a second",
             "Tokens a second, 64 texts"]]  # fmt: skip
    for m in models:
        count = -(-2 * parameters(m.shape)["total"] // chip["memory"])
        about = dict(weight_bits=16, cache_bits=16, chips=count,
                     peak=chip["peak"], bandwidth=chip["bandwidth"])  # fmt: skip
        first = roofline(m.shape, new=2048, past=0, batch=1, **about)["seconds"]
        rates = [b / roofline(m.shape, new=1, past=2048, batch=b, **about)["seconds"]
                 for b in (1, 64)]  # fmt: skip
        rows.append([m.name, str(count), f"{1000 * first:,.1f}", *(f"{r:,.0f}" for r in rates)])
    return rows


TABLES: dict[str, Callable] = {
    "cache_table": cache_table,
    "parameters_table": parameters_table,
    "training_table": training_table,
    "speed_table": speed_table,
}


def table(rows: list[list[str]], links: dict[str, str]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    lines = []
    for name, *cells in rows[1:]:
        numbers = "".join(f'<td style="text-align: right">{cell}</td>' for cell in cells)
        lines.append(f'<tr><td><a href="{links[name]}">{html.escape(name)}</a></td>{numbers}</tr>')
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return boxed(f"<table>{body}</table>")
