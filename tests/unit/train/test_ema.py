"""The average of the parameters: its definition, and that it never sees half a step."""

from __future__ import annotations

import torch
from torch import nn

from abyssal.train.ema import HostAverage


def test_average_is_its_definition() -> None:
    model = nn.Linear(3, 2, dtype=torch.float64)
    average = HostAverage(dict(model.named_parameters()), 0.75)
    wanted = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step in range(4):
        average.wait()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(step + 1.0)
        average.start()
        for name, parameter in model.named_parameters():
            wanted[name] = 0.75 * wanted[name] + 0.25 * parameter.detach()
    average.wait()
    for name, tensor in wanted.items():
        torch.testing.assert_close(average.tensors[name], tensor, rtol=1e-12, atol=0)


def test_it_starts_as_the_parameters_and_shares_no_memory() -> None:
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    average = HostAverage(dict(model.named_parameters()), 0.9)
    assert average.tensors["weight"].dtype == torch.float32
    assert torch.equal(average.tensors["weight"], model.weight.detach().float())
    with torch.no_grad():
        model.weight.zero_()
    assert average.tensors["weight"].abs().max() > 0
