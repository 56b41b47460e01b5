import torch


def calls(m):
    def quantize(weight, x, act_order):
        options = {"bits": 4, "group_size": 6, "block_size": 4}
        found = m.gptq(weight, m.hessian(x), **options, act_order=act_order)
        return found.values(), found.step, m.layer_error(weight, found.values(), m.hessian(x))

    weight, x = torch.randn(5, 12), torch.randn(40, 12) @ torch.randn(12, 12)
    found = m.gptq(weight, m.hessian(x), bits=4, group_size=6, act_order=True)
    return [
        (m.GPTQLinear(found, bits=4, bias=torch.randn(5)), torch.randn(2, 3, 12)),
        (lambda w, x: quantize(w, x, False), weight, x),
        (lambda w, x: quantize(w, x, True), weight, x),
        (lambda w: m.rtn(w, bits=3, symmetric=True).values(), weight),
    ]
