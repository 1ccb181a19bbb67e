"""Short runs for the tests of lipcore.theory, with everything written down by autograd."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor, Trajectory, local_lipschitz

EPOCHS, SIZE, RATE = 4, 12, 1e-2


class Run:
    """SGD at batch 1, squared error / 2, with everything written down by autograd."""

    def __init__(self, inputs: int = 4, width: int = 3, frozen: bool = True, epochs: int = EPOCHS) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 1))
        self.model.double()
        self.model[0].weight.requires_grad_(not frozen)
        self.x, self.y = torch.randn(SIZE, inputs).double(), torch.randn(SIZE, 1).double()
        optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=RATE)
        bias = self.model[0].bias
        self.r: list[list[float]] = []
        self.lam: list[list[float]] = []
        self.eps: list[list[float]] = []
        self.bias: list[list[Tensor]] = []
        self.sigma: list[Tensor] = []
        with Monitor(self.model, optimizer, [Trajectory(), Lipschitz()]) as monitor:
            for _ in range(epochs):
                r, lam, eps, path = [], [], [], [bias.detach().clone()]
                for i in range(SIZE):
                    optimizer.zero_grad()
                    x = self.x[i : i + 1]
                    u = self.model[0](x).detach().requires_grad_()
                    r.append(float(torch.autograd.grad(self.model[1:](u).sum(), u)[0].norm()))
                    lam.append(float(local_lipschitz(self.model, x)))
                    f = self.model(x)
                    eps.append(float((f - self.y[i : i + 1]).abs().detach()))
                    ((f - self.y[i : i + 1]).square().sum() / 2).backward()
                    optimizer.step()
                    path.append(bias.detach().clone())
                self.r.append(r)
                self.lam.append(lam)
                self.eps.append(eps)
                self.bias.append(path)
                self.sigma.append(torch.linalg.svdvals(self.model[0].weight.detach()))
                monitor.close_window()
        self.history = monitor.history
