"""One step of the optimizer against the recipe written out, bad steps, parts, precision, and what the host may read."""

import math
from dataclasses import replace

import pytest
import torch
from configurations import configuration
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.build import ConfigError
from experiments.stepper import LossScale, Stepper, StepSettings
from experiments.tally import Tally
from models import MLP, Losses, Objective, ScoreNetwork, UNet
from sde import VP

SETTINGS = StepSettings(batch_size=8, clip=0.05, ema=0.99)
CPU = torch.device("cpu")
RATES = (2.0**-6, 2.0**-7, 2.0**-5, 2.0**-7)


class Given(Objective):
    """The squared error of the noise at times and noise that are given for each sample, in training mode counted."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def check(self, model):
        pass

    def forward(self, model, x0, generator=None, t=None, eps=None):
        t = 0.1 + 0.8 * torch.rand(len(x0), generator=generator, dtype=x0.dtype) if t is None else t
        eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype) if eps is None else eps
        value = (model(model.sde.perturb(x0, t, eps), t).eps - eps).square().flatten(1).mean(1)
        self.calls += self.training
        return Losses(value, model.sde.log_snr(t))


def network(dtype=torch.float64, net=None):
    model = ScoreNetwork(net or MLP((2,), width=8, depth=1), VP()).to(dtype)
    for i, parameter in enumerate(model.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    return model


def stepper(model, settings=SETTINGS):
    return Stepper(model, Given(), settings, torch.Generator().manual_seed(0))


def batch(i, dtype=torch.float64, n=8, shape=(2,)):
    g = torch.Generator().manual_seed(100 + i)
    x, eps = (torch.randn(n, *shape, generator=g, dtype=dtype) for _ in range(2))
    return {"x": x, "t": 0.05 + 0.9 * torch.rand(n, generator=g, dtype=dtype), "eps": eps}


def state(one):
    """Everything that a step may change, as copies."""
    moments = [one.optimizer.state[p][key] for p in one.parameters for key in sorted(one.optimizer.state[p])]
    weights = list(one.model.state_dict().values())
    return [v.clone() for v in (*weights, *moments, *one.average.state.values(), one.average.updates)]


def by_hand(model, rates, clip=SETTINGS.clip, decay=SETTINGS.ema):
    """Kingma and Ba's algorithm 1 after clipping to a norm, and the average, written out; returns weights and means."""
    theta = list(model.parameters())
    m, v, mean = ([f(p) for p in theta] for f in (torch.zeros_like, torch.zeros_like, lambda p: p.detach().clone()))
    norms = []
    for i, rate in enumerate(rates):
        b = batch(i)
        loss = Given()(model, b["x"], t=b["t"], eps=b["eps"]).value.mean()
        gradient = torch.autograd.grad(loss, theta)
        norms.append(torch.cat([g.flatten() for g in gradient]).norm().item())
        for p, g, one, two, average in zip(theta, gradient, m, v, mean, strict=True):
            g = g * min(1.0, clip / norms[-1])
            one.mul_(0.9).add_(0.1 * g)
            two.mul_(0.999).add_(0.001 * g * g)
            root = (two / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8
            p.data -= rate * one / (1 - 0.9 ** (i + 1)) / root
            average += (1 - min(decay, (1 + i) / (10 + i))) * (p.data - average)
    return [p.detach() for p in theta], mean, norms


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_a_step_is_clipping_adam_and_the_average_as_written_out(fused, clip):
    weights, mean, norms = by_hand(network(), RATES, clip)
    assert (min(norms) > 0.05) and max(norms) < 100  # one clip always bites, the other never does
    one = stepper(network(), replace(SETTINGS, fused=fused, clip=clip))
    for i, rate in enumerate(RATES):
        one(**batch(i), rate=rate)
    for found, expected in zip(one.model.parameters(), weights, strict=True):
        # The divisor that the fused kernel takes is a float32: exact only where it is 1.
        assert torch.allclose(found, expected, rtol=1e-9 if clip > 1 or not fused else 1e-6, atol=1e-12)
    averages = [one.average.state[name] for name, _ in one.model.named_parameters()]
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(averages, mean, strict=True))
    read = one.tally.read()
    assert (read.steps, read.good, read.first) == (4, 4, None)
    assert read.norm == pytest.approx(sum(norms) / 4, rel=1e-9)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_goes_on_as_without_it(fused, spoilt):
    settings = replace(SETTINGS, fused=fused)
    one, without = (stepper(network(), settings) for _ in range(2))
    for each in (one, without):
        each(**batch(0), rate=RATES[0])
    before, bad = state(one), batch(1)
    bad["x"][3, 1] = spoilt
    one(**bad, rate=RATES[1])
    assert all(torch.equal(a, b) for a, b in zip(before, state(one), strict=True))
    for each in (one, without):
        each(**batch(2), rate=RATES[2])
    assert all(torch.equal(a, b) for a, b in zip(state(one), state(without), strict=True))
    read, other = one.tally.read(), without.tally.read()
    assert (read.steps, read.good, read.first) == (3, 2, 2)
    assert (read.loss, read.norm) == (other.loss, other.norm) and not one.scale.excuses()
    assert sum(read.counts) == 8 + 7 + 8 and all(
        math.isfinite(m) for m, n in zip(read.means, read.counts, strict=True) if n
    )
    assert one.tally.read().steps == 0 and one.tally.read().first is None


