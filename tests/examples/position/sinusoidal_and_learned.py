import torch


def calls(m):
    positions, mask = torch.arange(300, 307).expand(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    omega, other = m.frequencies(hidden_size=6), m.stretched_frequencies(hidden_size=6, base=50)
    table = m.LearnedPositions(max_positions=12, hidden_size=6, offset=2)
    return [
        (m.sinusoids, positions, omega),
        (m.sinusoids_in_halves, positions, other),
        (lambda: m.shift_map(m.frequencies(hidden_size=6), 3),),
        (table, torch.arange(-1, 12)),
        (lambda mask: table(m.token_positions(mask)), mask),
    ]
