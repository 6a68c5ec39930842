"""Networks: shapes, refusals, zero outputs at the start, and gradients to every parameter."""

import pytest
import torch

from models import MLP, DiT, FourierEmbedding, ScoreNetwork, SinusoidalEmbedding, UNet, denoising_score_matching
from sde import VP

MLPS = [
    dict(shape=(1,)),
    dict(shape=(2,), classes=3, dropout=0.1),
    dict(shape=(1, 8, 8), embedding_kind="fourier"),
    dict(shape=(3, 5), layer_norm=False),
    dict(shape=(2, 3, 4, 2)),
]
UNETS = [
    dict(shape=(1, 8, 8)),
    dict(shape=(3, 32, 32), multipliers=(1, 2, 2), attention=(False, False, True), heads=2),
    dict(shape=(1, 28, 28), multipliers=(1, 2, 2), attention=(False, False, False), blocks=2),
    dict(shape=(2, 16)),
    dict(shape=(1, 12), multipliers=(1,), attention=(True,), fourier=2),
    dict(shape=(1, 8, 4), fourier=3, dropout=0.1),
]


DITS = [
    dict(shape=(1, 8, 8)),
    dict(shape=(3, 8, 4), patch=4, classes=3, dropout=0.1),
    dict(shape=(2, 6), patch=1, heads=1, embedding="fourier", mlp_ratio=1.5),
]


def networks(outputs):
    torch.manual_seed(0)
    yield from (MLP(**{"outputs": outputs, "width": 8, "depth": 2, **arguments}) for arguments in MLPS)
    yield from (UNet(**{"channels": 8, "outputs": outputs, **arguments}) for arguments in UNETS)
    yield from (DiT(**{"outputs": outputs, "width": 8, "depth": 2, "heads": 2, **arguments}) for arguments in DITS)


def shapes():
    return [arguments["shape"] for arguments in (*MLPS, *UNETS, *DITS)]


@pytest.mark.parametrize("outputs", [1, 5])
def test_outputs_have_outputs_times_channels(outputs):
    for net, shape in zip(networks(outputs), shapes(), strict=True):
        y = net(torch.randn(3, *shape), torch.linspace(-7, 4, 3))
        assert y.shape == (3, outputs * shape[0], *shape[1:]), net


def test_a_new_network_outputs_zero():
    for net, shape in zip(networks(1), shapes(), strict=True):
        assert not net(torch.randn(2, *shape), torch.zeros(2)).any(), net


def test_a_gradient_reaches_every_parameter():
    """Branches start at zero, so that it takes a step each to open the last layer and the inner ones."""
    for net, shape in zip(networks(1), shapes(), strict=True):
        model, generator = ScoreNetwork(net, VP(t_min=1e-2)), torch.Generator().manual_seed(0)
        x0 = torch.randn(4, *shape, generator=generator)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            denoising_score_matching(model, x0, generator=generator).mean().backward()
            optimizer.step()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.abs().max() > 0), (type(net), shape, name)


def test_samples_of_a_batch_do_not_meet():
    for net, shape in zip(networks(1), shapes(), strict=True):
        net.eval().double()
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        x, label = torch.randn(4, *shape, dtype=torch.float64), torch.linspace(-7, 4, 4, dtype=torch.float64)
        whole = net(x, label)
        for i in range(4):
            assert torch.allclose(net(x[i : i + 1], label[i : i + 1])[0], whole[i], rtol=1e-10, atol=1e-12), net


def test_the_noise_level_matters():
    for net, shape in zip(networks(1), shapes(), strict=True):
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        x = torch.randn(1, *shape)
        assert (net(x, torch.tensor([-5.0])) - net(x, torch.tensor([-4.9]))).abs().max() > 1e-6, net


CONDITIONAL = [(MLP, (2,), dict(depth=2)), (DiT, (1, 4, 4), dict(depth=2, heads=2))]


