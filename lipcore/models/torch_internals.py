"""Every private name of torch that lipcore uses, in one place, so that it is known which torch lacks one.

What is called or read often is a name here; attributes of a user's objects that lipcore reads where they are needed
stand in :data:`ATTRIBUTES`. Public names of torch do not answer these questions.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable, forward_ad
from torch.nn.modules import module as _any_module
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.modules.dropout import _DropoutNd as AnyDropout
from torch.optim.optimizer import _default_to_fused_or_foreach as default_to_fused_or_foreach
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["AnyBatchNorm", "AnyDropout", "TorchDispatchMode", "default_to_fused_or_foreach", "tree_leaves", "tree_map"]

#: Attributes by the kind of object that has them; tests look for each in the installed torch.
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "module": (
        *("_parameters", "_modules", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_compiled_call_impl"),
    ),
    "convolution": ("_conv_forward", "_reversed_padding_repeated_twice"),
    "tensor": ("_base", "_is_view", "_backward_hooks", "_post_accumulate_grad_hooks"),
    "storage": ("_cdata",),
    "graph node": ("_input_metadata",),
    "autograd function's node": ("_forward_cls",),
    "operator": ("_schema", "_overloadname"),
    "gradient scaler": ("_scale", "_per_optimizer_states"),
    "distributed tensor": ("_local_tensor",),
}

#: Attributes under which wrappers (torch.compile, checkpoint_wrapper, FSDP) keep the user's module.
WRAPPER_ATTRIBUTES = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def _found(path: str, start: Any = torch) -> Any:
    """Return what torch has under a private name; an ImportError that names it where there is none."""
    found = start
    for part in path.split("."):
        if not hasattr(found, part):
            raise ImportError(f"lipcore needs {path} of torch, which torch {torch.__version__} does not have")
        found = getattr(found, part)
    return found


#: Return the number of the backward pass under way, -1 outside.
graph_task = _found("_C._current_graph_task_id")

#: The Function by which hooks of modules see gradients.
BackwardHookFunction = _found("nn.modules._functions.BackwardHookFunction")

#: Return how many graph nodes this thread has made.
nodes_made = _found("_C._autograd._get_sequence_nr")

#: Call a function at the end of the backward pass under way, after those that were queued before.
queue_callback = _found("_execution_engine.queue_callback", Variable)

#: Return the hooks that tensors go through which the graph keeps now (those of a checkpoint, say); None for none.
top_saved_tensors_hooks = _found("_C._autograd._top_saved_tensors_default_hooks")

#: Return the node of the graph that a backward pass is at.
current_node = _found("_C._current_autograd_node")

#: Whether a tensor is seen from inside a transform of torch.func.
is_functorch_wrapped = _found("_C._functorch.is_functorch_wrapped_tensor")

#: Keep the versions of tensors, by which a graph tells that they were written into, through a with block.
preserved_version = _found("autograd._unsafe_preserve_version_counter")

#: Norms of a list of tensors in a few launches.
foreach_norm = _found("_foreach_norm")

#: Return the store by which ranks find each other; only where there is a process group.
default_store: Any = (
    _found("distributed.distributed_c10d._get_default_store") if torch.distributed.is_available() else None
)

#: The module that has the stages of pipelines.
STAGES = "torch.distributed.pipelining.stage"
#: Methods of a stage that reduce and divide its gradients, behind the last backward pass of a schedule's step.
STAGE_REDUCES = ("scale_grads", "perform_reduce_grad")
#: Methods of a stage that run it on memory which nobody has written: of torch 2.13, before it in no_grad mode.
STAGE_LEARNS_SHAPES = ("_compute_outputs",)

_COMPILING = "_is_compiling_flag"
_found(f"compiler.{_COMPILING}")


@contextmanager
def as_compiling() -> Iterator[None]:
    """Have torch.compiler.is_compiling() say True, also while a compiler records what it does not look into."""
    before = getattr(torch.compiler, _COMPILING)
    setattr(torch.compiler, _COMPILING, True)
    try:
        yield
    finally:
        setattr(torch.compiler, _COMPILING, before)


def shard_of(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and offset, in the whole tensor, of this rank's part of a DTensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offset)


def shard_at(whole: Any, sizes: Any, coordinate: Any, words: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return :func:`shard_of` at a place of a mesh of these sizes; for each dimension `words` have the name of the
    placement's type and what its constructor takes."""
    from torch.distributed.tensor import _utils, placement_types

    placements = [getattr(placement_types, name)(**settings) for name, settings in words]
    shape, offset = _utils._compute_local_shape_and_global_offset(whole, sizes, coordinate, placements)
    return tuple(shape), tuple(offset)


