"""Adapters: frozen linear layers, each with a few trained parameters beside it.

What the methods of the topic share: which layers of a model get an adapter, what is frozen,
switching between several adapters by name, merging. A method says only how it changes a layer.

Axes: o output features, i input features; those before (batch, token) are all rows.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Patterns = str | Collection[str]
# Left out of "all-linear": the head, whose matrix is often the embedding's.
HEADS = {"lm_head"}
# Tables of token embeddings, whose matrix a tied head reads, too.
TABLES = {"embed_tokens", "wte"}


class Switched(nn.Module):
    """A frozen module with something trained in its place while `enabled` is true.

    The frozen one may be a `Switched` too, of another name: several stand inside each other.
    """

    def __init__(self, base_layer: nn.Module, *, name: str = "default"):
        super().__init__()
        if name in [layer.name for layer in stack(base_layer)]:
            raise ValueError(f"there is an adapter {name!r} on this layer already")
        self.name, self.enabled = name, True
        self.base_layer = base_layer.requires_grad_(False)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Those that are trained, by name: all that aren't the frozen module's."""
        named = self.named_parameters()
        return {name: weight for name, weight in named if not name.startswith("base_layer.")}


class Retrained(Switched):
    """A module trained whole: a copy of it, which stands in while `enabled` is true.

    A head that is tied to a table keeps the frozen matrix, as with peft.
    """

    def __init__(self, base_layer: nn.Module, *, name: str = "default", is_table: bool = False):
        super().__init__(base_layer, name=name)
        self.is_table = is_table
        source = base_layer.current if isinstance(base_layer, Retrained) else base_layer
        self.retrained = copy.deepcopy(source).requires_grad_(True)

    @property
    def current(self) -> nn.Module:
        """The copy, or what is frozen beneath it."""
        if self.enabled:
            return self.retrained
        return (
            self.base_layer.current if isinstance(self.base_layer, Retrained) else self.base_layer
        )

    @property
    def weight(self) -> Tensor:
        """What models read without calling the module: a head's matrix, or what the head takes
        of a table."""
        return self.base_layer.weight if self.is_table else self.current.weight

    @property
    def bias(self) -> Tensor | None:
        """Of the copy, or of what is frozen beneath it."""
        return self.current.bias

    def forward(self, *inputs):
        return self.current(*inputs)


class Adapter(Switched):
    """y = x W^T + b + the method's change, with W and b frozen.

    A method gives `delta_weight`, by which it changes W, and where there is a cheaper way to
    the same outputs, `change`. The frozen layer is an `nn.Linear`, another adapter, or any module
    with `in_features`, `out_features` and a forward: a quantized one, whose `dequantize()`
    gives W where a method reads it.

    Raises:
        ValueError: the module isn't linear, or it has an adapter of this name.
    """

    def __init__(self, base_layer: nn.Module, *, name: str = "default"):
        if not is_linear(base_layer):
            raise ValueError(f"{type(base_layer).__name__} is no linear layer")
        super().__init__(base_layer, name=name)
        self.in_features: int = base_layer.in_features
        self.out_features: int = base_layer.out_features
        self.unmerged: Tensor | None = None  # W as it was, while the change is merged into it
        self.version = 0
        self.trained_bias = "none"  # what `adapt` was told

    def delta_weight(self) -> Float[Tensor, "o i"]:
        """What the method adds to W, in the dtype of its parameters."""
        raise NotImplementedError

    def change(
        self, x: Float[Tensor, "*rows i"], y: Float[Tensor, "*rows o"]
    ) -> Float[Tensor, "*rows o"]:
        """What the method adds to the frozen layer's output y."""
        delta = self.delta_weight()
        return F.linear(x.to(delta.dtype), delta)

    def forward(self, x: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
        y = self.base_layer(x)
        if not self.enabled or self.merged:
            return y
        # Parameters in float32 beside a layer in half precision: the sum is rounded once.
        return (y + self.change(x, y)).to(y.dtype)

    @property
    def merged(self) -> bool:
        """Whether the change has been added to W itself."""
        return self.unmerged is not None

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """W as changed: what models read that apply a layer's matrix themselves."""
        weight = dense_weight(self.base_layer)
        if not self.enabled or self.merged:
            return weight
        return (weight + self.delta_weight()).to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's, if it has one."""
        return getattr(self.base_layer, "bias", None)

    @torch.no_grad()
    def merge(self) -> None:
        """Write the change into W, first that of adapters beneath; nothing if switched off.

        W as it was is kept, for `unmerge`: subtracting would leave its last bits changed.

        Raises:
            ValueError: W isn't stored as a plain matrix.
        """
        if isinstance(self.base_layer, Adapter) and not self.merged:
            self.base_layer.merge()
        if not self.enabled or self.merged:
            return
        linear = innermost(self)
        if not isinstance(linear, nn.Linear):
            size = f"in_features={self.in_features}, out_features={self.out_features}"
            raise ValueError(
                f"can't merge into {type(linear).__name__} ({size}): its weight is no plain matrix"
            )
        changed = self.weight
        self.unmerged = linear.weight.detach().clone()
        linear.weight.copy_(changed)
        self.version = linear.weight._version

    @torch.no_grad()
    def unmerge(self) -> None:
        """W as it was before `merge`, to the bit; then adapters beneath likewise.

        Raises:
            ValueError: W was changed since, for one by an adapter that was merged later.
        """
        if self.unmerged is not None:
            linear = innermost(self)
            if linear.weight._version != self.version:
                raise ValueError(
                    f"W changed since {self.name!r} was merged: unmerge the later first"
                )
            linear.weight.copy_(self.unmerged)
            self.unmerged = None
            if isinstance(self.base_layer, Adapter):
                self.base_layer.version = linear.weight._version
        if isinstance(self.base_layer, Adapter):
            self.base_layer.unmerge()


def is_linear(module: nn.Module) -> bool:
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes)


