"""Mixtures of experts against Mixtral, Switch and loops over tokens.

No two of B T D W E K are equal; rows are of whole 16 bytes also in bfloat16, so that the
grouped form runs, except where its substitute is meant.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
    router_z_loss_func,
)

from snippets.layers.swiglu import ACTIVATIONS
from snippets.moe import mixture_of_experts as module
from snippets.moe.mixture_of_experts import (
    Experts,
    MixtureOfExperts,
    can_group,
    dense_experts,
    grouped_experts,
    load_balancing_loss,
    router_z_loss,
    top_k_routing,
    within_capacity,
)

B, T, D, W, E, K = 2, 7, 24, 40, 6, 3  # W: intermediate size, since F is torch's
SIZES = {"hidden_size": D, "intermediate_size": W, "num_experts": E, "num_experts_per_tok": K}


def filled(layer: torch.nn.Module) -> torch.nn.Module:
    """Weights of a size at which activations bend and the router is decided."""
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=1.5 / p.shape[-1] ** 0.5)
    return layer


def moe(**options) -> MixtureOfExperts:
    return filled(MixtureOfExperts(**{**SIZES, **options}))


def mixtral(ours: MixtureOfExperts, **options) -> MixtralSparseMoeBlock:
    """The same weights in transformers' block."""
    config = MixtralConfig(
        hidden_size=D, intermediate_size=W, num_local_experts=E, num_experts_per_tok=K, **options
    )
    config._experts_implementation = "eager"
    theirs = MixtralSparseMoeBlock(config)
    experts = ours.experts
    packed = {
        "gate.weight": ours.gate.weight,
        "experts.gate_up_proj": torch.cat([experts.gate_proj, experts.up_proj], dim=1),
        "experts.down_proj": experts.down_proj,
    }
    theirs.load_state_dict(packed)
    return theirs.to(ours.gate.weight.dtype)


def routed(n: int = B * T) -> tuple[torch.Tensor, ...]:
    """x, weights and choices of n tokens, one expert of which nobody chooses."""
    logits = torch.randn(n, E)
    logits[:, 2] = -9
    return torch.randn(n, D), *top_k_routing(logits, K)