def fsdp_groups(module: Any) -> list[Any]:
    """Return what a fully_shard()ed module gathers together and lets go of."""
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    groups = [state._fsdp_param_group] if several is None else several  # torch 2.11 and before have one
    return [group for group in groups if group is not None]


def was_gathered(group: Any) -> bool:
    """Return whether what a fully_shard()ed module gathers together has been there as a whole before."""
    return all(hasattr(parameter, "_unsharded_param") for parameter in group.fsdp_params)


def parts_of_gathered(module: Any) -> dict[int, Any]:
    """Return the DTensors of a fully_shard()ed module, by the ids of the parameters that stand in the place of each
    while it is gathered, and behind a forward pass with reshard_after_forward=<int>, when fewer ranks share it."""
    found = {}
    for parameter in (p for group in fsdp_groups(module) for p in group.fsdp_params):
        for name in ("_unsharded_param", "_sharded_post_forward_param"):
            if (standing := getattr(parameter, name, None)) is not None:
                found[id(standing)] = parameter.sharded_param
    return found


def gradients_of(group: Any) -> Iterator[tuple[set[int], Tensor | None, list[Tensor]]]:
    """Yield, for each parameter that fully_shard() gathers together, the ids of what stands in its place at one time or
    another; the gradient of this rank's part; and what waits to be reduced over all ranks: the gradient of the whole
    parameter that no rank has sent yet, and what is summed within one replica alone."""
    within = getattr(group, "_partial_reduce_output", None)
    for parameter in group.fsdp_params:
        gathered = getattr(parameter, "_unsharded_param", None)
        places = parameter.sharded_param, gathered, getattr(parameter, "_sharded_post_forward_param", None)
        # In the dtype of the parameter, or in another one that gradients are reduced in.
        waiting = getattr(gathered, "grad", None), parameter.unsharded_accumulated_grad, within
        ids = {id(place) for place in places if place is not None}
        yield ids, parameter.sharded_param.grad, [gradient for gradient in waiting if gradient is not None]


def backward_begun(module: Any) -> bool:
    """Return whether a fully_shard()ed module waits for the end of a backward pass, at which it lets go and reduces."""
    return bool(module._get_fsdp_state()._state_ctx.post_backward_final_callback_queued)


def before_backward(module: Any) -> tuple[Any, list[tuple[Any, bool]]]:
    """Return where a fully_shard()ed module stands, for :func:`forget_backward`."""
    groups = [(group._training_state, group.is_unsharded) for group in fsdp_groups(module)]
    return module._get_fsdp_state()._training_state, groups


def forget_backward(module: Any, before: tuple[Any, list[tuple[Any, bool]]]) -> None:
    """Have a fully_shard()ed module go on as if a backward pass that has broken off had not begun: it waits for its end
    no longer, and holds its parts where it did. Gradients that it has added up stay. No collective."""
    state = module._get_fsdp_state()
    state._state_ctx.post_backward_final_callback_queued = False
    state._training_state, groups = before
    for group, (training, gathered) in zip(fsdp_groups(module), groups, strict=True):
        group.wait_for_unshard()  # what it has begun to gather
        if not gathered:
            group._training_state = type(training).IDLE  # in which it lets go
            group.reshard()
        group._training_state = training


MKLDNN_LAYOUT = _found("_mkldnn")
OptimizedModule = _found("_dynamo.OptimizedModule")


