import torch


# `m.matmul` for `@`: torch.compile does not trace that operator of other classes.
def calls(m):
    x, w, bias, v = torch.randn(4, 6), torch.randn(6, 5), torch.randn(5), torch.randn(5, 7)
    labels = torch.tensor([0, 6, -100, 3])

    def gradients(x, w, bias, v):
        leaves = [m.leaf(value) for value in (x, w, bias, v)]
        x, w, bias, v = leaves
        hidden = m.relu(m.matmul(x, w) + bias)
        loss = m.cross_entropy_loss(m.matmul(m.softmax_rows(hidden), v) * 2.0 - 1.0, labels)
        loss.backward()
        return [value.grad for value in leaves]

    def saving(x, w, v):
        leaves = [m.leaf(value) for value in (x, w, v)]
        y = m.checkpoint(lambda x, w: m.tanh(m.matmul(x, w)), *leaves[:2])
        m.total(m.exp(m.matmul(y, leaves[2])) ** 0.5, -1).backward(torch.ones_like(x[:, 0]))
        return [value.grad for value in leaves]

    return [(gradients, x, w, bias, v), (saving, x, w, v)]
