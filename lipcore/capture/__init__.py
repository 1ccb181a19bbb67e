"""How per-sample numbers get out of the backward pass: every hook that lipcore registers on a model.

Two ways of tapping share one question (:mod:`lipcore.capture.training_pass`: is this pass training's?).
:mod:`lipcore.capture.taps` takes the gradients at the outputs of chosen modules, :mod:`lipcore.capture.layers` the
norms of all layers' parameters.

Words of this package:

========== =========================================================================================================
tap        a metric's wish for numbers from the gradient at one module's output
site       one hooked module, with all taps on it or with its layer's rule
pass       a forward pass in grad mode, from its beginning until its backward pass has ended
record     what one backward pass brought, per sample
served     said of a batch of one whose numbers are read from the parameters' gradients, without taps
probe      a leaf given to a compiled region, whose "gradient" is the per-sample numbers
audit      what the first passes are asked: is every use of a parameter seen, are its norms right
proof      backward passes of lipcore's own that show which sample each row of a layer's gradient belongs to
coverage   which trainable parameters have a rule, by structure and by the first pass's graph
========== =========================================================================================================

Full backward hooks would cost three times as much and fail behind in-place activations. Nothing is raised inside hooks
(it would leave half of the gradients set): errors are kept for the user's next call. Training is bit for bit what it
was. A copied or pickled model is not watched: each object that has hooks reduces to an inert one.
"""