def questions_about_the_pass() -> list[object]:
    """Return what the core asks torch about the pass under way, in its order (csrc/python/training_pass.h)."""
    return [
        torch.is_grad_enabled,
        graph_task,
        # What a checkpoint asks before it runs forward again: false under autograd.grad() and backward(inputs=...).
        _found("_execution_engine.is_checkpoint_valid", Variable),
        _found("_C._functorch.peek_interpreter_stack"),
        _found("_C._is_tracing"),
        _found("_C._len_torch_dispatch_stack"),
        _found("_C._get_dispatch_mode"),
        _found("_C._TorchDispatchModeKey.FAKE"),
        _found("_C._TorchDispatchModeKey.PROXY"),
        vars(forward_ad),  # _current_level
    ]


def saved(node: Any, name: str) -> Any:
    """Return what a node of the graph has kept under this name for its backward pass; None where it has none."""
    return getattr(node, f"_saved_{name}", None)


def is_packed(node: Any, name: str) -> bool:
    """Return whether hooks have packed what a node has kept under this name (those of a checkpoint, which runs the
    forward pass again when it is read)."""
    kept = getattr(node, f"_raw_saved_{name}", None)  # a tensor's
    return getattr(kept, "unpack_hook", None) is not None


_raw_names: dict[type, list[str]] = {}  # by the type of a node


def keeps_by_hooks(node: Any, but: Any = None) -> bool:
    """Return whether hooks are on what a node of the graph has kept (those of a checkpoint, say), other than the one
    that unpacks by `but`: unpacked once more it may raise."""
    return any(hook is not but for hook in _unpack_hooks(node))


def _unpack_hooks(node: Any) -> list[Any]:
    """Return the functions that unpack what a node of the graph has kept."""
    kind, found = type(node), []
    names = _raw_names.get(kind)
    if names is None:
        names = _raw_names[kind] = [name for name in dir(kind) if name.startswith("_raw_saved_")]
    for name in names:  # no generators: every node of a graph is asked in every pass
        kept = getattr(node, name)
        for one in kept if isinstance(kept, (tuple, list)) else (kept,):
            hook = getattr(one, "unpack_hook", None)
            if hook is not None:
                found.append(hook)
    return found


def gives_once(node: Any) -> str:
    """Return why what a node of the graph has kept may be given once alone, or "": hooks of others (offloading that
    forgets what it has brought back), a checkpoint whose recomputation is not the same a second time."""
    for hook in _unpack_hooks(node):
        owner = getattr(hook, "__module__", None) or ""
        if owner == "torch.utils.checkpoint":
            frame = _around(hook).get("frame")
            context = _around(getattr(frame, "recompute_fn", None)).get("recompute_context")
            if context is not None and not isinstance(context, nullcontext):
                return "a checkpoint with a context_fn of its own (selective checkpointing, debug=True)"
        elif not owner.startswith(("torch.", "lipcore.")):
            return f"a hook on saved tensors ({getattr(hook, '__qualname__', type(hook).__name__)})"
    return ""


