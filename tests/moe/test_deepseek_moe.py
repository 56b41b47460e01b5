"""DeepSeek's mixture of experts against transformers' V2 and V3 and loops over tokens.

No two of B T D W E K G M S are equal, and the groups are of 4. Rows are of whole 16 bytes, so
that the grouped form of the experts runs.
"""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from snippets.common.checkpoint import load_weights
from snippets.moe.deepseek_moe import (
    DeepseekMoE,
    DeepseekRouter,
    balanced_bias,
    expert_load,
    group_limited_top_k,
    max_violation,
)

B, T, D, W = 2, 9, 24, 40  # W: width of one expert
E, K, G, M, S = 20, 6, 5, 3, 4  # experts, choices, groups, groups of a token; S: size of one
ROUTING = {
    "greedy": {"scoring_func": "softmax", "topk_method": "greedy"},
    "V2": {"scoring_func": "softmax", "topk_method": "group_limited_greedy"},
    "V3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
}
SIZES = {
    "hidden_size": D,
    "moe_intermediate_size": W,
    "n_routed_experts": E,
    "num_experts_per_tok": K,
    "n_shared_experts": 2,
    "n_group": G,
    "topk_group": M,
    "routed_scaling_factor": 2.5,
}
METHODS = pytest.mark.parametrize("method", list(ROUTING))


def moe(method: str, **options) -> DeepseekMoE:
    """With weights at which activations bend, and a bias that decides, of either sign."""
    layer = DeepseekMoE(**{**SIZES, **ROUTING[method], **options})
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=1.5 / p.shape[-1] ** 0.5)
    if layer.gate.e_score_correction_bias is not None:
        layer.gate.e_score_correction_bias.copy_(0.6 * torch.randn(E) - 0.6)
    return layer


def config_of(method: str, **options):
    options = {"num_attention_heads": 4, **SIZES, **ROUTING[method], **options}
    kind = DeepseekV3Config if method == "V3" else DeepseekV2Config
    config = kind(**options)
    config._experts_implementation = "eager"
    return config


def theirs(method: str, ours: DeepseekMoE, **options):
    """The same weights in transformers' layer."""
    kind = DeepseekV3MoE if method == "V3" else DeepseekV2Moe
    layer = kind(config_of(method, **options))
    experts = ours.experts
    rest = {k: v for k, v in ours.state_dict().items() if not k.startswith("experts.")}
    packed = {
        "experts.gate_up_proj": torch.cat([experts.gate_proj, experts.up_proj], dim=1),
        "experts.down_proj": experts.down_proj,
    }
    layer.load_state_dict(rest | packed)
    return layer.to(ours.gate.weight.dtype)


# Against transformers


@METHODS
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_equals_transformers(method, act):
    ours, x = moe(method, hidden_act=act), torch.randn(B, T, D)
    reference = theirs(method, ours, hidden_act=act)
    assert_close(ours(x), reference(x))
    assert_close(ours(x[1, 3]), reference(x)[1, 3])  # also without batch and token axes
    _, weights, chosen = reference.gate(x)
    order = weights.argsort(dim=-1)
    found, taken = ours.gate(x.flatten(0, 1))
    mine = found.argsort(dim=-1)
    assert_close(found.gather(1, mine), weights.gather(1, order))
    assert torch.equal(taken.gather(1, mine), chosen.gather(1, order))


def test_equals_v3_where_it_does_not_divide():
    ours, x = moe("V3", norm_topk_prob=False), torch.randn(B, T, D)
    assert_close(ours(x), theirs("V3", ours, norm_topk_prob=False)(x))


@METHODS
def test_gradients_equal(method):
    ours, x, upstream = moe(method), torch.randn(B, T, D), torch.randn(B, T, D)
    reference = theirs(method, ours)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for layer, given in zip((ours, reference), inputs, strict=True):
        layer(given).backward(upstream)
    assert_close(inputs[0].grad, inputs[1].grad)
    assert_close(ours.gate.weight.grad, reference.gate.weight.grad)
    assert_close(ours.experts.down_proj.grad, reference.experts.down_proj.grad)
    shared = ours.shared_experts.up_proj.weight.grad
    assert_close(shared, reference.shared_experts.up_proj.weight.grad)


