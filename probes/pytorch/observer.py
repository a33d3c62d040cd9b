"""Watches the layers of a PyTorch model while it runs, and hands over what its sites held.

The forward of every layer is wrapped for the duration (an attribute of the instance, removed
again whatever happens), rather than hooked: hooks switch off the fused path of
`nn.TransformerEncoderLayer` and with it change the model's outputs. Only a layer that has forward hooks
of its own is given one more, for its output is what these make of it.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from divergence.precision import dtype_name
from divergence.probes import Observation, Sink
from divergence.probes.pytorch.attention import AttentionWatch, Product, unrepeat
from divergence.probes.pytorch.caches import cached, caches_in, is_repeated
from divergence.probes.pytorch.layer_call import (
    LayerCall,
    find_hidden,
    first_tensor,
    replaced,
    snapshots,
    with_first_tensor,
)
from divergence.probes.pytorch.stacks import Stack
from divergence.sites import HEAD_AXES, HIDDEN_AXES, Site

_CROSS = re.compile(r"cross|encoder_attn|encdec|enc_dec|multihead_attn", re.IGNORECASE)
_PROJECTIONS = {
    "key": ("k_proj", "key", "k", "wk", "to_k", "key_proj", "k_lin"),
    "value": ("v_proj", "value", "v", "wv", "to_v", "value_proj", "v_lin"),
}
_DEVICES = ("cpu", "cuda")
_ROLES = {name: tensor for tensor, names in _PROJECTIONS.items() for name in names}


@dataclass
class _Current:
    """The layer call that is running."""

    site: Site
    path: list[str] = field(default_factory=list)
    products: list[tuple[Product, str]] = field(default_factory=list)
    projections: dict[str, Tensor] = field(default_factory=dict)
    inner: list[tuple[str, nn.Module, Tensor]] = field(default_factory=list)


class LayerObserver:
    """Observes the layers of `stacks` while used as a context manager.

    Args:
        stacks: the layers.
        sink: receives every observation.
        detail: also the sites of `divergence.sites.DETAIL_TENSORS`.
        record: keep a `LayerCall` per call in `calls`.
        only: watch the layer of this index alone.

    Attributes:
        calls: the calls, if they are recorded.
        order: names of the stacks in execution order.
        autocast: what torch's autocast had products compute in.
        hidden: dtype of each layer's hidden state, by stack and number.
    """

    def __init__(
        self,
        stacks: Sequence[Stack],
        sink: Sink,
        *,
        detail: bool = False,
        record: bool = False,
        only: int | None = None,
    ) -> None:
        self.calls: list[LayerCall] = []
        self.order: list[str] = []
        self.autocast: set[torch.dtype] = set()
        self.hidden: dict[tuple[str, int], str] = {}
        self._stacks = stacks
        self._sink = sink
        self._detail = detail
        self._record = record
        self._only = only
        self._counts: dict[tuple[str, int], int] = {}
        self._current: list[_Current] = []
        self._last_hidden: dict[str, Tensor] = {}
        self._looked_into: set[nn.Module] = set()
        self._unfinished: dict[nn.Module, Callable[[Any], None]] = {}
        self._exit = contextlib.ExitStack()
        self._watch = AttentionWatch(self._seen)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as building:
            for stack in self._stacks:
                for index, layer in enumerate(dict.fromkeys(stack.layers)):
                    if self._only not in (None, index):
                        continue
                    building.enter_context(wrapped(layer, self._layer_wrapper(stack, index, layer)))
                    if _hooks_after(layer):
                        hook = layer.register_forward_hook(self._hooked)
                        building.callback(hook.remove)
            building.enter_context(self._watch)
            self._exit = building.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._exit.close()
        # The watch holds this: a cycle is collected late, and what it holds may fill a device.
        del self._watch

    def _note_autocast(self) -> None:
        """What torch's autocast, if it is on, has products compute in."""
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                self.autocast.add(torch.get_autocast_dtype(device))

    def _look_into(self, layer: nn.Module) -> None:
        """Watches the modules in `layer` from its first call on: those of all layers before the first would
        have a device wait."""
        if layer in self._looked_into:
            return
        self._looked_into.add(layer)
        for name, inner in layer.named_modules():
            if name and self._is_watched(name, inner):
                self._exit.enter_context(wrapped(inner, self._inner_wrapper(name, inner)))

    def _is_watched(self, name: str, inner: nn.Module) -> bool:
        return self._detail or name.rsplit(".", 1)[-1] in _ROLES or next(inner.children(), None) is not None

    def _layer_wrapper(self, stack: Stack, index: int, layer: nn.Module) -> Callable[..., Any]:
        def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            count = self._counts[stack.name, index] = self._counts.get((stack.name, index), 0) + 1
            if stack.name not in self.order:
                self.order.append(stack.name)
            current = _Current(Site(index, "hidden", stack.name, count))
            record = self._begin(stack, current, args, kwargs) if self._record else None
            self._look_into(layer)
            self._note_autocast()
            self._current.append(current)
            self._watch.forget()
            try:
                output = forward(*args, **kwargs)
            finally:
                self._current.pop()
                self._watch.forget()
            finish = functools.partial(self._finish, current, args, kwargs, record)
            if _hooks_after(layer):
                self._unfinished[layer] = finish
            else:
                finish(output)
            return output

        return call

    def _hooked(self, layer: nn.Module, _: Any, output: Any) -> None:
        """Called with what a layer's own hooks made of its output."""
        self._unfinished.pop(layer)(output)

    def _inner_wrapper(self, name: str, inner: nn.Module) -> Callable[..., Any]:
        role = _ROLES.get(name.rsplit(".", 1)[-1])

        def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self._current:
                return forward(*args, **kwargs)
            current = self._current[-1]
            current.path.append(name)
            try:
                output = forward(*args, **kwargs)
            finally:
                current.path.pop()
            tensor = first_tensor(output)
            if tensor is not None and role is not None:
                current.projections.setdefault(role, tensor)
            if tensor is not None and self._detail:
                current.inner.append((name, inner, tensor))
            return output

        return call

    def _seen(self, product: Product) -> None:
        if self._current:
            current = self._current[-1]
            current.products.append((product, current.path[-1] if current.path else ""))

    def _begin(
        self, stack: Stack, current: _Current, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> LayerCall:
        site = current.site
        assert site.layer is not None
        call = LayerCall(stack.name, site.layer, site.call, stack.layers[site.layer], args, dict(kwargs))
        others = [hidden for name, hidden in self._last_hidden.items() if name != stack.name]
        call.hidden_at = find_hidden(args, kwargs, self._last_hidden.get(stack.name), others)
        if call.hidden_at is not None:
            hidden = args[call.hidden_at] if isinstance(call.hidden_at, int) else kwargs[call.hidden_at]
            call.device_in = hidden.device
            call.follows = site.layer > 0 and _is_same(hidden, self._last_hidden.get(stack.name))
            if not call.follows:
                call.first_input = hidden.detach().clone()
            call.args, call.kwargs = replaced(args, kwargs, call.hidden_at, None)
        call.args, call.kwargs = snapshots(call.args, call.kwargs, call.layer)
        self.calls.append(call)
        return call

    def _finish(
        self,
        current: _Current,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        record: LayerCall | None,
        output: Any,
    ) -> None:
        hidden = first_tensor(output)
        if hidden is None:
            return
        self._last_hidden[current.site.stack] = hidden
        if current.site.layer is not None:
            self.hidden[current.site.stack, current.site.layer] = dtype_name(hidden.dtype)
        if record is not None:
            record.output = with_first_tensor(output, None)
            record.device_out = hidden.device
        axes = HIDDEN_AXES if hidden.dim() == 3 else HIDDEN_AXES[-hidden.dim() :] if hidden.dim() == 2 else ()
        # What is done with tensors that were seen is not the model's doing: no mode shall see or change it.
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - it has no other name
            if self._detail:
                self._emit_detail(current)
            self._emit_keys(current, args, kwargs, batch=hidden.shape[0])
            self._sink(Observation(current.site, hidden, axes, "output of the layer"))

    def _emit_keys(
        self, current: _Current, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int
    ) -> None:
        """Key and value of every attention in the layer: what the cache holds, else what reaches
        the attention product, else the projections' outputs."""
        site = current.site
        caches = caches_in(args, kwargs)
        emitted: set[str] = set()
        for product, path in _whole(current.products):
            cross = bool(_CROSS.search(path)) or "key" in emitted
            for tensor in ("key", "value"):
                name = f"cross_{tensor}" if cross else tensor
                seen = unfolded(getattr(product, tensor), product.batch or batch)
                if name in emitted or seen is None or seen.dim() != 4:
                    continue
                held = cached(caches, site.layer, name)
                if held is not None and is_repeated(held, seen):
                    kept, how = held, "cache"
                else:
                    kept, how = unrepeat(seen)[0], product.how
                emitted.add(name)
                self._sink(Observation(site.with_tensor(name), kept, HEAD_AXES, how))
        for tensor in ("key", "value"):
            if tensor in emitted:
                continue
            held = cached(caches, site.layer, tensor)
            if held is not None:
                self._sink(Observation(site.with_tensor(tensor), held, HEAD_AXES, "cache"))
            elif tensor in current.projections:
                found = f"output of the {tensor} projection, before any rotary embedding"
                self._sink(
                    Observation(site.with_tensor(tensor), current.projections[tensor], HIDDEN_AXES, found)
                )

    def _emit_detail(self, current: _Current) -> None:
        site = current.site
        attention = next((path for _, path in current.products), None)
        if current.products:
            product = current.products[0][0]
            query = unfolded(product.query, product.batch)
            if query is not None and query.dim() == 4:
                self._sink(Observation(site.with_tensor("query"), query, HEAD_AXES, product.how))
        for tensor, (name, value) in _roles(current.inner, attention).items():
            axes = HIDDEN_AXES if value.dim() == 3 else ()
            self._sink(Observation(site.with_tensor(tensor), value, axes, f"output of {name}"))


def _roles(
    inner: Sequence[tuple[str, nn.Module, Tensor]], attention: str | None
) -> dict[str, tuple[str, Tensor]]:
    """Which submodules of a layer are its norms, its attention and its MLP, by where they stand
    relative to the attention product and by class name."""
    top = attention.split(".")[0] if attention else None
    roles: dict[str, tuple[str, Tensor]] = {}
    after = False
    for name, module, value in inner:
        if name == top:
            roles["attention"] = (name, value)
            after = True
        elif "." in name and not name.startswith("layer."):
            continue
        elif "norm" in type(module).__name__.lower() or name.startswith("ln"):
            roles.setdefault("post_norm" if after else "input_norm", (name, value))
        elif after and _CROSS.search(name):
            roles["cross_attention"] = (name, value)
        elif after and any(True for _ in module.children()):
            roles["mlp"] = (name, value)
    return roles


def _is_same(tensor: Tensor, other: Tensor | None) -> bool:
    """Whether both lie at the same place in the same way."""
    return other is not None and (
        tensor is other
        or (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        == (other.data_ptr(), other.shape, other.stride(), other.dtype)
    )


@contextlib.contextmanager
def wrapped(module: nn.Module, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Calls `wrapper(forward, *args, **kwargs)` in place of `module.forward` for the duration."""
    had = "forward" in module.__dict__
    forward = module.forward

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(forward, *args, **kwargs)

    object.__setattr__(module, "forward", replacement)
    try:
        yield
    finally:
        if had:
            object.__setattr__(module, "forward", forward)
        else:
            object.__delattr__(module, "forward")


def _whole(products: Sequence[tuple[Product, str]]) -> Iterator[tuple[Product, str]]:
    """Attention products without those of further blocks of queries, whose keys were seen, and none of blocks
    of keys, whose softmax is always written out: no block is all of them."""
    reaching: list[Tensor] = []
    by_hand: dict[str, list[Tensor]] = {}
    for product, path in products:
        keys = by_hand.setdefault(path, [])
        if product.by_hand and product.key is not None and not _is_among(product.key, keys):
            keys.append(product.key)
    for product, path in products:
        key = product.key
        if key is None or (product.by_hand and len(by_hand[path]) > 1) or _is_among(key, reaching):
            continue
        reaching.append(key)
        yield product, path


def _is_among(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    return any(_is_same(tensor, other) for other in others)


def _hooks_after(module: nn.Module) -> bool:
    return bool(module.__dict__["_forward_hooks"])


@contextlib.contextmanager
def without_hooks(modules: Iterable[nn.Module], *, before: bool) -> Iterator[None]:
    """Leaves out what hooks do `before` the forward of `modules`, or after it, for the duration."""
    name = "_forward_pre_hooks" if before else "_forward_hooks"
    hooked = [(module, module.__dict__[name]) for module in modules if module.__dict__[name]]
    for module, hooks in hooked:
        module.__dict__[name] = type(hooks)()
    try:
        yield
    finally:
        for module, hooks in hooked:
            module.__dict__[name] = hooks


def unfolded(tensor: Tensor | None, batch: int) -> Tensor | None:
    """`[batch * head, token, channel]` as `[batch, head, token, channel]`, and of five axes the one over
    which a group of queries shares its key left out; others as they are."""
    if tensor is not None and tensor.dim() == 5:
        shared = [axis for axis in (2, 1) if tensor.shape[axis] == 1 or tensor.stride(axis) == 0]
        return tensor.select(shared[0], 0) if shared else tensor.flatten(1, 2)
    if tensor is not None and tensor.dim() == 3 and batch and tensor.shape[0] % batch == 0:
        folded: Tensor = tensor.unflatten(0, (batch, -1))
        return folded
    return tensor
