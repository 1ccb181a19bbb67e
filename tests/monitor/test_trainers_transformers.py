"""lipcore with transformers' Trainer: a callback that makes the Monitor, and losses as the Trainer has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from trainers import (
    LAMBDA,
    NORM,
    PATH,
    Recorder,
    X,
    Y,
    gradient_norm,
    metrics,
    near,
    network,
    no_word_of_ours,
    run_both,
    vector,
)

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, Trajectory

pytestmark = pytest.mark.ci


class Regression(nn.Module):
    """The network as transformers' Trainer wants it: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        output = self.net(x)
        return {"loss": mse_loss(output, labels), "logits": output}


def rows() -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]


class HuggingFace:
    """A Trainer with two callbacks, one that records and one that is lipcore's.

    Args:
        make: the model.
        data: rows for the default collator.
        watched: what the Monitor watches: made of the Trainer's model; None: no Monitor.
        chosen: its metrics, of which the last one has norms per sample.
        resume: a checkpoint.
        sets_loss: whether the metric is told every loss; it reads that of a model which returns one.
        arguments: of TrainingArguments.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        data: list[dict[str, Tensor]],
        folder: Path,
        chosen: list[Any] | None = None,
        watched: Callable[[Any], Any] | None = None,
        resume: str | None = None,
        sets_loss: bool = False,
        **arguments: Any,
    ) -> None:
        transformers = pytest.importorskip("transformers")
        transformers.logging.set_verbosity_error()
        outer, self.record, self.batches, self.norms = self, Recorder(), [], []
        self.chosen, self.watched, self.monitor, self.window = chosen, watched, None, None

        class Trainer(transformers.Trainer):  # type: ignore[misc,name-defined]
            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **keywords: Any) -> Any:
                outer.batches.append(({k: v.clone() for k, v in model.state_dict().items()}, inputs))
                if isinstance(model, Regression):
                    outer.record.batch(model.net, inputs["x"], inputs["labels"])
                found = super().compute_loss(model, inputs, return_outputs, **keywords)
                if sets_loss and outer.chosen is not None:
                    outer.chosen[-1].set_loss(found[0] if return_outputs else found)
                return found

        class Record(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
            def on_train_begin(self, *_: Any, model: Any = None, optimizer: Any = None, **__: Any) -> None:
                outer.record.step(model)
                if outer.chosen is not None:
                    outer.monitor = Monitor(outer.watched(model), optimizer, outer.chosen, window_steps=None)

            def look(self, *_: Any, **__: Any) -> None:
                if outer.chosen is not None and isinstance(outer.chosen[-1], PerSampleGradNorms):
                    outer.norms.append(outer.chosen[-1].per_sample)

            on_substep_end = look

            def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
                outer.record.used.append(gradient_norm(model))

            def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
                outer.record.step(model)
                self.look()

            def on_train_end(self, *_: Any, **__: Any) -> None:
                if outer.monitor is not None:
                    outer.window = outer.monitor.compute()
                    outer.monitor.close()

        settings = {"save_strategy": "no", "num_train_epochs": 2, **arguments}
        self.model = make()
        self.trainer = Trainer(
            model=self.model,
            args=transformers.TrainingArguments(
                output_dir=str(folder),
                per_device_train_batch_size=4,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                logging_strategy="no",
                **settings,
            ),
            train_dataset=data,
            callbacks=[Record()],
        )
        self.trainer.remove_callback(transformers.PrinterCallback)
        self.trainer.train(resume_from_checkpoint=resume)
        # Where nothing is clipped, what the optimizer uses is what the backward pass has left.
        self.record.before = self.record.used


def hugged(watch: bool, folder: Path, **arguments: Any) -> tuple[Any, Recorder]:
    chosen = metrics() if watch else None
    common = {"max_grad_norm": 0, "sets_loss": True, **arguments}
    run = HuggingFace(Regression, rows(), folder, chosen, lambda model: model.net, **common)
    return run.window, run.record


@pytest.mark.parametrize("every", [1, 2, 4])
def test_transformers(every: int, tmp_path: Path) -> None:
    """With a module inside the model as what is watched."""
    with no_word_of_ours():
        run_both(lambda watch: hugged(watch, tmp_path, gradient_accumulation_steps=every))


def test_transformers_in_bfloat16(tmp_path: Path) -> None:
    with no_word_of_ours():
        run_both(lambda watch: hugged(watch, tmp_path, bf16=True), rel=2e-2)


def test_transformers_clips_and_resumes(tmp_path: Path) -> None:
    """Everything by the names in the model's output, over the steps after a checkpoint."""
    found = []
    for watch in (False, True):
        folder = tmp_path / str(watch)
        common = {"max_grad_norm": 0.05, "gradient_accumulation_steps": 2}
        HuggingFace(Regression, rows(), folder, save_strategy="steps", save_steps=2, **common)
        stats = ["path_length", "clipped_grad_norm"]
        chosen = [
            Trajectory(stats=stats),
            Lipschitz(input="x", output="logits"),
            PerSampleGradNorms(loss_reduction="auto"),
        ]
        with no_word_of_ours():
            again = str(folder / "checkpoint-2")
            found.append(
                HuggingFace(Regression, rows(), folder, chosen if watch else None, lambda m: m, again, **common)
            )
    control, watched = found
    assert all(torch.equal(a, b) for a, b in zip(watched.record.points, control.record.points, strict=True))
    window, record = watched.window, control.record
    assert window.steps == record.steps == 4
    assert window[PATH].path_length["total"].sum.value == near(record.path, 1e-5)
    assert window[PATH].clipped_grad_norm["total"].mean.value == near(0.05, 1e-5)
    for found_norms, expected in (
        (window[NORM].norm["total"], record.sample_norms()),
        (next(iter(window[LAMBDA].local_lipschitz.values())), record.lambdas()),
    ):
        assert found_norms.mean.count == len(expected)
        assert found_norms.mean.value == near(float(expected.mean()), 2e-5)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(  # type: ignore[no-any-return]
        transformers.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
        )
    )


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(  # type: ignore[no-any-return]
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
        )
    )


