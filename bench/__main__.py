"""Ours against its peers: `python -m bench [PART]`, engine, modules, models, multimodal, adapters.
Only when asked for: `python -m bench lighthouse`, scores of the built site.

All runs of one comparison are interleaved, and what is printed are ratios of medians: on a
noisy machine seconds mean little. The engine builds generated sites, whose pages hold six prose
and six code cells and one figure, and import torch, matplotlib and a small local package. The
other parts do the work of their counterparts in transformers, torch or peft.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from .measure import Cold, build, memory, page_size, serve_edits
from .sites import make_site


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parts = {"engine": engine, "modules": modules, "models": models}
    parts |= {"multimodal": multimodal, "adapters": adapters}
    asked = {"lighthouse": lighthouse}  # wants npm
    parser.add_argument(
        "part", nargs="?", choices=parts | asked, help="default: all but lighthouse"
    )
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    arguments = parser.parse_args()
    for part in [arguments.part] if arguments.part else parts:
        (parts | asked)[part](arguments.rounds)


def modules(rounds: int) -> None:
    # Imports torch, which the engine's peers shouldn't inherit.
    from .modules import growth, pairs, ratio

    for pair in pairs():
        tell(f"{pair.name}, against {pair.peer}", ratio(pair, max(9, rounds)), pair.bound)
    for name, factor in growth():
        bound = 2.05 if name == "flash" else None
        tell(f"growth of peak memory when the text doubles, {name}", factor, bound)


def models(rounds: int) -> None:
    from .models import pairs, share_of_floor, writing
    from .modules import ratio

    pair, floor = writing()
    tell(f"{pair.name}, against {pair.peer}", ratio(pair, max(5, rounds)), pair.bound)
    tell("of our time, reading the weights once a token", share_of_floor(pair, floor, 3))
    for pair in pairs():
        tell(f"{pair.name}, against {pair.peer}", ratio(pair, max(5, rounds)))


def adapters(rounds: int) -> None:
    from .adapters import peaks, steps
    from .modules import ratio

    pair = steps()
    tell(f"{pair.name}, against {pair.peer}", ratio(pair, max(9, rounds)), pair.bound)
    ours, theirs = peaks(pair)
    print(f"   (peak memory of a step: ours {ours / 1e6:.0f} MB, peft {theirs / 1e6:.0f} MB)")
    tell("peak memory of that step, against peft's", ours / theirs)


def multimodal(rounds: int) -> None:
    from .modules import ratio
    from .multimodal import pairs

    for pair in pairs():
        tell(f"{pair.name}, against {pair.peer}", ratio(pair, max(5, rounds)))


def lighthouse(rounds: int) -> None:
    from .lighthouse import WANTED, scores

    for page, found, wanting in scores(rounds):
        print(page)
        for name, score in found.items():
            verdict = "" if score >= WANTED[name] else f"  (at least {WANTED[name]}: NO)"
            print(f"   {name} {score:.0f}{verdict}", flush=True)
        print("\n".join(f"   {line}" for line in wanting))


def engine(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        root = Path(folder)
        for pages, bounds in ((8, (None, None)), (32, (0.08, 0.9))):
            peers = ("forward-pass", "mkdocs-jupyter", "markdown-exec")
            sites = {peer: make_site(root / f"{peer}-{pages}", peer, pages) for peer in peers}
            times = interleaved({peer: Cold(site) for peer, site in sites.items()}, rounds)
            ours = times["forward-pass"]
            print(f"   ({', '.join(f'{peer} {t:.1f} s' for peer, t in times.items())})")
            for peer, bound in zip(peers[1:], bounds, strict=True):
                tell(f"cold, {pages} pages, against {peer}", ours / times[peer], bound)

        small, large = (make_site(root / f"own-{n}", "forward-pass", n) for n in (32, 128))
        times = interleaved({32: Cold(small), 128: Cold(large)}, rounds)
        tell("cold, 128 pages against 32", times[128] / times[32], 4.3)

        bare = make_site(root / "bare", "none", 0)
        (bare / "docs").symlink_to(small / "build/pages")
        runs = {"ours": lambda: build(small), "bare": lambda: build(bare)}
        times = interleaved(runs, max(5, rounds))
        tell("no change, 32 pages, against MkDocs alone", times["ours"] / times["bare"], 1.15)

        edits = interleaved_edits(small, bare)
        tell("a code edit under serve, seconds above MkDocs alone", edits, 0.4)
        tell("peak memory with 2 workers, summed PSS in MB", memory(small), 450)
        tell("HTML of a notebook page, KB", page_size(small) / 1000, 60)


def interleaved(runs: dict, rounds: int) -> dict:
    """The median seconds of each, over rounds that run all of them in turn."""
    times: dict = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            times[name].append(run())
            print(f"   round {number + 1}: {name} {times[name][-1]:.2f} s", flush=True)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def interleaved_edits(ours: Path, bare: Path) -> float:
    with serve_edits(ours, "*.ipynb") as edit_ours, serve_edits(bare, "*.md") as edit_bare:
        differences = [edit_ours() - edit_bare() for _ in range(9)]
    return statistics.median(differences)


def tell(what: str, value: float, bound: float | None = None) -> None:
    verdict = "" if bound is None else f"  (at most {bound}: {'yes' if value <= bound else 'NO'})"
    print(f"{what}: {value:.3g}{verdict}", flush=True)


if __name__ == "__main__":
    main()
