"""The Monitor, the front door: metrics on one model by default, the plan of what they cost, and fixed points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lipcore.alarms.alarms import Alarms
from lipcore.alarms.attach import AlarmChoice, checked_alarms, prepare_for
from lipcore.capture.layers.layer_capture import LayerCapture
from lipcore.distributed.group import AUTO
from lipcore.metric.protocol import Metric
from lipcore.metric.rank_part import RankPart
from lipcore.metric.results import HISTORY_BYTES, MetricResult, Window
from lipcore.models.arguments import check_count
from lipcore.monitor.alarmed import Alarmed
from lipcore.monitor.defaults import default_metrics
from lipcore.monitor.fixed_points import Probe, Probes
from lipcore.monitor.logged import Logged, LoggedListener, check_logged
from lipcore.monitor.plan import Plan
from lipcore.monitor.prove import prove_together
from lipcore.monitor.show import shown
from lipcore.per_sample.metric import PerSampleMetric
from lipcore.per_sample.sample_names import checked_ids, checked_losses
from lipcore.recording.flight import checked_generator


class Monitor(Alarmed):
    """Observer of a model in training, by hooks alone: the model and the loop stay as they are.

    Time is counted in optimizer steps. The metrics observe every step. A window closes by itself after `window_steps`
    steps, or when you call :meth:`close_window`; its results go to :attr:`history` and to :meth:`pop_window`. A window
    has at least one step: where there is none, :meth:`compute` and :meth:`close_window` return None.

    Nothing is raised inside your forward or backward pass. An error there stops the recording and warns; it is raised
    by the next call of a method of this class, or at the end of the with block. A warning that your filters turn into
    an error is kept in the same way.

    Args:
        model: the module that your loop calls (the result of torch.compile or DDP where you use them), or a dict of
            modules when only their parameters are to be measured.
        optimizer: the object whose step() your loop calls: an optimizer, or a wrapper around one (Lookahead, SAM,
            accelerate's); or several that step in turn: a step is over when all of them have stepped. Without one,
            call :meth:`step` after every step.
        metrics: default [Trajectory(), Lipschitz()], the latter only where the output is a tensor. Where the copies
            that this Trajectory takes would be more than 5 % of model and optimizer together, and more than 64 MiB, it
            does without (mode "updates"), as :meth:`plan` says.
        window_steps: steps in a window; None: one window stays open until close_window() is called.
        window_blocks: with more than one, windows slide: every window_steps / window_blocks steps a window closes that
            covers the last window_steps steps (fewer at the start).
        scaler: a torch.amp.GradScaler, whose scale is then taken out of gradient norms; that of a trainer's wrapper
            around the optimizer (accelerate's, Lightning's) is found.
        group: the ranks whose windows :meth:`global_window` merges: "auto", the default process group, where there is
            one; a ProcessGroup or a DeviceMesh; None, none: for models that each rank trains for itself.
        timeout: seconds that it waits for the other ranks.
        prefix: what stands before the names of parameters, for the stages of a pipeline: "stages.1".
        history_limit: how many closed windows are kept.
        history_bytes: for how many bytes of them: see :class:`lipcore.metric.results.History`.
        alarms: "default", or a :class:`lipcore.alarms.Alarms`: tell of steps that are not as usual, and of the layer;
            what they have told stands in ``monitor.alarms.events``. They need a Trajectory among the metrics.

    >>> import torch
    >>> model = nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with Monitor(model, optimizer, window_steps=2) as monitor:
    ...     for _ in range(4):
    ...         loss = model(torch.ones(5, 3)).square().mean()
    ...         loss.backward(); optimizer.step(); optimizer.zero_grad()
    >>> [window.steps for window in monitor.history]
    [2, 2]
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        metrics: Iterable[Metric] | None = None,
        *,
        window_steps: int | None = 100,
        window_blocks: int = 1,
        history_limit: int = 1000,
        history_bytes: int = HISTORY_BYTES,
        scaler: Any = None,
        group: Any = AUTO,
        timeout: float = 60,
        prefix: str = "",
        alarms: Alarms | AlarmChoice | None = None,
    ) -> None:
        given = model
        if isinstance(model, Mapping) and all(isinstance(part, nn.Module) for part in model.values()):
            model = nn.ModuleDict(model)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if not (metrics is None or isinstance(metrics, Iterable)) or isinstance(metrics, type):
            raise TypeError(f"metrics: expected a list of lipcore metrics, got {metrics!r}")
        if metrics is None:
            metrics = default_metrics(given, optimizer)
        metrics = list(metrics)
        self.alarms = checked_alarms(alarms, metrics)  #: None without `alarms`
        prepare_for(self.alarms, metrics)
        self._probes, self._logged = Probes(), Logged()
        self._meets = self._parted = self._waits_to_begin = self._set_by_hand = False
        self._flight = self._stopwatch = self._recorder = self._snapshots = self._samples_after = None
        super().__init__(
            model,
            optimizer,
            metrics=metrics,
            window_steps=window_steps,
            window_blocks=window_blocks,
            history_limit=history_limit,
            history_bytes=history_bytes,
            scaler=scaler,
            group=group,
            timeout=timeout,
            prefix=prefix,
        )
        self._listeners.append(LoggedListener(self._logged))
        if self.alarms is not None:
            self._attach_alarms(self.alarms)

    def __getstate__(self) -> dict[str, Any]:
        nothing = dict.fromkeys(("_flight", "_stopwatch", "_recorder", "_snapshots", "_samples_after"))
        return super().__getstate__() | {"_probes": Probes(), "_logged": Logged()} | nothing

    def plan(self) -> Plan:
        """Return what is measured, by which rule, for how many bytes."""
        lines = {name: metric.plan() for name, metric in self.metrics.items()}
        return Plan(lines, self._windows.rule, str(self._clock), (self.history.maxlen, self.history.bytes_limit))

    def _own_state(self) -> dict[str, Any]:
        """Return what was logged in the open window."""
        return {"logged": self._logged.state_dict()}

    def _loaded_own(self, own: dict[str, Any]) -> Callable[[], None]:
        """Check what was logged in the open window of the state; the function returned goes on with it."""
        logged = Logged()
        if own:
            logged.load_state_dict(own.get("logged"))
        return lambda: self._logged.take_over(logged)

    def log(self, **numbers: Tensor | float) -> None:
        """Take numbers that the loop knows: the loss, the learning rate, the tokens so far.

        They stand in each closed window as ``window["logged"].loss["total"]`` (mean, min, max and last of the calls in
        it; in a window of all ranks, of the calls on all of them, and `last` is the mean of each rank's last), and in
        the record of :func:`lipcore.watch` by step. Under watch() with several ranks it is also where these
        meet: the first call after a window has closed merges it with those of the others (:meth:`global_window`), so
        every rank has to call it. No device is waited for: tensors are read later. A call
        belongs to the step that comes next, or to the last one, as the first call of all came before the first step or
        after it; several calls in one step (micro-batches) are averaged in the record.

        Called before ``loss.backward()``, in every micro-batch, it also hands the loss to the metrics that want it:
        ``PerSampleGradNorms(loss_reduction="auto")`` reads from its graph what it was divided by, as
        :meth:`lipcore.PerSampleGradNorms.set_loss` does; where it cannot, the norms are NaN and say why.

        Args:
            numbers: each a number, or a tensor with one; ``loss`` is the one that backward() is called on, or the part
                of it that is made of the samples' terms.

        Raises:
            TypeError: no number.
            ValueError: a tensor of several numbers.
        """
        self._log(numbers, numbers.get("loss"))

    def _log(self, numbers: Mapping[str, Any], loss: Any) -> None:
        """Take numbers, and hand the loss that backward() is called on to the metrics: what trainers have made of the
        one that is logged, dividing and scaling it."""
        check_logged(numbers)
        self._stop_together(merges=True)
        self._failures.raise_kept()
        if isinstance(loss, Tensor) and loss.grad_fn is not None:
            self._call(self.metrics.values(), lambda metric: metric.observe_loss(loss))
        if not (self._closed or self._failures.all_stopped):  # no step comes any more that they are of
            self._logged.add(self._steps_made, self._steps_here, numbers)
        if self._meets and self._global.waits:
            self._meet()
            self._failures.raise_kept()  # an alarm of any rank may end the training, on all of them here

    def log_batch(
        self,
        ids: Any = None,
        *,
        losses: Tensor | None = None,
        rng_state: Tensor | None = None,
        epoch: int | None = None,
    ) -> None:
        """Say which samples the next backward pass is of; call it before ``loss.backward()``, in every micro-batch.

        Every metric of single samples takes the ids and the losses, as by its ``set_ids()`` and ``set_losses()``: the
        numbers are kept by id in its ``scores`` and ``loss_scores``. The record of :func:`lipcore.watch` keeps them of
        the last 512 steps and around alarms, so that ``lipcore postmortem`` names samples. No device is waited for.

        Args:
            ids: integers [B].
            losses: floating-point numbers [B], each sample's own.
            rng_state: what ``torch.get_rng_state()`` returned before the batch was made, to make it once more.
            epoch: the number of the pass through the dataset, in which every sample is to come once: alarms tell of
                samples that come again, or do not come. None: not looked at.

        Raises:
            ValueError, TypeError: one of them is no such thing; losses or an epoch without ids.
        """
        if losses is not None and ids is None:
            raise ValueError("ids: losses were given without the ids of their samples; pass ids= too")
        if epoch is not None:
            check_count("epoch", epoch, least=0)
            if ids is None:
                raise ValueError("ids: an epoch was given without the ids of its samples; pass ids= too")
        found = None if ids is None else checked_ids(ids)
        each = None if losses is None or found is None else checked_losses(losses, found)
        generator = checked_generator(rng_state)
        self._stop_together(merges=False)
        self._failures.raise_kept()
        if found is not None:
            self._call(self.metrics.values(), lambda metric: metric.observe_batch(found, each))
        if self.alarms is not None and found is not None and epoch is not None:
            self.alarms._batch(self._steps_made + 1, epoch, found)
        if self._flight is not None and not (self._closed or self._failures.all_stopped):
            self._flight.name_batch(found, each, generator)

    def prove(self, batch: Any) -> dict[str, str]:
        """Prove that the rows of a batch's gradients are single samples', by passes that all ranks run together: under
        FSDP2 statistics over the batch that a model may detach are looked for in no other way, and numbers are not
        labelled exact before. From then on those of passes with as many samples that do the same are. For Lipschitz of
        a sharded model it shows that W_1 stands alone on the model's input, without which there is no lambda.

        Every rank of the group calls it at the same step, between two steps (no backward pass is waited for), with a
        batch of its own as the training's are. The model runs forward, and backward to activations alone: no parameter
        gets a gradient, and buffers, attributes and random numbers get their values back; no window has anything of it.
        A few steps' time.

        Args:
            batch: what the model is called with: a tensor, a tuple of arguments, or a dict of keywords.

        Returns:
            by metric of single samples what is not proved, and on which rank; "" where all is. The same on all ranks.

        Raises:
            RuntimeError: a rank has not come in time, or is at another step; nothing was run.
            ValueError: ranks have other metrics, or one that has stopped; `group=` lacks ranks of the model; there
                is no metric of single samples. Nothing was run.
        """
        self._failures.raise_kept()
        metrics = {n: one for n, one in self.metrics.items() if isinstance(one, PerSampleMetric)}
        captures = {name: one._capture for name, one in metrics.items() if isinstance(one._capture, LayerCapture)}
        # One at rest without hooks has nothing to prove: it looks at the model anew when it wakes.
        captures = {n: one for n, one in captures.items() if not metrics[n].rests or one.proves_at_rest}
        at_inputs = self._capture.to_prove
        taps = {name: metric.needs().taps for name, metric in self.metrics.items()}
        inputs = {name: at.prove for name, mine in taps.items() for tap, at in at_inputs.items() if tap in mine}
        if not captures and not inputs:
            raise ValueError("metrics: there is none of single samples' gradients, and so nothing to prove")
        self.flush()
        off = [name for name, metric in self.metrics.items() if metric.off]
        return prove_together(self.model, captures, batch, self._global.partners, self._windows.step, off, inputs)

    def _meet(self) -> None:
        """Merge the closed windows with those of the other ranks, which log at the same step."""
        try:
            self._merge_windows()
        except (RuntimeError, ValueError) as error:
            self._meets, self._parted = False, True
            self._tell(lambda listener: listener.ranks_part())
            self._failures.warn(
                f"lipcore merges the windows of all ranks no more, and each rank goes on with its own: {error}. Call "
                "monitor.log() on every rank at the same steps, or pass group=None"
            )

    @property
    def _newest(self) -> Window | None:
        """The newest window for who writes numbers on: of all ranks where they are merged, else of this one."""
        together = self._meets and self._global.partners.find() is not None
        windows = self.global_history if together else self.history
        return windows[-1] if windows else None

    def _results_at_close(self) -> dict[str, MetricResult]:
        """Measure the fixed points, and read what was logged."""
        logged = self._logged.result(self._windows.begin + 1, self._windows.step)
        found = {} if logged is None else {"logged": logged}
        if not self._probes:
            return found
        result, errors = self._probes.finalize()
        for name, error in errors.items():
            self._failures.warn(f"lipcore could not measure the probe {name!r}: {error}")
        return found | {"probes": result}

    def _parts_at_close(self) -> dict[str, RankPart]:
        """Return what was logged, for all ranks."""
        return {"logged": self._logged.part()}

    def probe(
        self,
        x: Tensor,
        name: str,
        *,
        output: int | str | Callable[[Any], Tensor] | None = None,
        regions: bool = False,
        batch_size: int = 1024,
    ) -> Probe:
        """Measure the exact local Lipschitz constants at fixed points whenever a window closes: at held-out inputs, at
        inputs off the data's manifold, at any others.

        They come as ``window["probes"].local_lipschitz[name]`` (mean, min, max, p50, p99), a curve beside that of the
        training samples. The model is run in eval mode for it, forward and backward once per window; no parameter's
        gradient is touched. Where training diverged, constants that are not finite are left out of the numbers and the
        regions are NaN. A probe that cannot be measured any more is warned of, its numbers are not valid and their note
        says why; the run goes on.

        Args:
            x: [N, ...] on the model's device, finite; a copy is kept.
            name: where the numbers stand.
            output: as in :func:`lipcore.local_lipschitz`.
            regions: also count the linear regions that hold the points, and the share of points whose region is another
                one than at the last close (ReLU-family activations only).
            batch_size: points per forward pass.

        Returns:
            the probe: its ``values`` are the constants of every point as last measured, at first those of now.

        Raises:
            ValueError: the name is taken; what :func:`lipcore.local_lipschitz` and, with regions, activation_patterns
                refuse.
            TypeError: x is not a floating tensor; the Monitor watches a dict of modules.

        >>> import torch
        >>> model = nn.Linear(3, 1)
        >>> monitor = Monitor(model)
        >>> probe = monitor.probe(10 * torch.ones(4, 3), "far")
        >>> monitor.step(); monitor.close_window()["probes"].local_lipschitz["far"].mean.count
        4
        """
        if isinstance(self.model, nn.ModuleDict):
            raise TypeError("model: probe() needs a module that can be called, not a dict of modules")
        self._probes.check_name(name)
        probe = Probe(self.model, x, name, output, regions, batch_size)
        self._probes.add(probe)
        return probe

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._conclude()
            return
        self._tell(lambda listener: listener.interrupted(self._windows.step, error))
        super().__exit__(kind, error, trace)

    def _conclude(self) -> None:
        """Close at the end of a training that nothing has broken off, which all ranks come to: windows that have closed
        since the last call of log() are merged as in one, where log() has been called at all."""
        if self._meets and self._global.waiting and self._global.partners.find() is not None and not self._closed:
            self._meet()
        self.close()

    def __repr__(self) -> str:
        return shown(self).text()

    def _repr_html_(self) -> str:
        return shown(self).html()