def sentences(tokens: bool) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(1, 50, (14, 8), generator=generator)
    labels = words.clone() if tokens else torch.randint(0, 3, (14,), generator=generator)
    if tokens:
        labels[::2, 5:] = -100
    return [{"input_ids": w, "labels": y} for w, y in zip(words, labels, strict=True)]


def one_at_a_time(make: Callable[[], nn.Module], batches: list[Any]) -> list[Tensor]:
    """Norms of single samples' gradients, of the sum of a sample's terms, float64."""
    found = []
    for state, inputs in batches:
        model, norms = make().double(), []
        model.load_state_dict(state)
        for i in range(len(inputs["labels"])):
            sample = {k: v[i : i + 1] for k, v in inputs.items()}
            terms = (sample["labels"][:, 1:] != -100).sum() if sample["labels"].dim() > 1 else 1
            model.zero_grad()
            (model(**sample).loss * terms).backward()
            norms.append(gradient_norm(model))
        found.append(torch.tensor(norms, dtype=torch.float64))
    return found


BERT = {"broadcast": ["bert.embeddings.position_embeddings"]}  # called on [1, T]
LLAMA = {"max_replay_bytes": 1 << 28}  # its RMSNorm is its own
LANGUAGE: dict[str, tuple[Callable[[], nn.Module], bool, dict[str, Any]]] = {
    "Bert": (bert, False, {"loss_reduction": "auto", **BERT}),
    "Llama": (llama, True, {"loss_reduction": "auto", **LLAMA}),
    "Llama, by the keyword": (
        llama,
        True,
        {"loss_reduction": "mean", "loss_terms": "num_items_in_batch", **LLAMA},
    ),
}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", LANGUAGE)
def test_per_sample_norms_of_a_language_model(name: str, every: int, tmp_path: Path) -> None:
    """The Trainer divides by the tokens of all micro-batches where the model's loss does, else by nothing."""
    make, tokens, settings = LANGUAGE[name]
    common = {"gradient_accumulation_steps": every, "num_train_epochs": 1}
    control = HuggingFace(make, sentences(tokens), tmp_path, **common)
    norms = PerSampleGradNorms(**settings)
    with no_word_of_ours():
        run = HuggingFace(make, sentences(tokens), tmp_path, [norms], lambda model: model, **common)
    assert torch.equal(vector(run.model), vector(control.model))
    expected = one_at_a_time(make, run.batches)
    assert len(run.norms) == len(expected) == 4
    for found, right in zip(run.norms, expected, strict=True):
        assert torch.allclose(found, right, rtol=2e-5, atol=0)
    assert run.window[NORM].norm["total"].mean.count == 14


def test_a_model_that_does_not_use_the_number_it_is_given(tmp_path: Path) -> None:
    """Bert takes the mean of a batch, whatever the Trainer says: no number, and the way out (tried above)."""
    norms = PerSampleGradNorms(loss_reduction="mean", loss_terms="num_items_in_batch", **BERT)
    with pytest.warns(UserWarning, match=r"divided by something else.*loss_reduction='auto' reads it"):
        run = HuggingFace(bert, sentences(False), tmp_path, [norms], lambda model: model, gradient_accumulation_steps=2)
    assert len(run.norms) == 8
    assert all(found.isnan().all() for found in run.norms)
    assert run.window[NORM].norm["total"].mean.count == 0


def test_constants_at_the_embedding_of_a_language_model(tmp_path: Path) -> None:
    def made() -> nn.Module:
        model = bert()
        model.config.num_labels = model.num_labels = 1  # type: ignore[union-attr]
        model.classifier = nn.Linear(16, 1)
        return model

    data = [{"input_ids": s["input_ids"], "labels": s["labels"].float()} for s in sentences(False)]
    with no_word_of_ours():
        run = HuggingFace(made, data, tmp_path, [Lipschitz(output="logits")], lambda model: model)
    expected = []
    for state, inputs in run.batches:
        model = made().double()
        model.load_state_dict(state)
        words = model.bert.embeddings.word_embeddings  # type: ignore[union-attr]
        for sample in inputs["input_ids"].split(1):
            held: list[Tensor] = []
            hook = words.register_forward_hook(lambda _, __, out: held.append(out.detach().requires_grad_()) or held[0])
            (gradient,) = torch.autograd.grad(model(input_ids=sample).logits.sum(), held[0])
            expected.append(float(gradient.norm()))
            hook.remove()
    found = next(iter(run.window[LAMBDA].local_lipschitz.values()))
    assert found.mean.count == len(expected) == 28
    assert found.mean.value == near(sum(expected) / 28, 1e-5)
    assert "at the output of Embedding" in found.mean.note
