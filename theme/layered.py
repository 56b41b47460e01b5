"""A layered drawing of a graph: nodes in rows, every edge leading down, few crossings.

An edge over several rows gets a point in each row between. Edges of one node share these points
as long as they go the same way, so that they look like one trunk with branches.
"""

from dataclasses import dataclass, field

ROUNDS = 12  # sweeps down and up, each placing a row's nodes near those they are joined to
GAP = 18  # between two boxes
NARROW = 10  # between a line and its neighbour


@dataclass
class Spot:
    """A node's place, or a point where the edges of a node cross a row."""

    row: int
    width: float  # 0 of a point
    x: float = 0.0  # of its middle
    near: list["Spot"] = field(default_factory=list)  # in the rows above and below


def place(
    rows: list[list[str]], edges: list[tuple[str, str]], widths: dict[str, float], across: float
) -> dict[tuple[str, int], Spot]:
    """Spots by node and row; under a node's own row its box, in later ones its edges' points.

    Edges lead from a row to one further down.
    """
    at = {node: number for number, row in enumerate(rows) for node in row}
    spots = {(node, at[node]): Spot(at[node], widths[node]) for row in rows for node in row}
    for source, target in edges:
        above = spots[source, at[source]]
        for row in range(at[source] + 1, at[target]):
            point = spots.setdefault((source, row), Spot(row, 0))
            join(above, point)
            above = point
        join(above, spots[target, at[target]])
    levels = [[spot for spot in spots.values() if spot.row == n] for n in range(len(rows))]
    for level in levels:
        for number, spot in enumerate(level):
            spot.x = across * (number + 1) / (len(level) + 1)
    for number in range(ROUNDS):
        side = -1 if number % 2 == 0 else 1  # look up while going down, down while going up
        both = number >= ROUNDS - 2
        for level in levels if side < 0 else reversed(levels):
            for spot in level:
                joined = [s.x for s in spot.near if both or s.row == spot.row + side]
                spot.x = sum(joined) / len(joined) if joined else spot.x
            spread(sorted(level, key=lambda spot: spot.x), across)
    return spots


def join(above: Spot, below: Spot) -> None:
    if below not in above.near:
        above.near.append(below)
        below.near.append(above)


def spread(row: list[Spot], across: float) -> None:
    """Move spots apart, as little as can be, between 0 and `across`.

    In the order given, with their least distances taken out, what is wanted is a rising sequence:
    neighbours that break it are pooled, and each pool takes its mean.
    """
    offsets, offset = [], 0.0
    for left, right in zip([None, *row], row, strict=False):
        if left is not None:
            offset += apart(left, right)
        offsets.append(offset)
    pools: list[list[float]] = []  # sum and number of what its members want
    for spot, offset in zip(row, offsets, strict=True):
        pools.append([spot.x - offset, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    wanted = [total / count for total, count in pools for _ in range(int(count))]
    if row:
        first, last = row[0].width / 2, across - row[-1].width / 2 - offsets[-1]
        for spot, x, offset in zip(row, wanted, offsets, strict=True):
            spot.x = max(first, min(x, last)) + offset


def apart(left: Spot, right: Spot) -> float:
    """The least distance of two middles."""
    return (left.width + right.width) / 2 + (GAP if left.width and right.width else NARROW)


def line(
    source: str, target: str, spots: dict[tuple[str, int], Spot], tops: list[float], height: float
) -> str:
    """An SVG path from the source's box down to the target's, straight through rows between."""
    start = next(row for node, row in spots if node == source)
    end = next(row for node, row in spots if node == target)
    x, y = spots[source, start].x, tops[start] + height
    steps = [f"M{x:.0f} {y:.0f}"]
    for row in range(start + 1, end + 1):
        spot = spots[(source if row < end else target), row]
        middle = (y + tops[row]) / 2
        steps.append(
            f"C{x:.0f} {middle:.0f} {spot.x:.0f} {middle:.0f} {spot.x:.0f} {tops[row]:.0f}"
        )
        x, y = spot.x, tops[row] + height
        if row < end:
            steps.append(f"V{y:.0f}")
    return "".join(steps)