@pytest.mark.parametrize("method", ["V2", "V3"])
def test_loads_what_transformers_saves(method, tmp_path):
    kind = DeepseekV3ForCausalLM if method == "V3" else DeepseekV2ForCausalLM
    config = config_of(
        method,
        vocab_size=61,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
        initializer_range=0.3,
    )
    reference = kind(config).eval()
    block = reference.model.layers[1].mlp
    if method == "V3":
        block.gate.e_score_correction_bias.copy_(torch.randn(E))
    reference.save_pretrained(tmp_path)
    prefix = "model.layers.1.mlp."
    disk = load_file(tmp_path / "model.safetensors")
    disk = {k.removeprefix(prefix): v for k, v in disk.items() if k.startswith(prefix)}
    with torch.device("meta"):
        ours = DeepseekMoE(**SIZES, **ROUTING[method])
    load_weights(ours, disk, source=tmp_path)
    x = torch.randn(B, T, D)
    assert_close(ours(x), block(x))
    saved = ours.state_dict()
    assert saved.keys() == disk.keys()
    assert all(torch.equal(saved[name], disk[name]) for name in disk)


@METHODS
def test_bfloat16_equals_transformers(method):
    ours, x = moe(method).bfloat16(), torch.randn(B, T, D).bfloat16()
    reference = theirs(method, ours)
    if method == "V3":  # kept in float32 by from_pretrained
        reference.gate.e_score_correction_bias = ours.gate.e_score_correction_bias
    y, expected = ours(x), reference(x)
    assert y.dtype == torch.bfloat16
    # They add up in bfloat16, we in float32.
    assert_close(y, expected, rtol=2**-6, atol=0.06)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole(unchecked, method, dtype):
    layer, x = moe(method).to(dtype), torch.randn(B, T, D, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_close(compiled(x), layer(x))


# Against the papers' formulas, in loops


@METHODS
@pytest.mark.parametrize("norm", [True, False])
def test_equals_a_loop_over_tokens(method, norm):
    layer, x = moe(method, norm_topk_prob=norm), torch.randn(T, D)
    matrices = layer.state_dict()
    bias = matrices.get("gate.e_score_correction_bias", torch.zeros(E)).tolist()

    def network(name: str, row: torch.Tensor) -> torch.Tensor:
        gate, up, down = (matrices[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return down @ (F.silu(gate @ row) * (up @ row))

    expected = torch.stack([network("shared_experts", row) for row in x])
    for n, row in enumerate(x):
        logits = matrices["gate.weight"] @ row
        s = logits.sigmoid() if method == "V3" else logits.exp() / logits.exp().sum()
        by = [s[e].item() + bias[e] for e in range(E)]
        allowed = range(E)
        if method != "greedy":
            best = 2 if method == "V3" else 1

            def worth(g, by=by, best=best):
                return sum(sorted(by[g * S : (g + 1) * S])[-best:])

            groups = sorted(range(G), key=worth)[-M:]
            allowed = [e for e in range(E) if e // S in groups]
        chosen = sorted(allowed, key=lambda e, by=by: by[e])[-K:]
        total = s[chosen].sum() if norm else 1
        for e in chosen:
            expected[n] += 2.5 * s[e] / total * network(f"experts.{e}", row)
    assert_close(layer(x), expected)


# Routing


def test_groups_are_judged_by_their_best_experts():
    scores = torch.tensor([[0.9, 0.0, 0.1, 0.5, 0.6, 0.2, 0.3, 0.3]])  # groups of two
    sizes = {"n_group": 4, "topk_group": 2}
    assert group_limited_top_k(scores, 3, **sizes, best=1).tolist() == [[0, 4, 5]]
    scores[0, 1] = -0.2  # the first group: 0.7, behind the second's and third's 0.8 and 0.9
    scores[0, 2] = 0.3
    assert group_limited_top_k(scores, 3, **sizes, best=2).tolist() == [[4, 3, 2]]


def test_one_group_is_no_limit_and_nor_are_all():
    scores = torch.randn(T, E)
    free = scores.topk(K).indices
    for groups in (1, G):
        found = group_limited_top_k(scores, K, n_group=groups, topk_group=groups, best=2)
        assert torch.equal(found, free)


def test_no_choice_outside_the_groups_below_a_negative_bias():
    layer, x = moe("V3"), torch.randn(T, D)
    layer.gate.e_score_correction_bias.fill_(-5)
    _, chosen = layer.gate(x)
    assert all(len(set((row // S).tolist())) <= M for row in chosen)


def test_bias_changes_the_choice_and_not_the_weights():
    layer, x = moe("V3", norm_topk_prob=False, routed_scaling_factor=1.0), torch.randn(T, D)
    layer.gate.e_score_correction_bias.zero_()
    _, before = layer.gate(x)
    layer.gate.e_score_correction_bias[3] = 9.0
    weights, chosen = layer.gate(x)
    assert (chosen == 3).any(dim=-1).all() and not (before == 3).any(dim=-1).all()
    scores = (x @ layer.gate.weight.T).sigmoid()
    assert_close(weights, scores.gather(1, chosen))
    assert_close(layer.gate.scores(x), scores)
    layer.gate.e_score_correction_bias.fill_(9.0)  # the same for all: nothing
    assert torch.equal(layer.gate(x)[1].sort().values, before.sort().values)


def test_weights_survive_when_all_sigmoids_are_zero():
    layer = moe("V3")
    layer.gate.weight.data.fill_(-100)
    weights, _ = layer.gate(torch.ones(1, D))
    assert not weights.any()  # and no NaN


def test_routes_in_float32_and_keeps_the_bias_in_it():
    layer = moe("V3")
    bias = layer.gate.e_score_correction_bias.clone()
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        layer.to(dtype)
        assert layer.gate.weight.dtype == layer.experts.up_proj.dtype == dtype
        assert torch.equal(layer.gate.e_score_correction_bias, bias)
    layer.bfloat16()
    weights, _ = layer.gate(torch.randn(T, D).bfloat16())
    assert weights.dtype == torch.float32
    assert layer.to("meta").gate.e_score_correction_bias.is_meta
    assert layer.bfloat16().gate.e_score_correction_bias.dtype == torch.float32
    layer = layer.to_empty(device="cpu")
    assert layer.gate.e_score_correction_bias.device.type == "cpu"
    assert layer.gate.e_score_correction_bias.dtype == torch.float32
    assert "e_score_correction_bias" not in dict(layer.gate.named_parameters())


# Balance


def test_load_and_violation():
    chosen = torch.tensor([[0, 1], [0, 2], [0, 1]])
    load = expert_load(chosen, 4)
    assert_close(load, torch.tensor([3, 2, 1, 0]) / 1.5)
    assert_close(max_violation(load), torch.tensor(1.0))  # twice the even share
    assert_close(max_violation(torch.stack([load, 5 * torch.ones(4)])), torch.tensor([1.0, 0.0]))
    assert_close(max_violation(10 * load), torch.tensor(1.0))  # counts do as well


def test_bias_steps_against_the_load():
    bias = torch.tensor([1.0, 1.0, 1.0, 1.0])
    load = torch.tensor([3.0, 1.5, 1.5, 0.0])
    assert_close(balanced_bias(bias, load, rate=0.1), torch.tensor([0.9, 1.0, 1.0, 1.1]))
    assert_close(balanced_bias(bias, load), torch.tensor([0.999, 1.0, 1.0, 1.001]))
    assert torch.equal(bias, torch.ones(4))


def test_steps_even_out_a_skewed_router():
    torch.manual_seed(3)
    layer = moe("V3")
    layer.gate.e_score_correction_bias.zero_()
    x = torch.randn(600, D) + 0.7
    with torch.no_grad():
        first = max_violation(expert_load(layer.gate(x)[1], E))
        for _ in range(300):
            gate = layer.gate
            load = expert_load(gate(x)[1], E)
            gate.e_score_correction_bias.copy_(
                balanced_bias(gate.e_score_correction_bias, load, rate=0.01)
            )
    assert max_violation(load) < 0.2 < 1 < first


# Names, sizes and refusals


@METHODS
def test_names_and_shapes(method):
    shapes = {name: tuple(p.shape) for name, p in moe(method).state_dict().items()}
    expected = {"gate.weight": (E, D)}
    if method == "V3":
        expected["gate.e_score_correction_bias"] = (E,)
    networks = {f"experts.{e}": W for e in range(E)} | {"shared_experts": 2 * W}
    for name, width in networks.items():
        expected[f"{name}.gate_proj.weight"] = expected[f"{name}.up_proj.weight"] = (width, D)
        expected[f"{name}.down_proj.weight"] = (D, width)
    assert shapes == expected


def test_without_shared_experts():
    layer = DeepseekMoE(
        hidden_size=D, moe_intermediate_size=W, n_routed_experts=E, num_experts_per_tok=K
    )
    assert not any(name.startswith("shared") for name in layer.state_dict())
    x = torch.randn(B, T, D)
    rows = x.flatten(0, 1)
    scores = (rows @ layer.gate.weight.T).softmax(dim=-1)
    weights, chosen = scores.topk(K)  # greedy, not divided, not scaled
    assert_close(layer(x).flatten(0, 1), layer.experts(rows, weights, chosen))


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
@pytest.mark.parametrize("kind", [DeepseekRouter, DeepseekMoE])
def test_unless_told_otherwise_there_is_one_group_and_weights_are_scores(kind, method):
    sizes = {"hidden_size": D, "n_routed_experts": E - 1, "num_experts_per_tok": K}
    if kind is DeepseekMoE:
        sizes["moe_intermediate_size"] = W
    made = kind(**sizes, topk_method=method)
    router = made if kind is DeepseekRouter else made.gate
    x = torch.randn(T, D)
    expected = (x @ router.weight.T).softmax(dim=-1).topk(K)
    weights, chosen = router(x)
    assert_close(weights, expected.values)
    assert torch.equal(chosen, expected.indices)


def test_router_starts_like_a_linear_layer():
    layer = DeepseekRouter(hidden_size=64, n_routed_experts=50, num_experts_per_tok=2)
    assert 0.99 / 8 < layer.weight.max() <= 1 / 8
    assert 0.99 / 8 < -layer.weight.min() <= 1 / 8
    zero = DeepseekMoE(**SIZES, **ROUTING["V3"]).gate.e_score_correction_bias
    assert zero.dtype == torch.float32 and not zero.any()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"scoring_func": "tanh"}, r"scoring_func='tanh'; known: softmax, sigmoid$"),
        ({"topk_method": "gready"}, r"topk_method='gready'; known: greedy, group_limited_greedy, "),
        ({"n_group": 3}, r"20 experts don't make 3 equal groups"),
        ({"n_group": 0}, r"20 experts don't make 0 equal groups"),
        ({"topk_group": 0}, r"choose 0 of 5 groups"),
        ({"topk_group": 6}, r"choose 6 of 5 groups"),
        ({"num_experts_per_tok": 13}, r"choose 13 of 12 experts"),
        ({"num_experts_per_tok": 0}, r"choose 0 of 12 experts"),
        ({"n_group": 20, "topk_group": 20}, r"groups of 1 experts have no 2 best ones"),
        ({"n_shared_experts": -1}, r"n_shared_experts=-1"),
        ({"n_routed_experts": 0}, r"num_experts=0, hidden_size=24, intermediate_size=40"),
        ({"hidden_act": "gelu_new"}, r"hidden_act='gelu_new'"),
    ],
)
def test_refuses_what_does_not_fit(unchecked, options, said):
    with pytest.raises(ValueError, match=said):
        moe("V3", **options)


def test_takes_what_just_fits():
    moe("V3", topk_group=G, num_experts_per_tok=E)
    moe("V3", num_experts_per_tok=12)
    alone = moe("V2", n_group=20, topk_group=20).gate  # groups of one expert
    x = torch.randn(T, D)
    assert torch.equal(alone(x)[1], alone.scores(x).topk(K).indices)
    moe("greedy", n_group=3, topk_group=9, num_experts_per_tok=E)
    with pytest.raises(ValueError, match="choose 21 of 20 experts"):
        moe("greedy", num_experts_per_tok=21)
    with pytest.raises(ValueError, match="groups of 4 experts have no 0 best ones"):
        group_limited_top_k(torch.randn(T, E), K, n_group=G, topk_group=M, best=0)


def test_loading_is_strict():
    layer, weights = moe("V3"), moe("V3").state_dict()
    for name in ("gate.e_score_correction_bias", "shared_experts.up_proj.weight"):
        lacking = {key: value for key, value in weights.items() if key != name}
        with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"'):
            layer.load_state_dict(lacking)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"gate.e_score_correction_bias"'):
        moe("V2").load_state_dict(weights)
