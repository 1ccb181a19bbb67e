"""What an optimizer's step does to one parameter, as a formula in the optimizer's state after the step."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

Scalar = float | Tensor  #: a Tensor only for CUDA parameters: a 0-dimensional one that nothing on the host waits for


class UpdateRule(NamedTuple):
    r"""The update dw of one step from the parameter w after it and up to two tensors a, b of the optimizer.

    Linear, for SGD and for updates that are given: :math:`dw = -(decay \, w + rate \, a + mix \, b)`.
    Adaptive, for Adam and AdamW: :math:`dw = -(decay \, w + rate \, u)` with the normalised update
    :math:`u = first\_scale \, a \,/\, (second\_scale \sqrt b + eps)`.

    A tensor whose coefficient is 0 may be None in a linear rule; the default rule is that of a parameter which was not
    stepped. `momentum` says of a linear rule that what it keeps of past gradients is there: b, or a where there is no
    b. An adaptive rule has its first moment in a.

    >>> UpdateRule.of_step(rate=0.1, shrink=0.5).decay  # w = (1 - 0.5) w_prev - 0.1 a has dw = -(1 w + 0.2 a)
    1.0
    """

    rate: Scalar = 0.0
    mix: Scalar = 0.0
    decay: Scalar = 0.0
    first_scale: Scalar = 1.0
    second_scale: Scalar = 1.0
    eps: Scalar = 0.0
    adaptive: bool = False
    momentum: bool = False

    @classmethod
    def of_step(cls, rate: Scalar, mix: Scalar = 0.0, shrink: Scalar = 0.0, **fields: Any) -> UpdateRule:
        r"""Make the rule of the step :math:`w = (1 - shrink) \, w_{prev} - s`, where shrink is learning rate times
        weight decay: :math:`dw = -(shrink \, w + s) / (1 - shrink)`.

        Raises:
            ValueError: shrink is so near to 1 that w no longer says what it was.
        """
        if isinstance(shrink, float):
            if shrink == 0:
                return cls(rate, mix, 0.0, **fields)
            if abs(1 - shrink) < 0.1:
                raise ValueError(
                    f"learning rate times weight decay is {shrink:.3g}: a step that leaves less than a tenth of the "
                    "parameter does not tell what it was before; use a smaller learning rate or weight decay"
                )
        left = 1 - shrink
        return cls(rate / left, mix / left, shrink / left, **fields)


GIVEN = UpdateRule(rate=-1.0)  #: the first tensor is dw itself
DIFFERENCE = UpdateRule(rate=1.0, decay=-1.0)  #: the first tensor is the parameter before the step
