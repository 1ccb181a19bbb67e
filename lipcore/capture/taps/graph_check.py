"""The check of an input tap, through the graph of the user's own pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from lipcore import functional
from lipcore.capture.checkpoints import runs_forward
from lipcore.capture.proof import own_backward
from lipcore.capture.taps.collector import Collector, MicroBatch
from lipcore.capture.taps.site import Site
from lipcore.capture.taps.tap import InputTap
from lipcore.capture.taps.trial import NOT_DIFFERENTIABLE, two_of
from lipcore.models.outputs import nodes_before
from lipcore.models.restored import all_put_back


class GraphCheck:
    """The gradients of two samples' outputs at the input, through the same graph, to be compared with what the taps
    bring.

    Args:
        model: whose buffers and random numbers are put back.
        tap: on the input.
        micro: the pass.
        site: at the model's output, where the check begins.
        output: that output in the graph.
        at: the input in the graph.
    """

    def __init__(
        self,
        model: nn.Module,
        tap: InputTap,
        collector: Collector,
        micro: MicroBatch,
        site: Site | None,
        output: GradientEdge,
        at: GradientEdge,
    ) -> None:
        self.micro, self.site = micro, site
        self._model, self._tap, self._collector = model, tap, collector
        self._output, self._at = output, at

    def run(self, grad_output: Tensor) -> None:
        """Take the two samples' gradients at the input, given the gradient at the output; leave the training as it
        is."""
        collector, tap = self._collector, self._tap
        collector.check = None
        size = grad_output.shape[0] if grad_output.dim() else 1
        if not size:
            return
        some = two_of(size)
        others = torch.ones(size, dtype=torch.bool, device=grad_output.device)
        others[some] = False
        seed = grad_output.masked_fill(others.reshape(-1, *[1] * (grad_output.dim() - 1)), 0)
        if not grad_output.dim():
            seed = grad_output
        collector.under_way.checking = True
        again = any(map(runs_forward, nodes_before([self._output.node])))
        try:
            with (
                all_put_back(self._model, random=True, writes=again),
                own_backward(self._output.node),
            ):
                (found,) = torch.autograd.grad([self._output], [self._at], [seed], retain_graph=True, allow_unused=True)
            if found is None:
                tap.refuse(NOT_DIFFERENTIABLE)
            elif found.shape[0] == size:
                self.micro.checks[tap.check_key] = functional.sample_norms(found.detach())
        except Exception as error:
            tap.refuse(f"autograd.grad through the same graph raises {type(error).__name__}: {error}")
        finally:
            collector.under_way.checking = False