def stacks(experts: Experts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return experts.gate_proj, experts.up_proj, experts.down_proj


# Against transformers


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_equals_mixtral(act):
    ours, x = moe(hidden_act=act), torch.randn(B, T, D)
    theirs = mixtral(ours, hidden_act=act)
    assert_close(ours(x), theirs(x))
    assert_close(ours(x[1, 3]), theirs(x)[1, 3])  # also without batch and token axes


def test_equals_qwen3_which_may_leave_out_the_division():
    config = Qwen3MoeConfig(
        hidden_size=D,
        moe_intermediate_size=W,
        num_experts=E,
        num_experts_per_tok=K,
        norm_topk_prob=False,
    )
    config._experts_implementation = "eager"
    names = ("gate_proj", "up_proj", "down_proj")
    ours, theirs = moe(norm_topk_prob=False, names=names), Qwen3MoeSparseMoeBlock(config)
    theirs.load_state_dict(mixtral(ours).state_dict())
    assert "experts.5.up_proj.weight" in ours.state_dict()
    x = torch.randn(B, T, D)
    assert_close(ours(x), theirs(x))


def test_gradients_equal_those_of_mixtral():
    ours, x, upstream = moe(), torch.randn(B, T, D), torch.randn(B, T, D)
    theirs = mixtral(ours)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for layer, given in zip((ours, theirs), inputs, strict=True):
        layer(given).backward(upstream)
    assert_close(inputs[0].grad, inputs[1].grad)
    assert_close(ours.gate.weight.grad, theirs.gate.weight.grad)
    halves = (ours.experts.gate_proj.grad, ours.experts.up_proj.grad)
    assert_close(torch.cat(halves, dim=1), theirs.experts.gate_up_proj.grad)
    assert_close(ours.experts.down_proj.grad, theirs.experts.down_proj.grad)


def test_loads_what_mixtral_saves_and_has_its_losses(tmp_path):
    config = MixtralConfig(
        vocab_size=61,
        hidden_size=D,
        intermediate_size=W,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=E,
        num_experts_per_tok=K,
        initializer_range=0.3,
        output_router_logits=True,
    )
    theirs = MixtralForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    prefix = "model.layers.1.block_sparse_moe."
    disk = load_file(tmp_path / "model.safetensors")
    disk = {k.removeprefix(prefix): v for k, v in disk.items() if k.startswith(prefix)}
    with torch.device("meta"):
        ours = MixtureOfExperts(**SIZES)
    ours.load_state_dict(disk, assign=True)
    x = torch.randn(B, T, D)
    assert_close(ours(x), theirs.model.layers[1].mlp(x))
    saved = ours.state_dict()
    assert saved.keys() == disk.keys() and not any(v.requires_grad for v in saved.values())
    assert all(torch.equal(saved[name], disk[name]) for name in disk)

    ids, mask = torch.randint(61, (B, T)), torch.ones(B, T, dtype=torch.long)
    mask[0, :3] = 0
    out = theirs(ids, attention_mask=mask, labels=ids)
    # transformers pools its layers, so two layers are one with twice the tokens.
    pooled = load_balancing_loss(torch.cat(out.router_logits), K, mask.flatten().repeat(2))
    assert_close(pooled, out.aux_loss)


@pytest.mark.parametrize("top_k", [1, 4])
def test_load_balancing_loss_equals_transformers(top_k):
    logits, mask = 2 * torch.randn(B * T, E), torch.ones(B * T, dtype=torch.bool)
    mask[3:8] = False
    expected = load_balancing_loss_func((logits,), E, top_k)
    assert_close(load_balancing_loss(logits, top_k), expected)
    expected = load_balancing_loss_func((logits,), E, top_k, mask)
    assert_close(load_balancing_loss(logits, top_k, mask), expected)
    assert_close(load_balancing_loss(logits[mask], top_k), expected)  # as if it weren't there


def test_z_loss_equals_transformers():
    logits, mask = 2 * torch.randn(B, T, E), torch.ones(B * T, dtype=torch.long)
    flat = logits.flatten(0, 1)
    assert_close(router_z_loss(flat), router_z_loss_func(logits))
    mask[3:8] = 0
    assert_close(router_z_loss(flat, mask), router_z_loss_func(flat[mask.bool()][None]))


@pytest.mark.parametrize("capacity", [1, 3])
def test_capacity_of_one_choice_equals_switch(capacity):
    config = SwitchTransformersConfig(d_model=D, num_experts=E, expert_capacity=capacity)
    router, x = SwitchTransformersTop1Router(config), torch.randn(1, 2 * T, D)
    taken, probability, logits = router(x)
    weights, chosen = top_k_routing(logits[0], 1, norm_topk_prob=False)
    kept = within_capacity(chosen, num_experts=E, capacity=capacity)
    assert torch.equal(kept[:, 0], taken[0].any(dim=-1))
    assert 0 < kept.sum() < len(kept)
    assert_close(weights, probability[0])


# Routing


def test_normalised_weights_are_the_softmax_of_the_chosen_logits():
    logits = torch.randn(B * T, E)
    weights, chosen = top_k_routing(logits, K)
    best = logits.topk(K)
    assert torch.equal(chosen, best.indices)
    assert_close(weights, best.values.softmax(dim=-1))
    share, same = top_k_routing(logits, K, norm_topk_prob=False)
    assert torch.equal(chosen, same)
    assert_close(share, logits.softmax(dim=-1).gather(1, chosen))
    assert top_k_routing(logits.bfloat16(), K)[0].dtype == torch.float32


@pytest.mark.parametrize("norm", [True, False])
def test_equals_a_loop_over_tokens(norm):
    layer, x = moe(norm_topk_prob=norm), torch.randn(T, D)
    matrices = layer.state_dict()
    expected = torch.zeros_like(x)
    for n in range(T):
        p = (layer.gate.weight @ x[n]).softmax(dim=-1)
        best = sorted(range(E), key=lambda e, p=p: -p[e])[:K]
        for e in best:
            w1, w2, w3 = (matrices[f"experts.{e}.w{i}.weight"] for i in (1, 2, 3))
            out = w2 @ (F.silu(w1 @ x[n]) * (w3 @ x[n]))
            expected[n] += p[e] / (p[best].sum() if norm else 1) * out
    assert_close(layer(x), expected)


# The two forms


def test_forms_agree_and_so_do_their_gradients():
    x, weights, chosen = routed()
    matrices = [w.detach() for w in stacks(filled(experts_of(E)))]
    upstream, gradients = torch.randn_like(x), []
    for form in (dense_experts, grouped_experts):
        given = [t.clone().requires_grad_() for t in (x, weights, *matrices)]
        y = form(given[0], given[1], chosen, *given[2:], torch.tanh)
        gradients.append([y, *torch.autograd.grad(y, given, upstream)])
    assert not gradients[1][3][2].any()  # the expert without tokens
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs)


