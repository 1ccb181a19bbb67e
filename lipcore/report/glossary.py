"""What the words of the page mean."""

from __future__ import annotations

from lipcore.report.html import Html, tag

_WORDS = {
    "alarm": (
        "A step whose loss, update norm or gradient norm was not as in the 100 quiet steps before it, or in which "
        "a value became NaN or infinite. Its score says how many times the usual scatter it was away; that of movement "
        "that the optimizer did not make, how many times what rounding may do; of samples, how many."
    ),
    "directness": (
        "Distance from the start over the length of the way: near 1 on a straight way, near 0 where parameters go "
        "back and forth."
    ),
    "distance": "Euclidean norm of the parameters minus those at the start, or at the reference that was set.",
    "gradient norm": (
        "Euclidean norm of the batch's gradient, as backward() left it; after clipping: as the optimizer got it."
    ),
    "layer": ('A group of parameters, by default a block of the model; a single parameter with record_level="tensor".'),
    "local Lipschitz constant": (
        "How fast the model's output changes with its input at one sample: the norm of the gradient there."
    ),
    "noise scale": (
        "Scatter of the samples' gradients over the squared norm of their mean: about the batch size above which "
        "a larger one gains little."
    ),
    "one-sided": "A bound: the true number is at least this (or at most, where that is said).",
    "path length": "Sum of the norms of all updates; chord length where only some steps were looked at.",
    "step": "One call of optimizer.step(), counted from 1.",
    "update norm": "Euclidean norm of what an optimizer step changed.",
    "update over weight norm": (
        "Norm of an update over the norm of the parameters that it changed: how large a step was for this layer. "
        "The map takes the norm after the step."
    ),
    "window": "Some consecutive steps, over which the metrics give means, quantiles and extremes.",
}


def glossary() -> Html:
    """Return the words as a list."""
    pairs = (part for word, text in _WORDS.items() for part in (tag("dt", word), tag("dd", text)))
    return tag("section", tag("h2", "Words"), tag("dl", *pairs), id="words")
