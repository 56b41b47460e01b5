import torch
from torch import nn


def calls(m):
    layers = [nn.Linear(12, 20), nn.Linear(20, 9)]
    shared = m.SharedProjections(layers, r=3, projection_prng_key=5)
    made = [m.VeRA(layer, projections=shared, d_initial=0.4) for layer in layers]
    for layer in made:
        nn.init.normal_(layer.vera_lambda_b)
    return [(layer, torch.randn(2, 5, layer.in_features)) for layer in made]
