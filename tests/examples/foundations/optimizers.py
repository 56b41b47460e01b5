import torch


def calls(m):
    p, gradients = torch.randn(5, 3), torch.randn(4, 5, 3)

    def run(rule, **settings):
        def steps(p, gradients):
            state = {}
            for g in gradients:
                p = rule(p, g, state, 0.1, **settings)
            return p

        return steps, p, gradients

    return [
        run(m.sgd, momentum=0.9, nesterov=True, weight_decay=0.1),
        run(m.adam, weight_decay=0.1),
        run(m.adamw),
        run(m.muon),
        run(m.muon, adjust_lr="match_rms_adamw", nesterov=False),
        (m.orthogonalize, gradients[0]),
    ]
