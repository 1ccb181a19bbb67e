"""The tensors in what a model returns, however it is packed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributions import Distribution

from lipcore.models.containers import WHOLE, attributes_of, leaves_of

#: Attributes of objects are looked into so deep: where they alone are returned, and beside tensors.
_DEEP, _DEEP_BESIDE = 4, 2
_MOST_OBJECTS = 256


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Find the tensors in tuples, lists, dicts, mappings, dataclasses and distributions, and those that are attributes
    of objects; not those of caches that are returned beside others, whose keys and values are behind these."""
    if isinstance(output, Tensor):
        yield output
        return
    objects: list[Any] = []
    seen: set[int] = set()
    for tensor in _packed(output, objects):
        seen.add(id(tensor))
        yield tensor
    alone = not seen
    for each in objects:
        for tensor in _attributes(each, _DEEP) if alone else _beside(each):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _packed(output: Any, objects: list[Any]) -> Iterator[Tensor]:
    """Find the tensors in containers; objects of other kinds are added to `objects`."""
    for leaf in leaves_of(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Distribution):
            yield from {id(tensor): tensor for tensor in _attributes(leaf, _DEEP)}.values()
        elif not isinstance(leaf, WHOLE):
            objects.append(leaf)


def _beside(found: Any) -> Iterator[Tensor]:
    """Find the tensors of an object that is returned beside other tensors."""
    if not any(kind.__name__.endswith("Cache") for kind in type(found).__mro__):
        yield from _attributes(found, _DEEP_BESIDE)


def _attributes(found: Any, deep: int) -> Iterator[Tensor]:
    """Find the tensors that are attributes of an object, or of objects that are, so deep; not of more objects than a
    model makes in each pass, since this looks at them in each (a data set that one of them holds)."""
    todo = deque([(found, deep)])
    looked_at = 0
    while todo and looked_at < _MOST_OBJECTS:
        looked_at += 1
        each, deep = todo.popleft()
        if isinstance(each, (type, nn.Module)):
            continue
        for leaf in leaves_of(list(attributes_of(each).values())):
            if isinstance(leaf, Tensor):
                yield leaf
            elif isinstance(leaf, Distribution):
                todo.append((leaf, _DEEP))
            elif not isinstance(leaf, WHOLE) and deep > 1 and len(todo) < _MOST_OBJECTS:
                todo.append((leaf, deep - 1))


def nodes_of(output: Any) -> Iterator[Any]:
    """Return the nodes of the graph behind the output's tensors."""
    return nodes_before(tensor.grad_fn for tensor in tensors_of(output))


def nodes_before(nodes: Iterable[Any], without: Collection[Any] = ()) -> Iterator[Any]:
    """Return nodes of a graph and all behind them, each once, without those in `without` and those that are behind
    them only."""
    seen = {None, *without}
    todo = [node for node in dict.fromkeys(nodes) if node not in seen]
    seen.update(todo)
    while todo:
        node = todo.pop()
        yield node
        for before, _ in node.next_functions:
            if before not in seen:
                seen.add(before)
                todo.append(before)


def gradient_node(tensor: Tensor) -> Any:
    """Return the node of a graph that the gradient at a tensor comes to, which is that of a leaf where it is one; None
    where it requires no gradient."""
    return get_gradient_edge(tensor).node if tensor.requires_grad else None


def on_backward(output: Any, hook: Callable[[Any], None]) -> None:
    """Call the hook with the gradients when the backward pass enters the graph behind one of the output's tensors, at
    each of them."""
    for tensor in tensors_of(output):
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(hook)


def output_names(output: Any) -> list[str]:
    """Return the keys or attributes of the tensors that a model returned in a mapping or a dataclass."""
    if isinstance(output, Mapping):
        return [str(key) for key, value in output.items() if isinstance(value, Tensor)]
    if is_dataclass(output) and not isinstance(output, type):
        return [field.name for field in fields(output) if isinstance(getattr(output, field.name, None), Tensor)]
    return [name for name in getattr(output, "_fields", ()) if isinstance(getattr(output, name), Tensor)]


def picked_output(output: Any, choice: str | Callable[[Any], Any]) -> Any:
    """Return what stands in a model's output under this key or attribute, or what a function returns of it."""
    if callable(choice):
        try:
            return choice(output)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"output: the function raises {what}, given a {type(output).__name__}") from error
    if isinstance(output, Mapping) and choice in output:
        return output[choice]
    if not isinstance(output, (Tensor, Mapping)) and hasattr(output, choice):
        return getattr(output, choice)
    names = ", ".join(map(repr, output_names(output))) or "no tensor by name"
    raise ValueError(
        f"output: there is no {choice!r} in what the model returns, a {type(output).__name__} with {names}"
    )


def check_output(output: Any) -> None:
    """Raise a TypeError where it cannot say which value of a model's output is meant."""
    if output is None or callable(output) or (isinstance(output, (int, str)) and not isinstance(output, bool)):
        return
    raise TypeError(
        f"output: expected None, an index, a key or a callable, got {output!r}; pass the index of a column of the "
        "model's output, the key or attribute that it has in what the model returns, or a callable that turns the "
        "output into one value per sample (for what a module inside returns, pass the part of the model up to it)"
    )


def one_per_sample(result: Any, output: int | str | Callable[[Any], Tensor] | None, batch: int) -> Tensor:
    """Return, of what a model returned, the one value for each sample, [B] or [B, 1]."""
    check_output(output)
    if callable(output) or isinstance(output, str):
        result = picked_output(result, output)
    if not isinstance(result, Tensor):
        names = ", ".join(map(repr, output_names(result)))
        raise ValueError(
            f"output: the model returns a {type(result).__name__}; pass output=<callable that gives one value per "
            f"sample>{' or one of its keys, ' * bool(names)}{names}"
        )
    if isinstance(output, int):
        if result.dim() != 2 or not -result.shape[1] <= output < result.shape[1]:
            raise ValueError(
                f"output: index {output} does not fit the model's output of shape {list(result.shape)}; expected [B, K]"
            )
        result = result[:, output]
    if result.dim() == 0 and batch == 1:  # squeezed
        result = result.reshape(1)
    if result.dim() == 0 or result.shape[0] != batch or result.numel() != batch:
        raise ValueError(
            f"output: the model's output has shape {list(result.shape)} for {batch} samples, but one value per "
            "sample is needed; pass "
            "output=<index or callable>, or quantity='jacobian' for the Jacobian's spectral norm"
        )
    value: Tensor = result
    return value


def _flat_output(result: Any, batch: int) -> Tensor:
    if not isinstance(result, Tensor) or result.dim() < 1 or result.shape[0] != batch:
        raise ValueError("quantity: 'jacobian' needs a tensor output of shape [B, ...]")
    flat: Tensor = result.reshape(batch, result.numel() // max(1, batch))
    return flat
