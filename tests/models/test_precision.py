"""Under autocast the network alone computes in bfloat16: noise levels, features, the pair and the losses do not."""

import pytest
import torch
from torch import nn

from models import MLP, DiT, FourierEmbedding, LevelHead, ScoreNetwork, SinusoidalEmbedding, UNet
from models import denoising_score_matching as loss_of
from models.labels import LABELS
from models.parametrization import ROWS
from sde import EDM, VE, VP, Cosine, LearnedSchedule, RectifiedFlow, SubVP

SHAPE, LEVELS = (1, 8, 8), 5
NETWORKS = {
    "MLP": lambda **more: MLP(SHAPE, width=32, depth=2, **more),
    "UNet": lambda **more: UNet(SHAPE, channels=8, **more),
    "DiT": lambda **more: DiT(SHAPE, width=32, depth=2, heads=2, **more),
}


def head() -> LevelHead:
    return LevelHead(torch.randn(LEVELS, *SHAPE, generator=torch.Generator().manual_seed(0)))


def opened(net: nn.Module) -> nn.Module:
    """With outputs of order 1 instead of zero, as training would leave them."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("row, weighting", [("noise", "simple"), ("v", "likelihood"), ("levels", "simple")])
def test_b42_the_loss_keeps_float32_and_its_value(name, row, weighting):
    levels = row == "levels"
    net = opened(NETWORKS[name](outputs=LEVELS if levels else 1))
    model = ScoreNetwork(net, VP(t_min=1e-3), head() if levels else row)
    outputs = []
    net.register_forward_hook(lambda module, arguments, output: outputs.append(output.dtype))
    x0 = torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    full = loss_of(model, x0, weighting, generator=torch.Generator().manual_seed(2)).mean()
    with autocast():
        loss = loss_of(model, x0, weighting, generator=torch.Generator().manual_seed(2)).mean()
    loss.backward()
    assert outputs == [torch.float32, torch.bfloat16] and loss.dtype == torch.float32
    assert 0 < abs(float(loss.detach() / full.detach()) - 1) < 2e-2
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert bool(parameter.grad.isfinite().all())


@pytest.mark.parametrize("name", NETWORKS)
def test_b42_inputs_labels_and_features_are_float32(name):
    """A label of 9.99 would be 10 in bfloat16."""
    net, seen = NETWORKS[name](), []
    net.register_forward_pre_hook(lambda module, arguments: seen.extend(arguments))
    for module in net.modules():
        if isinstance(module, (SinusoidalEmbedding, FourierEmbedding)):
            module.register_forward_hook(lambda module, arguments, output: seen.extend((*arguments, output)))
    for label in LABELS:
        with autocast():
            x0, eps = ScoreNetwork(net, VP(), label=label)(torch.ones(2, *SHAPE), torch.tensor([0.5, 1.0]))
        assert len(seen) == 4 and {tensor.dtype for tensor in (*seen, x0, eps)} == {torch.float32}, label
        seen.clear()


class Fixed(nn.Module):
    """The same output, whatever it is asked: what is left are the model's own computations."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.output, self.asked = output, []

    def forward(self, x, label):
        self.asked += [x, label]
        return self.output


def around(sde, row, label, output) -> list[torch.Tensor]:
    """All that is computed before and after a network that gives ``output``."""
    net, x = Fixed(output), torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    model = ScoreNetwork(net, sde, head() if row == "levels" else row, label)
    t = torch.linspace(sde.t_min, 0.99 * sde.t_max, 4)
    loss = loss_of(model, x, "likelihood", generator=torch.Generator().manual_seed(2))
    return [*model(x, t), *model(x, t[1]), model.velocity(x, t), loss, *net.asked]


@pytest.mark.parametrize("row", [*ROWS, "levels"])
@pytest.mark.parametrize("label", LABELS)
def test_autocast_changes_no_bit_around_the_network(row, label):
    """An output in bfloat16 is taken up to float32 before anything is made of it, with autocast and without."""
    channels = (LEVELS if row == "levels" else 1) * SHAPE[0]
    output = torch.randn(4, channels, *SHAPE[1:], generator=torch.Generator().manual_seed(0)).bfloat16()
    for sde in (VP(), SubVP(), VE(), Cosine(), EDM(), RectifiedFlow(), LearnedSchedule().requires_grad_(False)):
        expected, plain = around(sde, row, label, output.float()), around(sde, row, label, output)
        with autocast():
            found = around(sde, row, label, output)
        for a, b, c in zip(expected, plain, found, strict=True):
            assert b.dtype == c.dtype == torch.float32 and torch.equal(a, b) and torch.equal(a, c), sde