def stack(module: nn.Module) -> Iterator[Switched]:
    """The adapters of a layer, from the outermost."""
    while isinstance(module, Switched):
        yield module
        module = module.base_layer


def innermost(module: nn.Module) -> nn.Module:
    """The layer that was there before any adapter."""
    while isinstance(module, Switched):
        module = module.base_layer
    return module


def dense_weight(layer: nn.Module) -> Float[Tensor, "o i"]:
    """W of a linear layer, also of one that stores it quantized.

    Raises:
        ValueError: it has no float `weight` and no `dequantize()`.
    """
    if hasattr(layer, "dequantize"):
        return layer.dequantize()
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(f"{type(layer).__name__} gives no weight: it needs a dequantize()")
    return weight


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer's first parameter or buffer is; of one without any, the default device."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        return tensor.device
    return torch.get_default_device()


# Which layers


def slots(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules by path, adapted layers as one; not what is inside these."""
    for name, child in model._modules.items():  # `named_children` skips what it had before
        if child is None:
            continue
        yield prefix + name, child
        if not isinstance(child, Switched):
            yield from slots(child, f"{prefix}{name}.")


def matches(path: str, patterns: Patterns) -> bool:
    """peft's rule: a string is a regular expression for the whole path; of a list, one is
    the path or its end, from a dot on."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(path == end or path.endswith(f".{end}") for end in patterns)


def exact_patterns(model: nn.Module, paths: Collection[str]) -> str | list[str]:
    """`target_modules` that match these paths of a model and no others."""
    if {path for path, _ in slots(model) if matches(path, paths)} == set(paths):
        return list(paths)
    return "|".join(path.replace(".", r"\.") for path in paths)


def pattern_value(patterns: Mapping[str, int | float], path: str, default: int | float):
    """peft's `rank_pattern` and `alpha_pattern`: the first that matches the path's end."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def layer_number(path: str, layers_pattern: Patterns | None) -> int | None:
    """Of a module in a list of layers: the first number behind the list's name."""
    names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    forms = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in names or ()] or [r".*?\.[^.]*\.(\d+)\."]
    found = next(filter(None, (re.match(form, path) for form in forms)), None)
    return None if found is None else int(found[1])


