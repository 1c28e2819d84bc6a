"""Muon, and an average of weights over steps."""

import torch


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (Jordan et al. 2024) at AdamW's step size (Liu et al. 2025, eq. 4)."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault((parameter.shape[0], parameter[0].numel()), []).append(parameter)
            for (rows, columns), parameters in shapes.items():
                averages = [self.state[p].setdefault("average", torch.zeros_like(p)) for p in parameters]
                gradients = [parameter.grad for parameter in parameters]
                torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
                moves = torch._foreach_lerp(gradients, averages, group["momentum"])
                turned = orthogonal(torch.stack([move.reshape(rows, columns) for move in moves]))
                turned *= 0.2 * max(rows, columns) ** 0.5 * group["lr"]
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(parameters, [move.view_as(p) for move, p in zip(turned, parameters)])


def orthogonal(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """[G, m, n] with singular values pushed towards one by a quintic Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.transpose(1, 2) if tall else x


class Average:
    """Exponential moving average of the parameters of some modules."""

    def __init__(self, modules: list[torch.nn.Module], decay: float):
        self.parameters = [p for module in modules for p in module.parameters()]
        self.values, self.decay, self.count = [p.detach().clone() for p in self.parameters], decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        for parameter, value in zip(self.parameters, self.values):
            kept = parameter.clone()
            parameter.copy_(value)
            value.copy_(kept)


def matrices(modules: dict[str, torch.nn.Module]) -> list[torch.nn.Parameter]:
    """The weights worth orthogonalising: those of linear layers and convolutions with more than 16 rows and columns."""
    kinds, weights = (torch.nn.Linear, torch.nn.Conv2d), []
    for module in modules.values():
        weights += [layer.weight for layer in module.modules() if isinstance(layer, kinds)]
    return [one for one in weights if one.requires_grad and min(one.shape[0], one[0].numel()) > 16]
