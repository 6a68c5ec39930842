"""The number that tells the network the noise level: golden values, one in training and sampling, finite, apart."""

import json

import pytest
import torch
from configurations import configuration
from omegaconf import OmegaConf
from torch import nn

from experiments import checkpoint
from experiments.problem import build_model
from models import MLP, ScoreNetwork, SinusoidalEmbedding, denoising_score_matching
from models.labels import LABELS
from sde import EDM, VE, VP, LearnedSchedule, RectifiedFlow
from solvers import DDIM

GOLDEN = {  # at half of the clock: log(sigma / alpha), log(sigma), 16 (t - t_min) / (t_max - t_min) - 8
    VP: (1.2275677, -0.041182266, -8.0000800e-05),
    VE: (-0.3465736, -0.3465736, -8.0000800e-05),
    EDM: (3.688879454, 3.688879454, -2.0000500e-04),
    RectifiedFlow: (0.0, -0.6931472, -8.0000800e-05),
}
CONVENTION = {"shape": [2], "levels": None}
SMALL = ("net=mlp", "net.width=8", "net.depth=1", "parametrization=noise")


class Probe(nn.Module):
    """Shows the labels that it is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, label, **condition):
        self.seen.append(label)
        return 0 * x


@pytest.mark.parametrize("sde", [cls() for cls in GOLDEN], ids=str)
def test_b22_the_labels_have_their_golden_values(sde):
    t = torch.tensor(0.5 * sde.t_max, dtype=torch.float64)
    x = torch.zeros(3, 2, dtype=torch.float64)
    for label, golden in zip(LABELS, GOLDEN[type(sde)], strict=True):
        model = ScoreNetwork(Probe(), sde, label=label)
        for time in (t, t.expand(3), t.expand(3).clone()):
            model(x, time)
            assert torch.allclose(model.net.seen.pop(), torch.full_like(x[:, 0], golden), rtol=1e-6, atol=1e-9), label


@pytest.mark.parametrize("label", LABELS)
def test_b22_training_and_sampling_show_the_network_the_same_label(label):
    """One function of t, whoever asks."""
    for sde in (VP(), VE(), RectifiedFlow()):
        model = ScoreNetwork(Probe(), sde, label=label)
        asked = []
        model.register_forward_pre_hook(lambda module, arguments, asked=asked: asked.append(arguments[1]))
        denoising_score_matching(model, torch.ones(5, 2), generator=torch.Generator().manual_seed(0))
        DDIM(steps=5)(model.eval(), shape=(5, 2), seed=0)
        times = torch.cat([t.expand(5) for t in asked])
        labels, order = torch.cat(model.net.seen), times.argsort()
        expected = LABELS[label](times, sde.alpha(times), sde.sigma(times), sde)
        inside = (times > model.ends[0]) & (times < model.ends[1])
        assert inside.sum() > 20 and torch.equal(labels[inside], expected[inside]), sde
        assert bool((labels[order].diff() >= 0).all()), sde


@pytest.mark.parametrize("label", LABELS)
def test_labels_are_finite_increasing_and_of_order_ten_at_both_ends(label):
    for sde in (VP(), VE(), EDM(), RectifiedFlow(t_min=0.0), LearnedSchedule()):
        for dtype in (torch.float32, torch.float64):
            model = ScoreNetwork(Probe(), sde, label=label)
            t = torch.tensor([sde.t_min, 0.5 * sde.t_max, 0.9 * sde.t_max, sde.t_max], dtype=dtype)
            with torch.no_grad():
                x0, eps = model(torch.ones(4, 2, dtype=dtype), t)
            found = model.net.seen.pop()
            assert found.dtype == dtype and bool(found.isfinite().all()) and found.abs().max() < 21, (sde, found)
            assert bool((found.diff() > 0).all()) and bool(x0.isfinite().all() and eps.isfinite().all()), (sde, found)


def test_b42_the_times_999_and_1000_stay_apart_under_autocast():
    """bfloat16 has 8 bits: in it .999 is 1, and a label of 7.984 is 8."""
    features, model = [], ScoreNetwork(MLP((2,), width=8, depth=1), VP(), label="time")
    embedding = next(module for module in model.modules() if isinstance(module, SinusoidalEmbedding))
    embedding.register_forward_hook(lambda module, arguments, output: features.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(2, 2), torch.tensor([0.999, 1.0]))
    assert len(features) == 1 and features[0].dtype == torch.float32
    expected = 0.016 * float(embedding.frequencies.norm())  # the chords of angles of .016 units of the label
    assert float((features[0][0] - features[0][1]).norm()) == pytest.approx(expected, rel=1e-2) and expected > 0.1


def test_time_spans_minus_eight_to_eight_of_any_clock():
    for sde in (VP(t_min=0.1, t_max=3.0), EDM()):
        ends = torch.tensor((sde.t_min, sde.t_max), dtype=torch.float64)
        assert torch.allclose(LABELS["time"](ends, ends, ends, sde), ends.new_tensor((-8.0, 8.0)))


@pytest.mark.parametrize("label", LABELS)
def test_a_model_under_another_process_is_told_the_label_of_its_own(label):
    model = ScoreNetwork(Probe(), VP(), label=label)
    other, t = VE(sigma_min=0.02, sigma_max=100.0), torch.tensor(0.4, dtype=torch.float64)
    model.under(other)(torch.ones(3, 2, dtype=torch.float64), t)
    own = model.sde.time(other.log_snr(t))
    expected = LABELS[label](own, model.sde.alpha(own), model.sde.sigma(own), model.sde)
    assert torch.allclose(model.net.seen.pop(), expected.expand(3), rtol=1e-9)


def test_a_schedule_learns_with_every_label():
    for label in LABELS:
        torch.manual_seed(0)
        model = ScoreNetwork(MLP((2,), width=8, depth=1), LearnedSchedule(hidden=3), label=label)
        generator = torch.Generator().manual_seed(0)
        denoising_score_matching(model, torch.ones(4, 2), "likelihood", generator=generator).mean().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.sde.parameters()), label


@pytest.mark.parametrize("bad", ["lambda", "", None, 3])
def test_an_unknown_label_is_refused(bad):
    with pytest.raises(ValueError, match=f"label must be one of log_snr, log_sigma, time, found {bad!r}"):
        ScoreNetwork(Probe(), VP(), label=bad)


def test_the_label_is_a_key_of_the_configuration():
    assert build_model(configuration(*SMALL), CONVENTION).label is LABELS["log_snr"]
    for label in LABELS:
        assert build_model(configuration(*SMALL, f"label={label}"), CONVENTION).label is LABELS[label]
    with pytest.raises(ValueError, match="label must be one of log_snr, log_sigma, time, found 'sigma'"):
        build_model(configuration(*SMALL, "label=sigma"), CONVENTION)


def test_a_checkpoint_keeps_its_label_and_one_without_has_the_first(tmp_path):
    config, file = configuration(*SMALL, "label=time"), tmp_path / "last.pt"
    model = build_model(config, CONVENTION)
    checkpoint.save(file, checkpoint.about(config, CONVENTION), 1, *[model.state_dict()] * 2)
    assert checkpoint.load(str(file), torch.device("cpu"))[0].label is LABELS["time"]
    stored = {place: OmegaConf.to_container(config[place]) for place in ("sde", "net", "parametrization")}
    content = torch.load(file, weights_only=True) | {"schema": 1, "config": json.dumps(stored)}
    torch.save(content, file)
    assert checkpoint.load(str(file), torch.device("cpu"))[0].label is LABELS["log_snr"]
