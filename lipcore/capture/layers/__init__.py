"""All layers at once: per-sample squared norms of their parameters' gradients."""
