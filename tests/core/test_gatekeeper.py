"""What every operation refuses, wherever a tensor goes: in words that name the argument, with nothing written."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from cases import OPS, Op, get, put, values
from few import spread
from one_rank import one_rank
from oracle import bits
from torch import Tensor
from torch.utils._pytree import tree_map

from lipcore import functional

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning"),  # torch.func.jvp's own
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]
Call = Callable[[Any], None]


def directly(value: Any, call: Call) -> None:
    call(value)


@dataclass(frozen=True)
class Bad:
    """A value no operation takes: how it is made of a good tensor, and what the message has to say."""

    name: str
    make: Callable[[Tensor], Any]
    words: str
    error: type[Exception] = TypeError
    within: Callable[[Any, Call], None] = directly  #: for what exists only inside something else
    storage: bool = False  #: seen by looking at the storage, which the compiled core leaves to Python


class Wrapper(Tensor):
    """A wrapper subclass: what it holds is not at its own data pointer."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrap(x):
            return x.inner if isinstance(x, cls) else x

        return function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))


class Logging(Tensor):
    """Has memory of its own, but sees operators first: what they mean is its business."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def fake(good: Tensor) -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        return mode.from_tensor(good)


def with_dtensor(good: Tensor, call: Call) -> None:
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    with one_rank():
        call(distribute_tensor(good, init_device_mesh("cpu", (1,)), [Shard(0)]))


def escaped(transform: Callable[..., Any], good: Tensor) -> Tensor:
    """A wrapped tensor that outlived its transform."""
    caught: list[Tensor] = []
    transform(lambda x: (caught.append(x), x.sum())[1])(good)
    return caught[0]


def freed(good: Tensor) -> Tensor:
    tensor = torch.zeros_like(good)
    tensor.untyped_storage().resize_(0)
    return tensor


def cut_short(good: Tensor) -> Tensor:
    """as_strided over a storage that was made smaller afterwards: one element of the last row is not there."""
    memory = torch.zeros(2 * good.numel(), dtype=good.dtype)
    tensor = memory.as_strided(good.shape, good.stride())
    memory.untyped_storage().resize_((good.numel() - 1) * good.element_size())
    return tensor


def quantized(good: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(good.float(), 0.1, 0, torch.qint8)


def nested(good: Tensor, layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([good, good], layout=layout)


def sparse(good: Tensor, to: Callable[[Tensor], Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return to(good if good.dim() == 2 else torch.ones(4, 6))


def of_dtype(dtype: torch.dtype, words: str) -> Bad:
    def make(good: Tensor) -> Tensor:
        if dtype.itemsize == 1 and dtype.is_floating_point:
            return torch.zeros(good.shape, dtype=torch.uint8).view(dtype)
        return torch.zeros(good.shape, dtype=dtype)

    return Bad(str(dtype).removeprefix("torch."), make, words)


NONE = Bad("None", lambda good: None, "None")
BAD = [
    NONE,
    Bad("list_of_numbers", lambda good: [1.0, 2.0], "list"),
    Bad("list_of_tensors", lambda good: [good], "torch.stack"),
    Bad("tuple", lambda good: (good,), "tuple"),
    Bad("dict", lambda good: {"x": good}, "dict"),
    Bad("string", lambda good: "weights", "str"),
    Bad("numpy_array", lambda good: good.numpy(), "torch.from_numpy"),
    Bad("numpy_scalar", lambda good: np.float32(1.5), "number"),
    Bad("int", lambda good: 3, "number 3"),
    Bad("float", lambda good: 1.5, "number 1.5"),
    Bad("bool", lambda good: True, "number True"),
    Bad("complex", lambda good: 1j, "number 1j"),
    Bad("class", lambda good: Tensor, "pass a tensor"),
    *(
        of_dtype(d, "tensor.float()")
        for d in (torch.int64, torch.int32, torch.int8, torch.uint8, torch.uint16, torch.bool)
    ),
    *(of_dtype(d, "view_as_real") for d in (torch.complex64, torch.complex128, torch.complex32)),
    *(of_dtype(d, "too coarse") for d in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz)),
    Bad("conjugate", lambda good: torch.zeros(good.shape, dtype=torch.complex64).conj(), "view_as_real"),
    Bad("sparse_coo", lambda good: sparse(good, Tensor.to_sparse), "to_dense"),
    Bad("sparse_csr", lambda good: sparse(good, Tensor.to_sparse_csr), "to_dense"),
    Bad("sparse_csc", lambda good: sparse(good, Tensor.to_sparse_csc), "to_dense"),
    Bad("quantized", quantized, "dequantize"),
    Bad("nested", lambda good: nested(good, torch.strided), "nested"),
    Bad("nested_jagged", lambda good: nested(good, torch.jagged), "nested"),
    Bad("mkldnn", lambda good: good.float().to_mkldnn(), "mkldnn"),
    Bad("meta", lambda good: good.to("meta"), "meta", ValueError),
    Bad("empty_meta", lambda good: torch.empty(0, 3, device="meta"), "meta", ValueError),
    Bad("fake", fake, "fake"),
    Bad("wrapper_subclass", Wrapper, "Wrapper"),
    Bad("dispatching_subclass", lambda good: good.as_subclass(Logging), "Logging"),
    Bad("DTensor", lambda good: good, ".to_local()", within=with_dtensor),
    Bad(
        "in_vmap", lambda good: torch.stack([good, good]), "transform", within=lambda x, call: torch.func.vmap(call)(x)
    ),
    Bad("in_grad", lambda good: good, "transform", within=lambda x, call: torch.func.grad(call)(x)),
    Bad("in_jvp", lambda good: good, "transform", within=lambda x, call: torch.func.jvp(call, (x,), (x,))),
    Bad("in_functionalize", lambda good: good, "transform", within=lambda x, call: torch.func.functionalize(call)(x)),
    Bad("escaped_vmap", lambda good: escaped(torch.func.vmap, torch.stack([good, good])), "transform"),
    Bad("escaped_grad", lambda good: escaped(torch.func.grad, good), "transform"),
    Bad("uninitialised_parameter", lambda good: torch.nn.UninitializedParameter(), "forward", ValueError),
    Bad("uninitialised_buffer", lambda good: torch.nn.UninitializedBuffer(), "forward", ValueError),
    Bad("freed_storage", freed, "zero", ValueError),
    Bad("short_storage", cut_short, "bytes of storage", ValueError, storage=True),
]


def snapshot(arguments: dict[str, Any]) -> list[Tensor]:
    """The memory behind all arguments, gaps between elements included."""
    tensors = [t for a in arguments.values() for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
    return [torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone() for t in tensors]


def assert_refused(op: Op, slot: str, good: dict[str, Any], bad: Bad) -> None:
    before = snapshot(good)

    def call(value: Any) -> Any:
        op.call(put(good, slot, value))
        raise AssertionError(f"{op.name} accepted {bad.name} as {slot}")

    with pytest.raises(bad.error) as caught:
        bad.within(bad.make(get(good, slot)), call)
    message = str(caught.value)
    assert message.startswith((f"{slot}: ", f"trajectory: parameter '{slot}' ")), message
    assert bad.words in message, message
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(good), strict=True)), "an argument was written to"


#: What no tensor is, what the core cannot read, and what has no memory: these go everywhere.
EVERYWHERE = ("float", "int32", "meta")


def _is_refused(op: Op, slot: str, bad: Bad) -> bool:
    return not (
        (bad is NONE and slot in op.optional)
        or (bad.storage and not op.full_check)
        or (bad.name == "uninitialised_buffer" and op.name == "Trajectory.bind")
        or (bad is NONE and op.name == "Trajectory.update")  # a parameter that was removed
        or (bad.name == "DTensor" and op.name.startswith("Trajectory"))  # this rank's part is measured
    )


def combinations() -> list[Any]:
    """Every bad tensor once per operation, from slot to slot; every slot with three of them. All slots go through one
    function of the core, which is told a name and nothing else of the place."""
    found = []
    for op in OPS:
        for i, bad in enumerate(BAD):
            slots = [slot for slot in op.slots if _is_refused(op, slot, bad)]
            chosen = slots if bad.name in EVERYWHERE else slots[i % len(slots) :][:1] if slots else []
            found += [pytest.param(op, slot, bad, id=f"{op.name}-{slot}-{bad.name}") for slot in chosen]
    return spread(found, 2)


@pytest.mark.parametrize(("op", "slot", "bad"), combinations())
def test_not_a_usable_tensor(op, slot, bad):
    assert_refused(op, slot, op.arguments(), bad)


NOT_LISTS = [
    Bad("None", lambda good: None, "NoneType"),
    Bad("tensor", lambda good: good[0], "Tensor"),
    Bad("array", lambda good: good[0].numpy(), "ndarray"),
    Bad("dict", lambda good: dict(enumerate(good)), "dict"),
    Bad("generator", iter, "iterator"),
    Bad("number", lambda good: 3, "int"),
]


@pytest.mark.parametrize("bad", NOT_LISTS, ids=lambda bad: bad.name)
@pytest.mark.parametrize(("op", "name"), [pytest.param(o, n, id=f"{o.name}-{n}") for o in OPS for n in o.lists])
def test_not_a_list(op, name, bad):
    assert_refused(op, name, op.arguments(), bad)


# ---- good tensors that do not belong together: (operation, argument, replacement, error's words)

f64, f32 = torch.float64, torch.float32


def misfits() -> list[Any]:
    rows = [
        ("sample_norms", "x", torch.tensor(1.0), "0-dim"),
        ("sample_norms", "out", torch.zeros(5, dtype=f64), r"\[4\].*\[5\]"),
        ("sample_norms", "out", torch.zeros(4, 1, dtype=f64), r"\[4\].*\[4, 1\]"),
        ("sample_norms", "out", torch.tensor(0.0, dtype=f64), r"\[4\].*\[\]"),
        ("sample_norms", "out", torch.zeros(4), "float64.*float32"),
        ("sample_norms", "out", torch.zeros(8, dtype=f64)[::2], "dense"),
        ("sample_norms", "out", torch.zeros(1, dtype=f64).expand(4), "dense"),
        ("normalized_norms", "delta", torch.tensor(1.0), "0-dim"),
        ("normalized_norms", "output_grad", torch.ones(5), r"one value per sample, 4 .*\[5\]"),
        ("normalized_norms", "output_grad", torch.ones(4, 2), r"one value per sample, 4 .*\[4, 2\]"),
        ("normalized_norms", "output_grad", torch.tensor(1.0), r"one value per sample, 4 .*\[\]"),
        ("core.normalized_norms", "r", torch.zeros(8, dtype=f64)[::2], "dense"),
        ("core.normalized_norms", "r", torch.zeros(4), "float64.*float32"),
    ]
    for op in ("trajectory_step", "core.trajectory_step"):
        rows += [
            (op, "out", torch.zeros(2, 6, dtype=f64), r"\[2, 5\].*\[2, 6\]"),
            (op, "out", torch.zeros(3, 5, dtype=f64), r"\[2, 5\].*\[3, 5\]"),
            (op, "out", torch.zeros(10, dtype=f64), r"\[2, 5\].*\[10\]"),
            (op, "out", torch.zeros(2, 5), "float64.*float32"),
            (op, "out", torch.zeros(5, 2, dtype=f64).t(), "contiguous"),
            (op, "out", torch.zeros(4, 5, dtype=f64)[::2], "dense"),
            (op, "out", torch.zeros(1, 5, dtype=f64).expand(2, 5), "dense"),
        ]
        for state in ("prev", "deviation"):
            rows += [
                (op, f"{state}[0]", torch.zeros(4, 12)[:, ::2], "dense"),
                (op, f"{state}[0]", torch.zeros(1).expand(4, 6), "dense"),
                (op, f"{state}[1]", torch.zeros(1).expand(5), "dense"),
            ]
        for name in ("prev", "deviation"):
            rows += [
                (op, name, [torch.zeros(4, 6)], "2 tensors.*got 1"),
                (op, name, [], "2 tensors.*got 0"),
                (op, f"{name}[0]", torch.zeros(6, 4), r"\[4, 6\].*\[6, 4\]"),
                (op, f"{name}[1]", torch.zeros(4), r"\[5\].*\[4\]"),
                (op, f"{name}[1]", torch.zeros(5, 1), r"\[5\].*\[5, 1\]"),
                (op, f"{name}[1]", torch.tensor(0.0), r"\[5\].*\[\]"),
                (op, f"{name}[1]", torch.zeros(5, dtype=f64), "float32.*float64"),
                (op, f"{name}[1]", torch.zeros(5, dtype=torch.bfloat16), "float32.*bfloat16"),
            ]
    for op in ("update_sums", "core.update_sums"):
        rows.append((op, "gradients[0]", torch.zeros(6, 4), r"\[4, 6\].*\[6, 4\]"))
        for name in ("first", "second", "previous"):
            rows += [
                (op, name, [torch.zeros(4, 6)], "2 tensors.*got 1"),
                (op, f"{name}[0]", torch.zeros(6, 4), r"\[4, 6\].*\[6, 4\]"),
                (op, f"{name}[1]", torch.zeros(5, 1), r"\[5\].*\[5, 1\]"),
            ]
    rows += [
        ("core.update_sums", "params[0]", torch.zeros(4, 12)[:, ::2], "dense"),
        ("core.update_sums", "first[0]", torch.zeros(6, 4).t(), "layout"),
        ("core.update_sums", "rows", torch.zeros(2, 6, dtype=f64), r"\[2, 5\].*\[2, 6\]"),
        ("core.update_sums", "rows", torch.zeros(2, 5), "float64.*float32"),
        ("core.update_sums", "rows", torch.zeros(5, 2, dtype=f64).t(), "contiguous"),
        ("core.update_sums", "squares", torch.zeros(5, 3, dtype=f64), r"\[5, 2\].*\[5, 3\]"),
        ("core.update_sums", "squares", torch.zeros(5, 2), "float64.*float32"),
    ]
    return [pytest.param(*row, id=f"{row[0]}-{row[1]}-{i}") for i, row in enumerate(rows)]


@pytest.mark.parametrize(("op", "slot", "value", "words"), misfits())
def test_tensors_that_do_not_belong_together(op, slot, value, words):
    op = next(o for o in OPS if o.name == op)
    good = put(op.arguments(), slot, value)
    before = snapshot(good)
    with pytest.raises(ValueError, match=words) as caught:
        op.call(good)
    assert str(caught.value).startswith(f"{slot}: ")
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(good), strict=True))


@pytest.mark.parametrize("count", [0, -1, "2", 1.5, None])
def test_count(count):
    op = next(o for o in OPS if o.name == "trajectory_step")
    good = op.arguments()
    before = snapshot(good)
    with pytest.raises((TypeError, ValueError), match="count"):
        op.call(good | {"count": count})
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(good), strict=True))


# ---- memory that is written to and is something else's too


def overlaps() -> dict[str, Callable[[dict[str, Any]], tuple[str, Any]]]:
    """name -> (argument, replacement) made of good arguments of trajectory_step whose tensors are [6, 6] and [5]."""

    def beside(a: dict[str, Any]) -> Tensor:
        memory = torch.zeros(11, 6)
        a["params"][0] = memory[:6]
        return memory[5:]

    def inside(tensor: Tensor, begin: int, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(0, dtype=dtype).set_(tensor.untyped_storage())[begin : begin + count]

    def out_in(name: str, begin: int) -> Callable[[dict[str, Any]], tuple[str, Any]]:
        return lambda a: ("out", inside(a[name][0], begin, 10, f64).view(2, 5))

    return {
        "prev_is_deviation": lambda a: ("prev[0]", a["deviation"][0]),
        "deviation_is_prev": lambda a: ("deviation[1]", a["prev"][1]),
        "prev_is_params": lambda a: ("prev[0]", a["params"][0]),
        "deviation_is_params": lambda a: ("deviation[0]", a["params"][0]),
        "prev_is_a_parameter's_data": lambda a: ("prev[0]", a["params"][0].data),
        "prev_is_transposed_params": lambda a: ("prev[0]", a["params"][0].t()),
        "deviation_is_transposed_params": lambda a: ("deviation[0]", a["params"][0].t()),
        "deviation_is_transposed_prev": lambda a: ("deviation[0]", a["prev"][0].t()),
        "prev_overlaps_params_by_a_row": lambda a: ("prev[0]", beside(a)),
        "prev_in_another_of_params": lambda a: ("prev[1]", inside(a["params"][0], 31, 5, f32)),
        "prev_in_another_of_prev": lambda a: ("prev[1]", inside(a["prev"][0], 0, 5, f32)),
        "out_in_params": out_in("params", 0),
        "out_in_prev": out_in("prev", 3),
        "out_in_deviation": out_in("deviation", 5),
    }


def square_arguments() -> dict[str, Any]:
    shapes = [(6, 6), (5,)]
    lists = {n: [values(s, f32, i) for s in shapes] for i, n in enumerate(("params", "prev", "deviation"))}
    return lists | {"count": 2, "out": torch.zeros(2, 5, dtype=f64)}


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "state_transposed"])
@pytest.mark.parametrize("overlap", overlaps())
@pytest.mark.parametrize("op", [op for op in OPS if op.name.endswith("trajectory_step")], ids=lambda op: op.name)
def test_overlap_in_a_step(op, overlap, transposed):
    """Also where the layouts differ, so that params are copied before the core sees them."""
    good = square_arguments()
    if transposed:
        for name in ("prev", "deviation"):
            good[name][0] = good[name][0].t().contiguous().t()
    slot, value = overlaps()[overlap](good)
    bad = put(good, slot, value)
    before = snapshot(bad)
    with pytest.raises(ValueError, match=r"memory|layout") as caught:
        op.call(bad)
    assert str(caught.value).split("[")[0].split(":")[0] in ("prev", "deviation", "out", "params")
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(bad), strict=True))


@pytest.mark.parametrize("name", ["params", "first", "second", "gradients", "previous"])
@pytest.mark.parametrize("result", ["rows", "squares"])
def test_results_of_update_sums_inside_an_argument(result, name):
    good = next(op for op in OPS if op.name == "core.update_sums").arguments()
    memory = torch.zeros(24, dtype=f64)
    good[name][0] = memory.view(f32)[24:].view(4, 6)
    inside = memory[14:].view(2, 5) if result == "rows" else memory[14:].view(5, 2)
    with pytest.raises(ValueError, match=rf"^{result}: .*memory with {name}\[0\]"):
        next(op for op in OPS if op.name == "core.update_sums").call(good | {result: inside})


@pytest.mark.parametrize("where", [slice(0, 4), slice(8, 12)], ids=["start", "end"])
@pytest.mark.parametrize("dtype", [f64, f32])
def test_out_inside_x(dtype, where):
    memory = torch.arange(12, dtype=f64)
    x = memory.view(dtype).view(4, -1)
    before = bits(memory).clone()
    with pytest.raises(ValueError, match=r"^out: .*memory"):
        functional.sample_norms(x, out=memory[where])
    with pytest.raises(ValueError, match=r"^out: .*memory"):
        functional.sample_norms(x[:, ::2], out=memory[where])
    assert torch.equal(bits(memory), before)


@pytest.mark.parametrize("slot", ["out", "prev[0]", "deviation[1]"])
def test_state_with_the_negative_bit(slot):
    """Writing through the flag would flip every sign."""
    op = next(o for o in OPS if o.name == "trajectory_step")
    good = op.arguments()
    tensor = get(good, slot)
    negative = torch.view_as_complex(torch.stack([tensor, tensor], -1).contiguous()).conj().imag
    assert negative.is_neg()
    before = snapshot(good)
    with pytest.raises(ValueError, match=r"negative bit|dense") as caught:
        op.call(put(good, slot, negative))
    assert str(caught.value).startswith(f"{slot}: ")
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(good), strict=True))
    dense_negative = torch._neg_view(tensor.clone())
    with pytest.raises(ValueError, match="negative bit"):
        op.call(put(good, slot, dense_negative))


# ---- devices


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "slot"),
    [
        pytest.param(op, slot, id=f"{op.name}-{slot}")
        for op in OPS
        if op.full_check and not op.name.startswith("Trajectory.")
        for slot in op.slots
    ],
)
def test_mixed_devices(op, slot):
    good = op.arguments()
    before = snapshot(good)
    with pytest.raises(ValueError, match=r"device|cuda"):
        op.call(put(good, slot, get(good, slot).cuda()))
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(good), strict=True))


def test_good_arguments_are_good():
    """Otherwise the tests above would prove nothing."""
    for op in OPS:
        op.call(op.arguments())
