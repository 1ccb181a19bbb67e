"""Per-sample gradients from the autograd graph, for parameters whose layer has no rule."""
