import torch


def calls(m):
    linear = torch.nn.Linear(70, 30)
    double = m.NF4Linear(linear)
    single = m.NF4Linear(linear, double_quantization=False, block_size=32)
    weight = torch.randn(30, 70)
    packed, absmax = m.quantize_4bit(weight)

    def round_trip(scales):
        return m.dequantize_4bit(packed, scales, shape=(30, 70))

    def double_trip(scales):
        return m.dequantize_scales(*m.quantize_scales(scales.float()))

    return [
        (double, torch.randn(2, 5, 70)),
        (single, torch.randn(3, 70)),
        (m.quantize_4bit, weight),
        (round_trip, absmax),
        (double_trip, absmax),
        (m.normal_float,),
        (m.dynamic_map,),
    ]