def linear_layers(
    model: nn.Module,
    target_modules: Patterns,
    *,
    exclude_modules: Patterns = (),
    modules_to_save: Collection[str] = (),
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: Patterns | None = None,
) -> dict[str, nn.Module]:
    """The linear layers that patterns name, by path, after peft's rules.

    Args:
        target_modules: "all-linear" (without the head), a regular expression for whole paths, or
            ends of paths.
        exclude_modules: the same for what is left out again.
        modules_to_save: names of modules that are trained whole: these are left out, too.
        layers_to_transform: only in layers of these numbers (not with a regular expression).
        layers_pattern: name of the list whose numbers these are; else any list's.

    Raises:
        ValueError: a pattern matches nothing, or what isn't linear; numbers of layers with a
            regular expression.
    """
    if layers_to_transform is not None and isinstance(target_modules, str):
        raise ValueError(f"{layers_to_transform=} with the expression {target_modules!r}")
    modules = dict(slots(model))
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        paths = [path for path, module in modules.items() if is_linear(module)]
        target_modules = [path for path in paths if path.rpartition(".")[2] not in HEADS]
    for pattern in [target_modules] if isinstance(target_modules, str) else target_modules:
        one = pattern if isinstance(target_modules, str) else [pattern]
        if not any(matches(path, one) for path in modules):
            raise ValueError(f"target_modules: {pattern!r} matches none of {len(modules)} modules")
    numbers = layers_to_transform
    numbers = [numbers] if isinstance(numbers, int) else list(numbers or ())
    found = {}
    for path, module in modules.items():
        saved = any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in modules_to_save)
        if saved or matches(path, exclude_modules) or not matches(path, target_modules):
            continue
        exact = isinstance(target_modules, str) or path in target_modules
        if numbers and not exact and layer_number(path, layers_pattern) not in numbers:
            continue
        if not is_linear(module):
            raise ValueError(f"{path} is a {type(module).__name__}, not nn.Linear")
        found[path] = module
    if not found:
        raise ValueError(f"no layer of {len(modules)} modules is left of {target_modules!r}")
    return found


# A model's adapters


def adapt(
    model: nn.Module,
    target_modules: Patterns,
    make: Callable[[nn.Module], Adapter],
    *,
    exclude_modules: Patterns = (),
    modules_to_save: Collection[str] = (),
    bias: str = "none",
) -> dict[str, Adapter]:
    """Give the layers that patterns name an adapter each and freeze everything else.

    Other adapters that the model has stay, switched off and frozen.

    Args:
        target_modules: as in `linear_layers`, like `exclude_modules`.
        make: the adapter of a linear layer, `partial(LoRA, r=8, lora_alpha=16)` for one.
        modules_to_save: ends of paths of modules that are trained whole, in a copy.
        bias: "none", or which biases are trained in place: "all" of the model's, or
            those of the adapted layers ("lora_only", for every method).

    Returns:
        The adapters by path: what was adapted.

    Raises:
        ValueError: a pattern matches nothing or what isn't linear, an unknown `bias`, or
            there is an adapter of this name.
    """
    found = linear_layers(
        model, target_modules, exclude_modules=exclude_modules, modules_to_save=modules_to_save
    )
    # A layer that stands at two places keeps one adapter for both.
    made = {id(layer): make(layer) for layer in {id(x): x for x in found.values()}.values()}
    layers = {path: made[id(layer)] for path, layer in found.items()}
    install(model, layers, modules_to_save=modules_to_save, bias=bias)
    return layers


def install(
    model: nn.Module,
    layers: Mapping[str, Adapter],
    *,
    modules_to_save: Collection[str] = (),
    bias: str = "none",
) -> None:
    """Put adapters of one name at their paths, freeze the rest, switch to them."""
    name = next(iter(layers.values())).name
    trained_biases(model, layers, bias)  # refuses an unknown one before the model is changed
    whole = {}
    for end in modules_to_save:
        # peft's rule here: the end of the path, not from a dot on.
        found = {path: module for path, module in slots(model) if path.endswith(end)}
        if not found:
            raise ValueError(f"modules_to_save: {end!r} matches nothing")
        whole |= found
    if both := sorted(whole.keys() & layers.keys()):
        raise ValueError(f"{', '.join(both)}: adapted and trained whole at once")
    for path, module in whole.items():
        retrained = Retrained(module, name=name, is_table=matches(path, TABLES))
        put(model, path, retrained.train(model.training))
    for path, layer in layers.items():
        layer.trained_bias = bias
        put(model, path, layer.train(model.training))
    model.requires_grad_(False)
    switch(model, name)
    for module in trained_biases(model, layers, bias).values():
        module.bias.requires_grad_(True)