def experts_of(n: int, **options) -> Experts:
    return Experts(num_experts=n, hidden_size=D, intermediate_size=W, **options)


def test_forms_use_silu_unless_told_otherwise():
    x, weights, chosen = routed()
    matrices = stacks(experts_of(E))
    for form in (dense_experts, grouped_experts):
        y = form(x, weights, chosen, *matrices)
        assert torch.equal(y, form(x, weights, chosen, *matrices, F.silu))


@pytest.mark.parametrize("form", [dense_experts, grouped_experts])
def test_sums_in_float32(form):
    """In bfloat16, 256 and 1 are 256; summed in float32 and rounded once, 256 + 1 + 1 is 258."""
    x = torch.zeros(1, 8, dtype=torch.bfloat16)
    x[0, 0] = 1
    up = torch.zeros(3, 8, 8, dtype=torch.bfloat16)
    up[:, 0, 0] = 1
    down = up * torch.tensor([256.0, 1, 1], dtype=torch.bfloat16)[:, None, None]
    y = form(x, torch.ones(1, 3), torch.tensor([[0, 1, 2]]), up, up, down, torch.relu)
    assert y.dtype == torch.bfloat16 and y[0, 0] == 258


def test_chooses_the_form_that_runs(monkeypatch):
    used = []
    for name in ("dense_experts", "grouped_experts"):
        monkeypatch.setattr(module, name, lambda *a, name=name: used.append(name) or a[0])
    for dtype, d, f, expected in (
        (torch.float32, 24, 40, "grouped_experts"),
        (torch.float32, 22, 40, "dense_experts"),
        (torch.float32, 24, 42, "dense_experts"),
        (torch.float32, 4, 12, "grouped_experts"),
        (torch.bfloat16, 24, 40, "grouped_experts"),
        (torch.bfloat16, 20, 40, "dense_experts"),
        (torch.float16, 24, 40, "grouped_experts"),
        (torch.float64, 24, 40, "dense_experts"),
    ):
        experts = Experts(num_experts=E, hidden_size=d, intermediate_size=f).to(dtype)
        x = torch.randn(T, d, dtype=dtype)
        experts(x, torch.ones(T, K), torch.zeros(T, K, dtype=torch.long))
        assert used.pop() == expected, (dtype, d, f)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_where_it_can(dtype):
    """What `can_group` allows, torch does; one row more or less, and it refuses."""
    for d, f in ((24, 40), (22, 40), (24, 36), (23, 40)):
        x, weights, chosen = torch.randn(T, d, dtype=dtype), *routed(T)[1:]
        experts = Experts(num_experts=E, hidden_size=d, intermediate_size=f).to(dtype)
        if can_group(x, f):
            grouped_experts(x, weights, chosen, *stacks(experts))
        else:
            with pytest.raises(RuntimeError, match="16 bytes"):
                grouped_experts(x, weights, chosen, *stacks(experts))


def test_bfloat16_equals_mixtral():
    ours, x = moe().bfloat16(), torch.randn(B, T, D).bfloat16()
    y, reference = ours(x), mixtral(ours)(x)
    assert y.dtype == torch.bfloat16
    # They add up in bfloat16, we in float32.
    assert_close(y, reference, rtol=2**-7, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole(unchecked, dtype):
    layer, x = moe(capacity_factor=0.9).to(dtype), torch.randn(B, T, D, dtype=dtype)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, :3] = 0
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_close(compiled(x, mask), layer(x, mask))
    assert_close(compiled(x), layer(x))


def test_nothing_is_on_a_device_of_its_own():
    x, weights, chosen = (t.to("meta") for t in routed())
    logits = torch.empty(B * T, E, device="meta")
    assert load_balancing_loss(logits, K).is_meta
    assert router_z_loss(logits).is_meta
    assert within_capacity(chosen, num_experts=E, capacity=1).is_meta
    with torch.device("meta"):
        experts = experts_of(E).bfloat16()
    assert grouped_experts(x.bfloat16(), weights, chosen, *stacks(experts)).is_meta
    assert dense_experts(x.bfloat16(), weights, chosen, *stacks(experts)).is_meta


