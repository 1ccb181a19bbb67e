"""The gradient noise scale, from per-sample norms and the gradients they add up to."""