def _around(function: Any) -> dict[str, Any]:
    """Return the variables around a function that it uses, by name."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    found = {}
    for name, cell in zip(code.co_freevars, cells, strict=True) if code is not None and cells else ():
        with suppress(ValueError):  # it is empty
            found[name] = cell.cell_contents
    return found


_dispatch_modes = _found("_C._len_torch_dispatch_stack")
_dispatch_mode = _found("_C._get_dispatch_stack_at")


def in_selective_checkpoint() -> bool:
    """Return whether what operations make now is kept by selective checkpointing, each in the version that it has."""
    modes = (_dispatch_mode(i) for i in range(_dispatch_modes()))
    return any(type(mode).__module__ == "torch.utils.checkpoint" for mode in modes)


def forward_shape(node: Any, index: int = 0) -> tuple[int, ...]:
    """Return the shape of a tensor that the node has made: of its output with this number."""
    return tuple(node._input_metadata[index].shape)


def forward_kind(node: Any, index: int = 0) -> tuple[torch.dtype, torch.device]:
    """Return dtype and device of a tensor that the node has made."""
    known = node._input_metadata[index]
    return known.dtype, known.device


# ---- hooks that others have registered

#: Of every module: called after a forward pass, and before it.
ANY_FORWARD_HOOKS: Mapping[int, Any] = _found("_global_forward_hooks", _any_module)
ANY_FORWARD_PRE_HOOKS: Mapping[int, Any] = _found("_global_forward_pre_hooks", _any_module)


_ANY_BACKWARD_HOOKS: tuple[Any, ...] = (
    _found("_global_backward_hooks", _any_module),
    _found("_global_backward_pre_hooks", _any_module),
)


def has_backward_hooks(model: nn.Module) -> bool:
    """Return whether a module of it, or every module, has a hook that may change gradients."""
    return any(_ANY_BACKWARD_HOOKS) or any(m._backward_hooks or m._backward_pre_hooks for m in model.modules())


@contextmanager
def without_backward_hooks(model: nn.Module) -> Iterator[None]:
    """Keep hooks of modules on gradients, its own and those of every module, from being called in passes that begin
    within the with block."""
    kept = [(module, module._backward_hooks, module._backward_pre_hooks) for module in model.modules()]
    everywhere = [(hooks, dict(hooks)) for hooks in _ANY_BACKWARD_HOOKS]
    try:
        for module, hooks, before in kept:
            if hooks or before:
                module._backward_hooks, module._backward_pre_hooks = OrderedDict(), OrderedDict()
        for hooks, _ in everywhere:
            hooks.clear()
        yield
    finally:
        for module, hooks, before in kept:
            module._backward_hooks, module._backward_pre_hooks = hooks, before
        for hooks, all_of_them in everywhere:
            hooks.update(all_of_them)


def hooks_after_accumulation(parameter: Tensor) -> list[Any]:
    """Return the hooks that run after a parameter's gradient has been accumulated."""
    return list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())


# ---- compiled modules


def compiles_its_call(module: nn.Module) -> bool:
    """Return whether module.compile() was called: the module itself is what the loop calls."""
    return getattr(module, "_compiled_call_impl", None) is not None


def is_compiled(module: nn.Module) -> bool:
    """Return whether it is the result of torch.compile, or compiles its own call."""
    return isinstance(module, OptimizedModule) or compiles_its_call(module)


def original(module: nn.Module) -> nn.Module:
    """Return the module that torch.compile was given; itself where it is not the result of that."""
    found: nn.Module = module._orig_mod if isinstance(module, OptimizedModule) else module
    return found


# ---- wrappers for several ranks


def ddp_of(module: nn.Module) -> Any:
    """Return the DistributedDataParallel that a module is, or by which torch's composable replicate() reduces its
    gradients, from the first forward pass on; None where there is none."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return next((vars(owner).get("_ddp") for owner in owners if type(owner).__name__ == "_ReplicateState"), None)


def reduces_by_own_rule(module: nn.Module) -> bool:
    """Return whether a DistributedDataParallel, or a module that fully_shard() was called on, reduces gradients by
    another rule than the mean over its ranks."""
    if (wrapper := ddp_of(module)) is not None:
        return bool(wrapper._comm_hooks)
    state_of: Any = getattr(module, "_get_fsdp_state", lambda: None)
    state = state_of()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # of an earlier torch
        groups = [group for group in [getattr(state, "_fsdp_param_group", None)] if group is not None]
    usual = {"DefaultReduceScatter", "SymmMemReduceScatter", "NoneType"}
    return any(
        type(getattr(group, "_reduce_scatter_comm", None)).__name__ not in usual
        or any(getattr(group, name, None) is not None for name in ("gradient_divide_factor", "_all_reduce_hook"))
        for group in groups
    )


def first_step_hook(optimizer: torch.optim.Optimizer) -> Any:
    """Return the hook that is called first at the end of an optimizer's step; None where there is none."""
    return next(iter(optimizer._optimizer_step_post_hooks.values()), None)


def calls_itself(module: nn.Module) -> bool:
    """Return whether a call of this module is under way inside another one, in this thread."""
    calls, frame = 0, inspect.currentframe()
    while frame is not None and calls < 2:
        calls += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
        frame = frame.f_back
    return calls > 1