def test_a_gradient_that_is_not_finite_under_a_finite_loss_changes_nothing():
    one = stepper(network(), SETTINGS)
    one(**batch(0), rate=RATES[0])
    before, hook = state(one), one.parameters[0].register_hook(lambda gradient: gradient * math.inf)
    one(**batch(1), rate=RATES[1])
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, state(one), strict=True))
    read = one.tally.read()
    assert (read.steps, read.good, read.first) == (2, 1, 2) and math.isfinite(read.loss + read.norm)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_of_a_batch_give_its_gradient_for_the_same_noise(parts):
    whole, one = (stepper(network(), replace(SETTINGS, accumulate=n, clip=1e9)) for n in (1, parts))
    for each in (whole, one):
        each(**batch(0), rate=RATES[0])
    for expected, found in zip(whole.parameters, one.parameters, strict=True):
        assert torch.allclose(found.grad, expected.grad, rtol=1e-12, atol=1e-14)
    a, b = whole.tally.read(), one.tally.read()
    assert b.loss == pytest.approx(a.loss, rel=1e-12) and b.norm == pytest.approx(a.norm, rel=1e-12)
    assert b.counts == a.counts and one.objective.calls.item() == parts


def test_parts_draw_their_noise_one_after_another():
    one = stepper(network(), replace(SETTINGS, accumulate=2))
    one(batch(0)["x"], RATES[0])
    by_parts, g = Given(), torch.Generator().manual_seed(0)
    losses = [by_parts(network(), x, g).value.mean().item() for x in batch(0)["x"].chunk(2)]
    assert one.tally.read().loss == pytest.approx(sum(losses) / 2, rel=1e-12)


class NoReading(TorchDispatchMode):
    """Fails where the host reads a tensor or makes one of its own numbers: a wait for, or a copy to, a device."""

    READ = ("_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "lift_fresh", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        assert func.overloadpacket.__name__ not in self.READ, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision, accumulate", [("float32", 1), ("float16", 2)])
def test_no_number_leaves_the_device_in_a_step(precision, accumulate):
    one = stepper(network(torch.float32), replace(SETTINGS, precision=precision, accumulate=accumulate))
    one(**batch(0, torch.float32), rate=RATES[0])
    with NoReading() as mode:
        one(**batch(1, torch.float32), rate=RATES[1])
    assert mode.seen > 50


def test_the_plain_adam_is_seen_to_read():
    one = stepper(network(), replace(SETTINGS, fused=False))
    one(**batch(0), rate=RATES[0])
    with pytest.raises(AssertionError, match="aten"), NoReading():
        one(**batch(1), rate=RATES[1])