# Capacity


@pytest.mark.parametrize("padded", [False, True])
def test_first_come_first_served_and_all_first_choices_come_first(padded):
    chosen = torch.rand(B * T, E).topk(K).indices
    mask = torch.ones(B * T, dtype=torch.long)
    if padded:
        mask[:3] = 0
    room = [2] * E
    expected = torch.zeros(B * T, K, dtype=torch.bool)
    for k in range(K):
        for n in range(B * T):
            e = chosen[n, k]
            if mask[n] and room[e]:
                room[e] -= 1
                expected[n, k] = True
    kept = within_capacity(chosen, num_experts=E, capacity=2, mask=mask if padded else None)
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("factor", [0.5, 1.1])
def test_dropped_choices_weigh_nothing(factor):
    layer, x = moe(capacity_factor=factor), torch.randn(B, T, D)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, :2] = False
    for given in (None, mask):
        rows = x.flatten(0, 1)
        weights, chosen = top_k_routing(layer.gate(rows), K)
        kept = within_capacity(
            chosen,
            num_experts=E,
            capacity=math.ceil(factor * B * T * K / E),
            mask=None if given is None else given.flatten(),
        )
        assert 0 < kept.sum() < kept.numel()
        y = layer(x, given).flatten(0, 1)
        assert_close(y, dense_experts(rows, weights * kept, chosen, *stacks(layer.experts)))
        assert not y[~kept.any(dim=-1)].any()


def test_with_room_for_all_nothing_is_dropped():
    layer, x = moe(capacity_factor=E / K), torch.randn(B, T, D)
    unlimited = MixtureOfExperts(**SIZES)
    unlimited.load_state_dict(layer.state_dict())
    assert_close(layer(x), unlimited(x))
    mask = torch.zeros(B, T, dtype=torch.bool)
    assert_close(unlimited(x, mask), unlimited(x))  # without a capacity it changes nothing
    assert not layer(x, mask).any()


def test_rows_are_alone_without_a_capacity():
    layer, x = moe(), torch.randn(B, T, D)
    changed = x.clone()
    changed[:, 4] += 1
    others = [0, 1, 2, 3, 5, 6]
    assert_close(layer(changed)[:, others], layer(x)[:, others])


# Losses


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_is_k_when_uniform_and_e_when_collapsed(top_k):
    uniform = 1e-4 * torch.eye(E).repeat(4, 1) + 1e-5 * torch.eye(E).roll(1, 0).repeat(4, 1)
    assert_close(load_balancing_loss(uniform, top_k), torch.tensor(float(top_k)))
    collapsed = torch.tensor([99.0, 0, 0, 0, 0, 0]).expand(T, E)
    assert_close(load_balancing_loss(collapsed, 1), torch.tensor(float(E)))


def test_losses_count_in_float32_and_without_tokens_are_zero():
    logits = torch.randn(B * T, E).bfloat16()
    for loss in (load_balancing_loss(logits, K), router_z_loss(logits)):
        assert loss.dtype == torch.float32
    assert_close(load_balancing_loss(logits, K), load_balancing_loss(logits.float(), K))
    assert_close(router_z_loss(logits), router_z_loss(logits.float()))
    one, nobody = torch.eye(B * T, dtype=torch.long)[4], torch.zeros(B * T, dtype=torch.long)
    assert_close(router_z_loss(logits, one), logits[4].float().logsumexp(dim=-1) ** 2)
    assert load_balancing_loss(logits, K, nobody) == router_z_loss(logits, nobody) == 0


def test_gradient_of_balance_pushes_the_busy_expert_down():
    logits = torch.zeros(T, E)
    logits[:, 1] = 1
    logits.requires_grad_()
    load_balancing_loss(logits, 1).backward()
    assert (logits.grad[:, 1] > 0).all() and (logits.grad[:, [0, 2, 3, 4, 5]] < 0).all()


# Names, sizes and refusals


