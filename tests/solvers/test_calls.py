"""The count of calls: what a hook on the network sees, forwards and backwards, whatever the model is wrapped in."""

import pytest
import torch
from torch import nn

from models import MLP, ScoreNetwork
from sde import VE, VP, Prediction, ScoreModel
from solvers import DDIM, EulerMaruyama, Heun, ProbabilityFlow
from solvers.calls import counting, innermost

SOLVERS = (DDIM(steps=5), Heun(steps=4), EulerMaruyama(steps=3, final="denoise"), ProbabilityFlow(rtol=1e-2, atol=1e-2))


class Twice(ScoreModel):
    """Two calls of a model for each of its own, as classifier-free guidance makes."""

    def __init__(self, model):
        super().__init__(model.sde)
        self.model = model

    def forward(self, x, t, **condition):
        a, b = self.model(x, t), self.model(x, t)
        return Prediction(0.5 * (a.x0 + b.x0), 0.5 * (a.eps + b.eps))


class Pulled(ScoreModel):
    """Adds to the score the gradient of -|x_0|^2, as guidance by a likelihood of the prediction does."""

    def __init__(self, model):
        super().__init__(model.sde)
        self.model = model

    def forward(self, x, t, **condition):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            pair = self.model(x, t)
            (delta,) = torch.autograd.grad(-pair.x0.square().sum() + 0 * pair.eps.sum(), x)
        sigma, alpha = self.sde.sigma(t), self.sde.alpha(t)
        x0, eps = pair.x0 + 0.1 * sigma**2 / alpha * delta, pair.eps - 0.1 * sigma * delta
        return Prediction(x0.detach(), eps.detach())


class Twin(ScoreModel):
    """Around two models in a list of modules."""

    def __init__(self, *models):
        super().__init__(models[0].sde)
        self.models = nn.ModuleList(models)

    def forward(self, x, t, **condition):
        first, *_ = [model(x, t) for model in self.models]
        return first


@pytest.fixture
def model():
    return ScoreNetwork(MLP(shape=(2,), width=8), VP(), parametrization="v")


def seen(model, network, solver):
    """What a solver says of its calls, and what hooks on the network itself count, forwards and backwards."""
    calls = {"forward": 0, "backward": 0}

    def forward(*_):
        calls["forward"] += 1

    def backward(*_):
        calls["backward"] += 1

    handles = [network.register_forward_hook(forward), network.register_full_backward_hook(backward)]
    out = solver(model, shape=(3, 2), seed=0)
    for handle in handles:
        handle.remove()
    return (out.nfe, out.backward), (calls["forward"], calls["backward"])


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize(
    "wrap, backwards", [(lambda m: m, 0), (Twice, 0), (Pulled, 1), (lambda m: m.under(VE(sigma_min=0.02)), 0)]
)
def test_calls_are_those_of_the_network(model, wrap, backwards, solver):
    said, found = seen(wrap(model), model.net, solver)
    assert said == found
    assert found[0] > 0 and found[1] == backwards * found[0]


def test_micro_batches_count_as_one(model):
    whole, parts = (DDIM(steps=5)(Pulled(model), shape=(4, 2), batch_size=size) for size in (None, 2))
    assert (whole.nfe, whole.backward) == (parts.nfe, parts.backward) == (5, 5)


def test_the_innermost_models_are_found(model):
    other = ScoreNetwork(MLP(shape=(2,), width=8), VP())
    assert innermost(model) == [model]
    assert innermost(Twice(Pulled(model))) == [model]
    assert innermost(Twin(model, Twice(other), model)) == [model, other]
    with counting(Twin(model, Twice(other), model)) as calls:
        Twin(model, Twice(other), model)(torch.zeros(1, 2), torch.tensor(0.5))
    assert calls.n == 4
