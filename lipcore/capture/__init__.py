"""Every hook lipcore registers: how per-sample numbers get out of the backward pass.

=============== =======================================================================================
capture.py      Capture: registers the hooks on one model, once, and takes them off again
first_layer.py  finds the first layer by watching the model run, where its structure does not tell
site.py         the taps that share one module: what is saved for them, what comes out
forward_hook.py asks for the gradient at a site's output: by a node's hook in eager mode, else by a probe
collector.py    the forward and the backward pass under way; hands on what came back from all sites
probes.py       probes for the compiled regions, read when the clock ticks
layer_*.py      the same for all layers at once: per-sample squared norms of their parameters' gradients
audit.py        which parameters have a rule, and which were used without their layer
broadcast.py    layers that were called without the batch dimension
packed.py       boundaries of packed sequences
accumulation.py does a backward pass leave its gradients in all parameters?
single_*.py     batches of one, served from the gradients
fused_linear.py a Linear whose weight gradient brings the norms
identity.py     the two autograd Functions that pass an output on
shortcut.py     batches of one, served from two bias gradients without any tap
bypass.py       does the output depend on the input past the first layer?
pause.py        forward passes of lipcore's own
=============== =======================================================================================

Full backward hooks would cost three times as much and fail behind in-place activations. Nothing is raised inside hooks
(it would leave half of the gradients set): errors are kept for the user's next call. Training is bit for bit what it
was. A copied or pickled model is not watched: each object that has hooks reduces to an inert one.
"""

from lipcore.capture.capture import Capture
from lipcore.capture.first_layer import FIRST_LAYER_TYPES
from lipcore.capture.pause import paused

__all__ = ["FIRST_LAYER_TYPES", "Capture", "paused"]
