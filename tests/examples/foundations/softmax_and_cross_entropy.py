import torch


def calls(m):
    logits, other = torch.randn(2, 5, 11), torch.randn(2, 5, 3)
    labels = torch.randint(0, 11, (2, 5))
    labels[1, 3:] = -100

    def smoothed(logits, labels, weight):
        return m.cross_entropy(logits, labels, weight=weight, label_smoothing=0.1, z_loss=1e-2)

    return [
        (m.softmax, logits, 0.7),
        (m.online_softmax, logits, 4),
        (m.logsumexp, logits),
        (lambda a, b: m.merge(m.summary(a), m.summary(b)), logits, other),
        (smoothed, logits, labels, torch.rand(11)),
        (m.cross_entropy_gradient, logits, labels),
    ]
