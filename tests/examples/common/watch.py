import torch


def calls(m):
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    x, y = torch.randn(2, 7, 4), torch.randn(2, 7, 4)

    def seen(x):
        return list(m.watch(model, {"first": "0", "last": "2"}, input=x).values())

    return [
        (seen, torch.randn(2, 7, 5)),
        (lambda x, y: m.relative_errors({"a": x, "b": y}, {"a": y, "b": x}), x, y),
        (lambda x, y: m.first_difference({"a": x, "b": y}, {"a": x, "b": x}), x, y),
    ]