def trained_biases(
    model: nn.Module, layers: Mapping[str, Adapter], bias: str
) -> dict[str, nn.Module]:
    """The modules, by path, whose biases are trained in place.

    Raises:
        ValueError: an unknown `bias`.
    """
    if bias not in ("none", "all") and not bias.endswith("_only"):
        raise ValueError(f"{bias=} isn't one of 'none', 'all', 'lora_only'")
    if bias == "none":
        return {}
    modules = layers.items() if bias != "all" else slots(model)
    inner = {path: innermost(m) for path, m in modules if not isinstance(m, Retrained)}
    return {p: m for p, m in inner.items() if isinstance(getattr(m, "bias", None), nn.Parameter)}


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def switched(model: nn.Module) -> list[tuple[str, Switched]]:
    """All adapters and retrained modules with the path of their layer."""
    return [(path, layer) for path, module in slots(model) for layer in stack(module)]


def adapters(model: nn.Module, name: str = "default") -> dict[str, Adapter]:
    """The adapters of a name, by the path of their layer."""
    found = switched(model)
    return {p: a for p, a in found if isinstance(a, Adapter) and a.name == name}


def switch(model: nn.Module, *names: str) -> None:
    """Compute with the adapters of these names, and train them; with none: as before any.

    Raises:
        ValueError: an unknown name, or adapters that are merged.
    """
    layers = [layer for _, layer in switched(model)]
    known = sorted({layer.name for layer in layers})
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no adapter {', '.join(unknown)}; there are: {', '.join(known)}")
    if merged := [layer.name for layer in layers if isinstance(layer, Adapter) and layer.merged]:
        raise ValueError(f"{merged[0]!r} is merged: unmerge before you switch")
    for layer in layers:
        layer.enabled = layer.name in names
        for weight in layer.own_parameters().values():
            weight.requires_grad_(layer.enabled)


def merge(model: nn.Module) -> None:
    """Write the enabled adapters' changes into the weights; all of them, or none.

    Raises:
        ValueError: a layer isn't a plain matrix, or it is another module's too.
    """
    tops = [(p, m) for p, m in slots(model) if isinstance(m, Adapter)]
    owners: dict[int, set[str]] = {}
    for path, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            owners.setdefault(id(weight), set()).add(path)
    for path, layer in tops:
        linear = innermost(layer)
        if not isinstance(linear, nn.Linear):
            kind = type(linear).__name__
            raise ValueError(f"{path}: can't merge into {kind}: its weight is no plain matrix")
        if len(shared := owners[id(linear.weight)]) > 1:
            raise ValueError(f"{path}: its weight is shared: {', '.join(sorted(shared))}")
    for _, layer in tops:
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """The weights as they were before `merge`, to the bit."""
    for _, layer in slots(model):
        if isinstance(layer, Adapter):
            layer.unmerge()


def reads_table_as_head(model: nn.Module) -> bool:
    """Whether the head is tied, and no module of its own."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    return tied and not any(matches(path, HEADS) for path, _ in slots(model))


def merge_and_unload(model: nn.Module) -> nn.Module:
    """The model without adapters, their changes in its weights; names are as before any.

    Raises:
        ValueError: a layer can't be merged, or the table was trained but not the head tied to
            it: the model has a place for one matrix, not for both.
    """
    if reads_table_as_head(model):
        for path, layer in switched(model):
            if isinstance(layer, Retrained) and layer.is_table and layer.enabled:
                raise ValueError(f"{path}: trained without the head that is tied to it")
    merge(model)
    for path, layer in list(slots(model)):
        if isinstance(layer, Retrained):
            put(model, path, layer.current)
        elif isinstance(layer, Adapter):
            put(model, path, innermost(layer))
    return model