@pytest.mark.parametrize("name, dtype, close", [("bfloat16", torch.bfloat16, 2e-2), ("float16", torch.float16, 3e-3)])
def test_half_precision_is_that_of_the_forward_pass_alone(name, dtype, close):
    net = UNet((1, 8, 8), channels=8, multipliers=(1, 2))
    seen = {}
    net.register_forward_hook(lambda m, inputs, out: seen.update(label=inputs[1].dtype, out=out.dtype))
    shape = dict(dtype=torch.float32, shape=(1, 8, 8))
    one = stepper(network(torch.float32, net), replace(SETTINGS, precision=name))
    if name == "float16":
        one.scale = LossScale(2.0**8, CPU)  # these gradients overflow at 2^16
    twin = UNet((1, 8, 8), channels=8, multipliers=(1, 2))
    plain = stepper(network(torch.float32, twin))
    for i, rate in enumerate(RATES[:2]):
        for each in (one, plain):
            each(**batch(i, **shape), rate=rate)
    assert seen == {"label": torch.float32, "out": dtype}
    kinds = {value.dtype for value in state(one) if value.is_floating_point()}
    assert kinds == {torch.float32} and {p.grad.dtype for p in one.parameters} == {torch.float32}
    a, b = one.tally.read(), plain.tally.read()
    assert a.good == 2 and a.loss != b.loss
    assert a.loss == pytest.approx(b.loss, rel=close) and a.norm == pytest.approx(b.norm, rel=3 * close)


def test_the_scale_of_the_loss_does_not_show():
    one, other = (stepper(network(), replace(SETTINGS, precision=name)) for name in ("float32", "float32"))
    other.scale = LossScale(2.0**16, CPU)
    for i, rate in enumerate(RATES):
        for each in (one, other):
            each(**batch(i), rate=rate)
    for a, b in zip(state(one), state(other), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-10, atol=1e-14)


def test_the_scale_halves_after_a_bad_step_and_doubles_after_many_good_ones(monkeypatch):
    monkeypatch.setattr(LossScale, "PATIENCE", 3)
    scale, yes, no = LossScale(2.0**16, CPU), torch.tensor(True), torch.tensor(False)
    found = []
    for good in (no, no, yes, yes, no, yes, yes, yes, yes, yes, yes):
        scale.update(good)
        found.append(math.log2(scale.value.item()))
    assert found == [15, 14, 14, 14, 13, 13, 13, 14, 14, 14, 15] and scale.excuses()
    for _ in range(16):
        scale.update(no)
    assert scale.value.item() == 0.5 and not scale.excuses()
    constant = LossScale(1.0, CPU)
    constant.update(no)
    assert constant.value.item() == 1


def test_an_overflow_of_float16_is_left_out_and_halves_the_scale():
    one = stepper(network(torch.float32), replace(SETTINGS, precision="float16"))
    before = [p.clone() for p in one.parameters]
    huge = batch(0, torch.float32)
    huge["eps"] *= 1e5
    one(**huge, rate=RATES[0])
    assert all(torch.equal(a, b) for a, b in zip(before, one.parameters, strict=True))
    assert one.scale.value.item() == 2.0**15 and one.scale.excuses() and one.tally.read().good == 0
    one(**batch(1, torch.float32), rate=RATES[0])
    assert one.tally.read().good == 1 and not torch.equal(before[0], one.parameters[0])


