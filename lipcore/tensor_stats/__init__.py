"""The metric TensorStats: what the elements of parameters, gradients and modules' outputs are like, on sampled steps.

``watched.py`` says what is measured and what it is called, ``sampled_steps.py`` takes it when it is there, ``block.py``
keeps the numbers, ``open_window.py`` moves them on and saves them, ``metric.py`` makes results of them;
``attention.py``, ``router.py`` and ``logits.py`` read what only some models have.
"""

from lipcore.tensor_stats.metric import TensorStats

__all__ = ["TensorStats"]
