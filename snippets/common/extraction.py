"""A task to fine-tune on: one sentence about a person in, JSON out.

Sentences are drawn from a seed; names, cities and jobs of the held-out ones stand in no training
sentence. A base model reads such sentences well and doesn't know which form is wanted: that, and
when to stop, is all there is to learn.

Axes: b pair of text and answer, t token, v vocabulary.
"""

import json
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

FORMS = (
    "{name}, {age}, works as a {job} in {city}.",
    "In {city} lives {name}, a {job} of {age}.",
    "{name} is {age} years old and moved to {city} as a {job}.",
    "The {job} {name} from {city} has just turned {age}.",
)
SEEN = {  # many names, or else the likeliest of them is learned in place of copying
    "first": "Ada Alice Ana Anton Ben Boris Chloe Clara Dan David Dora Edgar Emma Ethan Eva Felix "
    "Gary George Grace Hannah Henry Hugo Ida Igor Iris Jack James Jonas Karen Kate Lena Leo Lily "
    "Louis Lucy Maria Mark Max Mia Noah Nora Olga Oliver Otto Paul Pia Quinn Rita Robert Ruth Sam "
    "Sara Simon Sofia Tina Tom Ursula Vera Victor Walter Wendy Yusuf Zoe",
    "last": "Adams Bailey Baker Bauer Bell Carter Castro Chen Cooper Costa Cruz Davis Dixon Evans "
    "Fischer Fox Garcia Gupta Hall Hansen Hill Hughes Ito Jones Kelly Keller Khan Klein Lee Lopez "
    "Meyer Morris Murphy Novak Ortiz Park Perez Price Reed Rivera Ross Santos Silva Singh Smith "
    "Stone Tanaka Turner Walker Ward Weber White Young Zhang",
    "city": "Athens Austin Bangkok Berlin Bristol Brussels Cairo Dallas Delhi Dublin Florence "
    "Glasgow Hamburg Hanoi Houston Kyoto Lagos Lima London Lyon Madrid Manila Miami Nairobi Naples "
    "Oslo Oxford Paris Perth Phoenix Quebec Rome Seattle Seoul Seville Tokyo Toronto Turin Vienna "
    "Warsaw Zurich",
    "job": "baker carpenter chemist doctor farmer lawyer nurse painter pilot teacher",
}
HELD_OUT = {
    "first": "Amir Bella Carl Diana Frank Helen Ivan Julia Kevin Laura Martin Nina Oscar Peter",
    "last": "Allen Brown Clark Duval Ferrari Green Hoffman Kumar Lewis Moreau Nguyen Olsen Rossi",
    "city": "Boston Chicago Denver Geneva Havana Lisbon Milan Moscow Munich Prague Sydney",
    "job": "butcher cook dentist driver plumber singer tailor waiter",
}
IGNORED = -100  # the label of a token that isn't learned, as cross_entropy has it


def sentences(count: int, *, seed: int, held_out: bool = False) -> list[tuple[str, str]]:
    """Prompts with their answers: a sentence and a line break; a JSON object of three keys.

    Args:
        count: how many; the same seed gives the same, and a smaller count their beginning.
        seed: of the draws.
        held_out: of names, cities and jobs that no sentence without this has.
    """
    draw = random.Random(seed)
    words = {kind: found.split() for kind, found in (HELD_OUT if held_out else SEEN).items()}
    pairs = []
    for _ in range(count):
        one = {kind: draw.choice(found) for kind, found in words.items()}
        name, age = f"{one['first']} {one['last']}", draw.randint(20, 79)
        text = draw.choice(FORMS).format(name=name, age=age, job=one["job"], city=one["city"])
        answer = json.dumps({"name": name, "age": age, "city": one["city"]})
        pairs.append((text + "\n", answer))
    return pairs


def encode(
    pairs: Sequence[tuple[str, str]], tokenizer: Any
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Token ids, padded on the right with the end token, and labels.

    A label is the id where a token of the answer or its end stands, `IGNORED` on the prompt and
    the padding. Nothing is shifted: token t is predicted by the logits at t - 1. A causal model
    needs no mask for padding on the right. The tokenizer is transformers'.

    Raises:
        ValueError: there are no pairs.
    """
    if not pairs:
        raise ValueError("nothing to encode: 0 pairs")
    rows, end = [], tokenizer.eos_token_id
    for prompt, answer in pairs:
        ids, learned = tokenizer.encode(prompt), [*tokenizer.encode(answer), end]
        rows.append((ids + learned, [IGNORED] * len(ids) + learned))
    longest = max(len(ids) for ids, _ in rows)
    ids = [ids + [end] * (longest - len(ids)) for ids, _ in rows]
    labels = [labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]
    return torch.tensor(ids), torch.tensor(labels)


def answer_loss(logits: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the answers' tokens, those of all rows counting alike."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def exact_match(logits: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"]) -> float:
    """The share of answers that greedy decoding would give whole, end token included.

    One pass over prompts *with* answers tells: greedy decoding gives the answer exactly when each
    of its tokens is the most probable one behind those before it, and up to a first mistake
    these are the same.
    """
    wanted, given = labels[:, 1:], logits[:, :-1].argmax(-1)  # b t
    return ((given == wanted) | (wanted == IGNORED)).all(1).float().mean().item()


def read(text: str) -> dict | None:
    """What a model wrote, as the JSON object that it is, or None if it isn't one."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