def test_state_dict_has_each_experts_matrices():
    layer = moe()
    names = {name: tuple(p.shape) for name, p in layer.state_dict().items()}
    shapes = {"w1": (W, D), "w3": (W, D), "w2": (D, W)}
    expected = {f"experts.{e}.{w}.weight": s for w, s in shapes.items() for e in range(E)}
    assert names == {"gate.weight": (E, D), **expected}
    assert torch.equal(layer.state_dict()["experts.4.w3.weight"], layer.experts.up_proj[4])
    assert layer.state_dict(keep_vars=True)["experts.4.w3.weight"].requires_grad
    plain = set(experts_of(2).state_dict())
    assert {"0.gate_proj.weight", "0.up_proj.weight", "1.down_proj.weight"} < plain


def test_loading_is_strict():
    layer, weights = moe(), moe().state_dict()
    before = layer.experts.up_proj.clone()
    name = "experts.3.w3.weight"
    lacking = {key: value for key, value in weights.items() if key != name}
    with pytest.raises(
        RuntimeError, match=r'Missing key\(s\) in state_dict: "experts.3.w3.weight"\.'
    ):
        layer.load_state_dict(lacking)
    assert layer.load_state_dict(lacking, strict=False).missing_keys == [name]
    assert torch.equal(layer.experts.up_proj, before)
    assert torch.equal(layer.experts.gate_proj[3], weights["experts.3.w1.weight"])
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"experts.6.w1.weight"'):
        layer.load_state_dict(weights | {"experts.6.w1.weight": torch.zeros(W, D)})
    wrong = {key: torch.zeros(D, W) for key in weights if ".w3." in key}
    with pytest.raises(RuntimeError, match=r"size mismatch for experts.up_proj"):
        layer.load_state_dict(weights | wrong)
    with torch.device("meta"):
        empty = MixtureOfExperts(**SIZES)
    empty.load_state_dict(weights, assign=True)
    assert empty.experts.down_proj.requires_grad
    x = torch.randn(T, D)
    layer.load_state_dict(weights)
    assert_close(empty(x), layer(x))


def test_starts_like_linear_layers():
    experts = Experts(num_experts=9, hidden_size=64, intermediate_size=16)
    assert 0.99 * 64**-0.5 < experts.gate_proj.max() <= 64**-0.5
    assert 0.99 * 64**-0.5 < -experts.up_proj.min() <= 64**-0.5
    assert 0.99 * 16**-0.5 < experts.down_proj.max() <= 16**-0.5
    assert experts.activation is ACTIVATIONS["silu"]
    assert MixtureOfExperts(**SIZES).experts.activation is ACTIVATIONS["silu"]


def test_refuses_what_does_not_fit(unchecked):
    for top_k in (0, 7):
        with pytest.raises(ValueError, match=rf"choose {top_k} of 6 experts"):
            moe(num_experts_per_tok=top_k)
        with pytest.raises(ValueError, match=rf"choose {top_k} of 6 experts"):
            top_k_routing(torch.randn(T, E), top_k)
        with pytest.raises(ValueError, match=rf"choose {top_k} of 6 experts"):
            load_balancing_loss(torch.randn(T, E), top_k)
    moe(num_experts_per_tok=E)
    for factor in (0.0, -1.0):
        with pytest.raises(ValueError, match=rf"capacity_factor={factor}"):
            moe(capacity_factor=factor)
    with pytest.raises(ValueError, match=r"hidden_act='gelu_new'; known: silu, gelu, "):
        moe(hidden_act="gelu_new")
    Experts(num_experts=1, hidden_size=1, intermediate_size=1)
    with pytest.raises(ValueError, match="shorter"):
        experts_of(E, names=("w1", "w3"))
    for sizes in ((0, 24, 40), (6, 0, 40), (6, 24, 0)):
        text = "num_experts={}, hidden_size={}, intermediate_size={}".format(*sizes)
        names = ("num_experts", "hidden_size", "intermediate_size")
        with pytest.raises(ValueError, match=text):
            Experts(**dict(zip(names, sizes, strict=True)))
    for loss in (
        lambda m: load_balancing_loss(torch.randn(T, E), K, m),
        lambda m: router_z_loss(torch.randn(T, E), m),
    ):
        with pytest.raises(ValueError, match="a mask of 6 for 7 tokens"):
            loss(torch.ones(T - 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"a mask of \(7, 2\) for x of \(2, 7, 24\)"):
        moe(capacity_factor=1.0)(torch.randn(B, T, D), torch.ones(T, B, dtype=torch.long))