def test_the_memory_format_does_not_show():
    shape = dict(dtype=torch.float32, shape=(1, 8, 8))
    nets = [UNet((1, 8, 8), channels=8, multipliers=(1, 2)) for _ in range(2)]
    steppers = [
        stepper(network(torch.float32, net), replace(SETTINGS, channels_last=last))
        for net, last in zip(nets, (False, True), strict=True)
    ]
    formats = []
    nets[1].register_forward_hook(lambda m, inputs, out: formats.append(inputs[0].stride()))
    for each in steppers:
        each(**batch(0, **shape), rate=RATES[0])
    a, b = (each.tally.read() for each in steppers)
    assert a.loss == pytest.approx(b.loss, rel=1e-5) and a.norm == pytest.approx(b.norm, rel=1e-4)
    wide = next(p for p in nets[1].parameters() if p.dim() == 4 and min(p.shape) > 1)
    assert wide.is_contiguous(memory_format=torch.channels_last) and formats


def test_the_losses_fall_into_their_bins_and_what_lies_beyond_into_the_last():
    tally = Tally(-2.0, 2.0, CPU, bins=4)
    log_snr = torch.tensor([-math.inf, -1.5, -0.5, 0.5, 0.6, 1.5, 9.0, 0.0])
    value = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, math.nan])
    good, loss = torch.tensor(True), torch.tensor(1.0)
    tally.add(loss, 2 * loss, good, value, log_snr)
    tally.add(3 * loss, 4 * loss, good, value, log_snr)
    assert tally.bins() == [(-2.0, -1.0), (-1.0, 0.0), (0.0, 1.0), (1.0, 2.0)]
    read = tally.read()
    assert (read.loss, read.norm, read.means, read.counts) == (2.0, 3.0, [2.0, 5.0, 8.0, 12.0], [4, 2, 4, 4])
    empty = tally.read()
    assert empty.counts == [0] * 4 and all(math.isnan(v) for v in (*empty.means, empty.loss, empty.norm))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"precision": "half"}, "train.precision must be one of float32, bfloat16, float16, found 'half'"),
        ({"accumulate": 3}, "train.accumulate must divide train.batch_size, found batch_size=8, accumulate=3"),
        ({"accumulate": 0}, "train.accumulate must be positive"),
        ({"batch_size": 0}, "train.batch_size must be positive"),
        ({"clip": math.nan}, "train.clip must be positive"),
        ({"ema": 1.0}, r"train.ema must lie in \[0, 1\)"),
        ({"cuda_graphs": True, "fused": False}, "train.cuda_graphs needs train.fused=true"),
    ],
)
def test_settings_that_can_not_work_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        replace(SETTINGS, **settings)


@pytest.mark.parametrize(
    ("settings", "shape", "learned", "device", "words"),
    [
        ({"cuda_graphs": True}, (2,), False, "cpu", "train.cuda_graphs needs a CUDA device, found cpu"),
        ({"cuda_graphs": True}, (2,), True, "cuda", "can't record a schedule that learns"),
        ({"channels_last": True}, (2,), False, "cpu", r"for images \(C, H, W\), found samples of shape \(2,\)"),
        ({"channels_last": True}, (1, 9), False, "cpu", "train.channels_last is for images"),
    ],
)
def test_settings_that_do_not_suit_the_device_or_the_data_are_refused(settings, shape, learned, device, words):
    with pytest.raises(ConfigError, match=words):
        replace(SETTINGS, **settings).require(torch.device(device), shape, learned)


def test_the_presets_are_settings():
    default, gpu = (StepSettings.of(configuration(*chosen).train) for chosen in ((), ("train=gpu",)))
    assert default == StepSettings(batch_size=128, clip=1.0, ema=0.999)
    assert gpu == replace(default, precision="bfloat16", channels_last=True, compile=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # the compiler's own
def test_a_compiled_step_is_the_step():
    model, settings = network(torch.float32), replace(SETTINGS, compile=True)
    one, plain = stepper(model, settings), stepper(network(torch.float32))
    for i, rate in enumerate(RATES):
        for each in (one, plain):
            each(**batch(i, torch.float32), rate=rate)
    with one.average.applied(model):
        pass
    for each in (one, plain):
        each(**batch(9, torch.float32), rate=RATES[0])
    for a, b in zip(state(one), state(plain), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert one.trained is not model and list(model.state_dict()) == list(plain.model.state_dict())
