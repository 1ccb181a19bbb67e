"""What norms of per-sample gradients cost at least on a GPU: bytes, multiplications and launches of a layer, and the
time they take at the rates that vendors state. Computed from shapes; nothing here was timed.

    python bench/gpu/roofline.py            # the table of docs/cuda.md
"""

from __future__ import annotations

from dataclasses import dataclass

from lipcore import functional
from lipcore.functional.linear import made_by_torch


@dataclass(frozen=True)
class Device:
    """Rates of the data sheets: bytes, and operations (a multiplication and an addition are two) per second."""

    name: str
    bandwidth: float
    float32: float  #: without tensor cores
    bfloat16: float  #: with tensor cores, dense, sums in float32


DEVICES = (
    Device("H100 SXM", 3.35e12, 67e12, 989e12),
    Device("H200", 4.8e12, 67e12, 989e12),
    Device("RTX 4090", 1.008e12, 82.6e12, 165e12),
)


@dataclass(frozen=True)
class Layer:
    """One layer in one backward pass."""

    title: str
    way: str
    dtype: str
    operations: float  #: of the norms
    own: float  #: of the layer's own forward and backward pass
    read: float  #: bytes of inputs and of gradients at outputs
    launches: int  #: of lipcore's kernels and of torch's

    def microseconds(self, device: Device, operations: float) -> float:
        """Return the longer of both times."""
        narrow = self.dtype == "bfloat16" and not self.way.endswith("FMA")
        rate = device.bfloat16 if narrow else device.float32
        return max(operations / rate, self.read / device.bandwidth) * 1e6

    def own_microseconds(self, device: Device) -> float:
        """Return the least time of the layer's own passes, which read as much three times."""
        rate = device.bfloat16 if self.dtype == "bfloat16" else device.float32
        return max(self.own / rate, 3 * self.read / device.bandwidth) * 1e6


def _product_of(dtype: str) -> str:
    return "mma" if dtype == "bfloat16" else "FMA"


def linear(samples: int, tokens: int, inputs: int, outputs: int, dtype: str) -> Layer:
    """Return a Linear layer that sees sequences."""
    direct = 2.0 * samples * tokens * inputs * outputs
    size = 2 if dtype == "bfloat16" else 4
    gram = functional.linear_method(tokens, inputs, outputs, device="cuda") == "gram"
    by_torch = dtype == "bfloat16" and made_by_torch(samples, tokens, inputs, outputs, tensor_cores=True)
    half = samples * tokens * (tokens + 1.0) * (inputs + outputs)  # a Gram matrix is symmetric
    pieces = -(-samples * inputs * outputs // (1 << 23))
    return Layer(
        f"Linear {inputs} -> {outputs}, {samples} x {tokens}",
        "torch.bmm" if by_torch else f"{'Gram' if gram else 'direct'}, {_product_of(dtype)}",
        dtype,
        direct if by_torch or not gram else half,
        3 * direct,
        samples * tokens * (inputs + outputs) * size,
        3 * pieces + 1 if by_torch else 2,
    )


def conv(samples: int, channels: int, outputs: int, side: int, kernel: int, dtype: str) -> Layer:
    """Return a convolution with square images and kernels and outputs as large as its inputs."""
    positions, patch = side**2, channels * kernel**2
    direct = 2.0 * samples * positions * patch * outputs
    half = samples * positions * (positions + 1.0) * (patch + outputs)  # a Gram matrix is symmetric
    shape = [samples, channels, side, side], [samples, outputs, side, side]
    padding = [kernel // 2] * 2
    way = functional.conv_method(*shape, kernel_size=[kernel] * 2, padding=padding, device="cuda")
    size = 2 if dtype == "bfloat16" else 4
    read = samples * positions * (channels + outputs) * size
    title = f"Conv2d {channels} -> {outputs}, {kernel} x {kernel}, {samples} x {side} x {side}"
    words = f"{'Gram' if way == 'gram' else 'direct'}, {_product_of(dtype)}"
    return Layer(title, words, dtype, half if way == "gram" else direct, 3 * direct, read, 2)


def rows(samples: int, tokens: int, features: int, dtype: str) -> Layer:
    """Return a LayerNorm's scale and bias."""
    elements = samples * tokens * features
    size = 2 if dtype == "bfloat16" else 4
    return Layer(f"LayerNorm {features}, {samples} x {tokens}", "sums", dtype, 4.0 * elements, 20.0 * elements,
                 2 * elements * size, 2)  # fmt: skip


def embedding(samples: int, tokens: int, width: int, dtype: str) -> Layer:
    """Return an embedding: a sort of the tokens, and one reading of the gradients."""
    elements = samples * tokens * width
    size = 2 if dtype == "bfloat16" else 4
    return Layer(f"Embedding, width {width}, {samples} x {tokens}", "sorted runs", dtype, 2.0 * elements,
                 2.0 * elements, elements * size, 5)  # fmt: skip


LAYERS = (
    linear(8, 1024, 768, 3072, "bfloat16"),
    linear(8, 2048, 4096, 4096, "bfloat16"),
    linear(64, 65, 768, 3072, "bfloat16"),
    linear(8, 1024, 768, 3072, "float32"),
    linear(64, 65, 768, 3072, "float32"),
    linear(256, 16, 512, 512, "float32"),
    conv(64, 64, 128, 32, 3, "float32"),
    conv(64, 64, 128, 32, 3, "bfloat16"),
    conv(64, 512, 512, 7, 3, "float32"),
    conv(64, 512, 512, 7, 3, "bfloat16"),
    rows(8, 1024, 768, "bfloat16"),
    embedding(8, 1024, 768, "bfloat16"),
)


def table() -> list[str]:
    """Return the lines of a table in markdown."""
    head = ["layer", "dtype", "way", "GFLOP", "MB read", "launches"]
    head += [f"{device.name}, us (of the layer's own)" for device in DEVICES]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for layer in LAYERS:
        cells = [layer.title, layer.dtype, layer.way, f"{layer.operations / 1e9:.3g}", f"{layer.read / 1e6:.3g}"]
        cells.append(str(layer.launches))
        for device in DEVICES:
            least = layer.microseconds(device, layer.operations)
            cells.append(f"{least:.3g} ({least / layer.own_microseconds(device):.2g})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