@pytest.mark.parametrize("network, shape, sizes", CONDITIONAL)
def test_a_class_is_a_condition(network, shape, sizes):
    """Each class has an output of its own, sample by sample, and no class is the one after the last."""
    net = network(shape, width=8, classes=3, **sizes).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    model, t = ScoreNetwork(net.requires_grad_(False), VP()), torch.tensor(0.3, dtype=torch.float64)
    x = torch.ones(5, *shape, dtype=torch.float64)
    eps = model(x, t, class_label=torch.tensor([0, 1, 2, 3, 1])).eps.flatten(1)
    assert torch.pdist(eps[:4]).min() > 1e-3
    assert torch.allclose(eps[1], eps[4])
    assert torch.allclose(model(x, t).eps.flatten(1), eps[3])


@pytest.mark.parametrize("network, shape, sizes", CONDITIONAL)
def test_a_class_for_a_network_without_any_is_refused(network, shape, sizes):
    net = network(shape, width=8, **sizes)
    with pytest.raises(ValueError, match="this network knows no classes: build it with classes="):
        net(torch.ones(1, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))


def test_a_perceptron_has_the_options_it_says():
    """Random frequencies travel with the weights; dropout acts in training alone; without norms scale is seen."""
    net = MLP((2,), embedding_kind="fourier", embedding=6, dropout=0.5)
    assert isinstance(net.embed.features, FourierEmbedding) and "embed.features.frequencies" in net.state_dict()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    x, label = torch.ones(2, 2), torch.zeros(2)
    assert torch.equal(net.eval()(x, label), net(x, label)) and not torch.equal(net.train()(x, label), net(x, label))
    norms = [sum(isinstance(m, torch.nn.LayerNorm) for m in MLP((2,), layer_norm=n).modules()) for n in (True, False)]
    assert norms == [4, 0]


def test_octaves_are_sines_and_cosines_of_the_input():
    """Inputs that differ by 1, half of the range, agree in every octave from 2 pi on."""
    net = UNet((1, 8), channels=8, fourier=2)
    x = torch.linspace(-1, 0, 16, dtype=torch.float64).reshape(2, 1, 8)
    features = net._with_octaves(x)
    expected = [x, *((2 * torch.pi * k * x).sin() for k in (1, 2)), *((2 * torch.pi * k * x).cos() for k in (1, 2))]
    assert torch.allclose(features, torch.cat(expected, 1), atol=1e-12)
    assert torch.allclose(features[:, 1:], net._with_octaves(x + 1)[:, 1:], atol=1e-12)


def test_labels_are_embedded_apart():
    embedding = SinusoidalEmbedding(16)
    label = torch.linspace(-14, 7, 200)
    features = embedding(label)
    assert features.shape == (200, 16) and features.abs().max() <= 1
    distances = torch.cdist(features, features) + 10 * torch.eye(200)
    assert distances.min() > 0.05


@pytest.mark.parametrize("features", [0, 1, 7])
def test_an_odd_number_of_features_is_refused(features):
    with pytest.raises(ValueError, match="features must be an even number of at least 2"):
        SinusoidalEmbedding(features)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(shape=(2,)), r"takes samples of shape \(C, L\) or \(C, H, W\), found \(2,\); for flat data use MLP"),
        (dict(shape=(1, 4, 4, 4)), "takes samples of shape"),
        (dict(shape=(1, 9, 8)), r"the sizes \(9, 8\) must be divisible by 2; use fewer multipliers or pad"),
        (dict(shape=(1, 28, 28), multipliers=(1, 2, 2, 2), attention=(False,) * 4), "must be divisible by 8"),
        (dict(shape=(1, 8, 8), attention=(True,)), "attention needs 2 entries, one per multiplier, found 1"),
        (dict(shape=(1, 8, 8), channels=8, heads=3), r"the widths \[8, 16\] must be divisible by heads=3"),
    ],
)
def test_a_unet_that_can_not_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet(**arguments)


@pytest.mark.parametrize(
    "arguments", [dict(shape=()), dict(shape=(0,)), dict(shape=(2,), outputs=0), dict(shape=(2,), depth=0)]
)
def test_an_mlp_without_size_is_refused(arguments):
    with pytest.raises(ValueError, match="MLP needs positive sizes"):
        MLP(**arguments)
