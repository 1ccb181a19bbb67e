"""Models of the transformers library under its own tensor-parallel plan (`tp_plan="auto"`), each beside the same model
in one float64 process that computes the gradient of every sample by itself."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from sample_situations import quiet
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, Trajectory

NAME, STEPS, BATCH, LENGTH = "per_sample_grad_norm", 3, 4, 9
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
#: Architectures whose plans cut in other ways, and what their configuration has beside the sizes.
RIGHT: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},  # biases cut with the weights
    "gpt_neox": {},  # fused projections of attention; biases whole beside a cut weight; LayerNorm
    "phi3": {},  # fused projections of attention and gates, gathered; layers behind them cut what comes in
    "olmo2": {},  # norms of queries and keys that are gathered for them
    "starcoder2": {},
}


def trained(
    model: Any, metrics: list[Any], work: Callable[[Tensor], Any], group: str | None = "auto"
) -> tuple[Any, list[Any]]:
    """The window of some steps, and what `work` gives behind each of their backward passes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator, found = torch.Generator().manual_seed(0), []
    with Monitor(model, optimizer, metrics, window_steps=STEPS, timeout=20, group=group) as monitor:
        for _ in range(STEPS):
            ids = torch.randint(1, SIZES["vocab_size"], (BATCH, LENGTH), generator=generator)
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            found.append(work(ids))
            optimizer.step()
        return (monitor.pop_window() if group is None else monitor.global_window()), found


def loaded(kind: str, settings: dict[str, Any], *, parts: int = 1) -> Any:
    """A model of this kind as a checkpoint has it that one rank has written, in parts on so many ranks."""
    import transformers
    from transformers.distributed import DistributedConfig

    transformers.utils.logging.disable_progress_bar()
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **SIZES, **settings)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder[0])
    dist.barrier()
    plan = {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=parts)} if parts > 1 else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder[0], dtype=torch.float64, **plan)


def norms_alone(model: nn.Module, ids: Tensor) -> list[float]:
    parameters, found = [p for p in model.parameters() if p.requires_grad], []
    for one in ids:
        loss = model(input_ids=one[None], labels=one[None]).loss
        gradients = torch.autograd.grad(loss, parameters)
        found.append(float(torch.stack([g.norm() for g in gradients]).norm()))
    return found


def beside_one_process(kind: str, settings: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    def metrics() -> list[Any]:
        return [Trajectory(), Lipschitz(output="logits")]

    model = loaded(kind, settings)
    expected, alone = trained(model, metrics(), lambda ids: norms_alone(model, ids), group=None)
    model = loaded(kind, settings, parts=world)
    norms = PerSampleGradNorms(loss_reduction="mean")
    window, found = trained(model, [*metrics(), norms], lambda ids: norms.sync_norms().tolist())
    errors = [abs(a / b - 1) for one, two in zip(found, alone, strict=True) for a, b in zip(one, two, strict=True)]
    numbers, right = window.flat(), expected.flat()
    taken = [key for key, value in right.items() if value == value and "variance" not in key]
    return {
        "off": window.off,
        "samples": max(errors),
        "worst": max((abs(numbers.get(key, torch.nan) / right[key] - 1) if right[key] else 0.0, key) for key in taken),
        "cut": sum(hasattr(p, "placements") for p in model.parameters()),
    }


def heads_normalised(rank: int, world: int) -> dict[str, Any]:
    """A norm over each head's features sees the heads of its rank, so that its gradient is a sum over ranks."""
    found = {}
    for unsupported in ("error", "skip"):
        model = loaded("qwen3", {"head_dim": 4}, parts=world)
        norms = PerSampleGradNorms(loss_reduction="mean", on_unsupported=unsupported)  # type: ignore[arg-type]
        try:
            window, _ = trained(model, [norms], lambda ids: None)
            found[unsupported] = [place for place, values in window[NAME].norm.items() if values.mean.valid]
        except ValueError as error:
            found[unsupported] = str(error)
    return found


def proved(rank: int, world: int) -> dict[str, Any]:
    model = loaded("llama", {}, parts=world)
    norms = PerSampleGradNorms(loss_reduction="mean")
    ids = torch.randint(1, SIZES["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    with Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), [norms], timeout=20) as monitor:
        return {"said": monitor.prove({"input_ids": ids, "labels": ids})}


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each."""
    for kind, settings in RIGHT.items():
        yield kind, ranks, quiet(functools.partial(beside_one_process, kind, settings))
    for work in (heads_normalised, proved):
        yield work.__name__, ranks, quiet(work)
