import torch


def calls(m):
    sizes = {"vocab_size": 101, "n_positions": 20, "n_embd": 48, "n_layer": 2, "n_head": 6}
    ids, mask = torch.randint(101, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    model = m.GPT2(m.GPT2Config(**sizes))
    other = m.GPT2(m.GPT2Config(**sizes, tie_word_embeddings=False, n_inner=70))
    return [(model, ids), (model, ids, mask), (other, ids)]
