"""Every network of conf/net: sizes, options, gradients, layouts of memory, and compilation."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import conf
from experiments.build import build
from models import LevelHead, ScoreNetwork, denoising_score_matching
from sde import VP

PRESETS = {path.stem: path for path in sorted((Path(conf.__file__).parent / "net").glob("*.yaml"))}
del PRESETS["exact"]  # no network
NATURAL = {"mnist": (1, 28, 28), "tiny": (1, 8, 8), "mlp": (2,)}
"""Shapes by the last word of the file's name; of other files (3, 32, 32)."""
REDUCED = {"channels": 8, "width": 24, "blocks": 1, "depth": 2, "embedding_features": 16}
"""Sizes of the same network, as wide and as deep as a test can pay for."""
PUBLISHED = {"ddpmpp_cifar10": 61.804, "ncsnpp_cifar10": 62.759}
"""Millions of parameters of the original code: score_sde's DDPM++, and NCSN++ with the 256 features of EDM's."""

SMALL = ("mlp", "dit_tiny", "unet_tiny")

every_preset = pytest.mark.parametrize("name", PRESETS)


def node_of(name: str) -> DictConfig:
    return OmegaConf.load(PRESETS[name])


def natural_shape(name: str) -> tuple[int, ...]:
    return NATURAL.get(name.rpartition("_")[2], (3, 32, 32))


def build_net(name: str, reduced: bool = False, **more) -> nn.Module:
    node = node_of(name)
    smaller = {key: value for key, value in REDUCED.items() if reduced and key in node}
    return build(node, where="net", **{"shape": natural_shape(name), **smaller, **more})


def opened(net: nn.Module) -> nn.Module:
    for i, parameter in enumerate(net.parameters()):
        nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(i))
    return net.eval()


def inputs(name: str, n: int = 2):
    return torch.randn(n, *natural_shape(name), generator=torch.Generator().manual_seed(0)), torch.linspace(-5, 2, n)


@every_preset
def test_a_preset_has_the_shapes_and_the_size_that_its_file_says(name):
    text = PRESETS[name].read_text()
    said = re.match(r"# .*? ([\d.]+) M parameters(?:.*? ([\d.]+) ([MG])FLOP)?", text)
    with torch.device("meta"):
        net, shape = build_net(name, outputs=3), natural_shape(name)
        assert net(torch.empty(2, *shape), torch.empty(2)).shape == (2, 3 * shape[0], *shape[1:])
        net = build_net(name)
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, *shape), torch.empty(1))
    parameters = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    assert parameters == pytest.approx(float(said[1]), rel=0.05)
    assert parameters == pytest.approx(PUBLISHED.get(name, parameters), abs=5e-4)
    if said[2]:
        assert counter.get_total_flops() / {"M": 1e6, "G": 1e9}[said[3]] == pytest.approx(float(said[2]), rel=0.05)


@every_preset
def test_every_option_of_a_network_can_be_overridden(name):
    node = node_of(name)
    parameters = inspect.signature(type(build_net(name, reduced=True))).parameters
    assert node.keys() - {"_target_"} == parameters.keys() - {"shape", "outputs", "observation"}


def check_that_a_gradient_reaches_every_parameter(name, reduced):
    torch.manual_seed(0)
    model = ScoreNetwork(build_net(name, reduced), VP(t_min=1e-2))
    x0, generator = inputs(name)[0], torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # branches start at zero, and it takes a step each to open the last layer and the inner ones
        optimizer.zero_grad()
        denoising_score_matching(model, x0, generator=generator).mean().backward()
        optimizer.step()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    assert not dead


@every_preset
def test_a_preset_has_no_dead_parameter(name):
    check_that_a_gradient_reaches_every_parameter(name, reduced=True)


@pytest.mark.slow
@every_preset
def test_a_preset_has_no_dead_parameter_at_its_real_size(name):
    check_that_a_gradient_reaches_every_parameter(name, reduced=False)


@pytest.mark.parametrize("name", [name for name in PRESETS if len(natural_shape(name)) == 3])
def test_channels_last_changes_the_memory_and_not_the_output(name):
    net, (x, label) = opened(build_net(name, reduced=True)), inputs(name)
    with torch.no_grad():
        expected = net(x, label)
        found = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), label)
    assert expected.abs().max() > 1e-3 and (found - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", [n if n in SMALL else pytest.param(n, marks=pytest.mark.slow) for n in PRESETS])
def test_a_preset_compiles_as_one_graph(name):
    """Traced without a break; the code that a compiler would make of it is the slow test's."""
    net, (x, label) = opened(build_net(name, reduced=True)), inputs(name)
    with torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x, label), net(x, label))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's compiler warns of torch itself
@pytest.mark.parametrize("name", SMALL)
def test_a_compiled_network_trains_and_gives_what_it_gave(name):
    torch.manual_seed(0)
    net = opened(build_net(name, reduced=True, outputs=5))
    model = ScoreNetwork(net, VP(t_min=1e-2), LevelHead(torch.zeros(5, *natural_shape(name))))
    losses, gradients = [], []
    for compiled in (False, True):
        model.net = torch.compile(net) if compiled else net
        model.zero_grad()
        loss = denoising_score_matching(model, inputs(name)[0], generator=torch.Generator().manual_seed(0)).mean()
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]))
    assert torch.allclose(*losses, rtol=1e-5)
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()
