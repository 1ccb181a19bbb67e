"""A real training small enough for a benchmark: a two-layer transformer that learns synthetic text by characters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

_ALPHABET, _LENGTH, _WIDTH, _BATCH = 32, 32, 64, 16


class SmallTransformer(nn.Module):
    """106,000 parameters in 30 tensors; embeddings, attention, LayerNorm and Linear, as in the large ones."""

    def __init__(self, width: int = _WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_ALPHABET, width)
        self.position = nn.Parameter(0.02 * torch.randn(_LENGTH, width))
        shape = {"d_model": width, "nhead": 4, "dim_feedforward": 4 * width, "dropout": 0.0}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(**shape, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _ALPHABET)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(_LENGTH), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        for layer in self.layers:
            x = layer(x, src_mask=self.mask)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _text(generator: torch.Generator) -> Callable[[], Tensor]:
    """Batches of a second-order Markov chain: each pair of characters has a few likely successors."""
    logits = 3 * torch.randn(_ALPHABET, _ALPHABET, _ALPHABET, generator=generator)
    chances = logits.softmax(dim=-1)

    def batch() -> Tensor:
        tokens = torch.randint(_ALPHABET, (_BATCH, _LENGTH + 1), generator=generator)
        for t in range(2, _LENGTH + 1):
            rows = chances[tokens[:, t - 2], tokens[:, t - 1]]
            tokens[:, t] = torch.multinomial(rows, 1, generator=generator).squeeze(1)
        return tokens

    return batch


OPTIMIZERS: dict[str, Callable[[Iterator[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1),
}


def train(optimizer_name: str, steps: int, *, seed: int = 0) -> Iterator[tuple[nn.Module, float]]:
    """(model, loss) before the first step (where the loss is NaN) and after every step."""
    torch.manual_seed(seed)
    model = SmallTransformer()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    batch = _text(torch.Generator().manual_seed(seed))
    yield model, float("nan")
    for _ in range(steps):
        tokens = batch()
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield model, loss.item()
