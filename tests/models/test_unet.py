"""The U-Net: the published sizes and costs, its resampling, and what every variant of it must do."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import ScoreNetwork, UNet, denoising_score_matching
from models.resampling import Blur, FilterDown, FilterUp, MeanDown, RepeatUp
from models.unet_blocks import Attention, Inject, Norm, Residual, Style
from sde import VP

TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
DDPMPP = dict(resample="residual", skip_rescale=True, modulation="shift")
NCSNPP = dict(DDPMPP, fir=True, progressive_input=True, embedding="fourier")
VARIANTS = [
    dict(shape=(1, 8, 8), classes=3),
    dict(shape=(2, 8, 4), resample="residual", heads=2, blocks=2),
    dict(shape=(1, 8, 8), **DDPMPP, embedding_features=8),
    dict(shape=(1, 8, 8), multipliers=(1, 2, 2), attention=(False, True, False), **NCSNPP),
    dict(shape=(2, 16), **NCSNPP, classes=2, dropout=0.1),
    dict(shape=(1, 8, 8), progressive_input=True),
    dict(shape=(1, 12), multipliers=(1,), attention=(False,), blocks=3, fourier=(2, 3)),
]


def build(arguments, **more):
    torch.manual_seed(0)
    return UNet(**{"channels": 8, **arguments, **more})


def random(net, std=0.1):
    """With random weights everywhere: a new network is zero."""
    for i, parameter in enumerate(net.parameters()):
        torch.nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(i))
    return net.eval()


def inputs(net_arguments, n=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, *net_arguments["shape"], generator=generator, dtype=dtype), torch.linspace(-7, 4, n).to(dtype)


CIFAR = dict(shape=(3, 32, 32), channels=128, multipliers=(1, 2, 2, 2), blocks=4, attention=(False, True, False, False))
SMALL = dict(shape=(1, 28, 28), multipliers=(1, 2, 2), blocks=2, attention=(False, True, False))


@pytest.mark.parametrize(
    "arguments, million, gflop",
    [
        (CIFAR | DDPMPP | dict(embedding_features=128), "61.804", "21.693"),
        (CIFAR | NCSNPP | dict(embedding_features=128), "62.693", "21.762"),
        (CIFAR | NCSNPP | dict(embedding_features=256), "62.759", "21.762"),
        (SMALL | DDPMPP | dict(channels=32, embedding_features=32), "1.753", "0.680"),
        (SMALL | DDPMPP | dict(channels=64, embedding_features=64), "6.988", "2.660"),
    ],
    ids=["DDPM++", "NCSN++", "NCSN++ of EDM", "DDPM++ 32", "DDPM++ 64"],
)
def test_parameters_and_operations_are_the_published_ones(arguments, million, gflop):
    """score_sde's DDPM++ at nf = 128 has 61.804 M parameters and 21.693 GFLOP an image, its NCSN++ 62.69 M and 21.8."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = UNet(**arguments)
        net(torch.zeros(1, *arguments["shape"]), torch.zeros(1))
    assert f"{sum(p.numel() for p in net.parameters()) / 1e6:.3f}" == million
    assert f"{counter.get_total_flops() / 1e9:.3f}" == gflop


def upfirdn(x, taps, up, down, pad):
    """Along the last axis: zeros between values, zeros around (before, after), convolution, every ``down``-th value."""
    size = x.shape[-1]
    spread = torch.zeros(*x.shape[:-1], size * up, dtype=x.dtype)
    spread[..., ::up] = x
    padded = F.pad(spread, pad)
    windows = padded.unfold(-1, len(taps), 1)
    return (windows * taps.flip(0)).sum(-1)[..., ::down]


def on_every_axis(x, *arguments):
    for axis in range(2, x.dim()):
        x = upfirdn(x.movedim(axis, -1), *arguments).movedim(-1, axis)
    return x


SIGNALS = [(2, 3, 8), (2, 3, 6, 10)]


@pytest.mark.parametrize("shape", SIGNALS, ids=str)
@pytest.mark.parametrize(
    "layer, gain, up, down, pad", [(FilterDown, 1, 1, 2, (1, 1)), (FilterUp, 2, 2, 1, (2, 1)), (Blur, 1, 1, 1, (2, 2))]
)
def test_filters_are_upfirdn(layer, gain, up, down, pad, shape):
    """With the taps and paddings of score_sde's upsample_2d, downsample_2d and conv_downsample_2d."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = layer(3, len(shape) - 2).double()(x)
    assert torch.allclose(found, on_every_axis(x, gain * TAPS, up, down, pad), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", SIGNALS, ids=str)
@pytest.mark.parametrize("down, up", [(FilterDown, FilterUp), (MeanDown, RepeatUp)])
def test_up_is_the_transpose_of_down_and_constants_stay(down, up, shape):
    rank = len(shape) - 2
    down, up = down(3, rank).double(), up(3, rank).double()
    one = torch.ones(shape, dtype=torch.float64)
    inner = (..., *[slice(1, -1)] * rank)
    for y in (down(one), up(one)):
        assert torch.allclose(y[inner], torch.ones_like(y[inner]), rtol=1e-14)
    x, generator = one.requires_grad_(), torch.Generator().manual_seed(0)
    z = torch.randn(down(x).shape, generator=generator, dtype=x.dtype)
    (transposed,) = torch.autograd.grad(down(x), x, z)
    assert torch.allclose(up(z), 2**rank * transposed, rtol=1e-12)


def test_without_the_filter_values_are_averaged_and_repeated():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert torch.allclose(MeanDown(3, 2)(x), F.avg_pool2d(x, 2), rtol=1e-12)
    for y in (x, x.to(memory_format=torch.channels_last)):
        assert torch.equal(RepeatUp(3, 2)(y), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("size", [6, 32])
@pytest.mark.parametrize("channels", [8, 40, 320])
def test_the_norm_is_torchs_in_every_memory_format(channels, size, modulated):
    """Large and small, with a mean far from 0, with samples' own scale and shift; and so are its gradients."""
    layer, generator = random(Norm(channels), std=1.0), torch.Generator().manual_seed(0)
    x = 3 + torch.randn(2, channels, size, size, generator=generator)
    groups, given = min(channels // 4, 32), torch.randn(2, 2, channels, generator=generator) if modulated else ()

    def torchs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        scale, shift = (y[:, :, None, None] for y in given) if given else (1, 0)
        return F.group_norm(x, groups, weight, bias, 1e-6) * scale + shift

    arguments = [y.detach().double().requires_grad_() for y in (x, layer.weight, layer.bias, *given)]
    cotangent = torch.randn(x.shape, generator=generator)
    expected = torchs(*arguments)
    gradients = torch.autograd.grad(expected, arguments, cotangent.double())
    for form in (torch.contiguous_format, torch.channels_last):
        mine = [y.detach().clone().requires_grad_() for y in (x.contiguous(memory_format=form), *given)]
        h = layer(*mine)
        assert torch.allclose(h.double(), expected, rtol=1e-5, atol=5e-5) and h.stride() == mine[0].stride()
        found = torch.autograd.grad(h, [mine[0], layer.weight, layer.bias, *mine[1:]], cotangent)
        for one, other in zip(found, gradients, strict=True):
            assert torch.allclose(one.double(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_the_norm_sums_in_single_precision():
    """In half precision, channels last, as accurate as its input and output are."""
    layer, x = Norm(8), 8 + torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    x = x.bfloat16().to(memory_format=torch.channels_last)
    expected = F.group_norm(x.double(), 2, eps=1e-6)
    assert torch.allclose(layer(x).double(), expected, rtol=1e-2, atol=1e-2) and layer(x).dtype == x.dtype


@pytest.mark.parametrize("rescale", [False, True])
def test_a_rescaled_network_keeps_variances_at_its_start(rescale):
    """Of a sum of two inputs of unit variance through a convolution, the skip's; torch's own start has a third."""
    block = Residual(Style(2, skip_rescale=rescale), 64, 96)
    x = torch.randn(4, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = 2 / (64 + 96) if rescale else 1 / (3 * 64)
    assert float(block.skip.weight.detach().var()) == pytest.approx(expected, rel=0.05)
    assert float(block(x, torch.zeros(4, block.features)).detach().var()) == pytest.approx(
        64 * expected * block.gain**2, rel=0.15
    )


def test_groups_are_those_of_score_sde():
    """min(channels / 4, 32), where that divides the channels."""
    groups = {channels: Norm(channels).num_groups for channels in (1, 4, 16, 96, 128, 384, 6, 10)}
    assert groups == {1: 1, 4: 1, 16: 4, 96: 24, 128: 32, 384: 32, 6: 1, 10: 2}


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_a_new_network_outputs_zero_and_learns_everywhere(arguments):
    """Branches start at zero, so that it takes a step each to open the last layer and the inner ones."""
    net = build(arguments)
    x0, label = inputs(arguments, 4, torch.float32)
    assert not net(x0, label).any()
    classes = {"class_label": torch.arange(4) % (net.embed.classes.num_embeddings)} if net.embed.classes else {}
    model, generator = ScoreNetwork(net, VP(t_min=1e-2)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        target = denoising_score_matching(model, x0, generator=generator, **classes)
        target.mean().backward()
        optimizer.step()
    still = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    assert not still


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_samples_of_a_batch_do_not_meet_and_their_noise_levels_matter(arguments):
    net = random(build(arguments)).double()
    x, label = inputs(arguments)
    whole = net(x, label)
    assert whole.shape == x.shape and whole.dtype == torch.float64
    for i in range(len(x)):
        assert torch.allclose(net(x[i : i + 1], label[i : i + 1])[0], whole[i], rtol=1e-10, atol=1e-12)
    assert (net(x, label + 0.1) - whole).abs().flatten(1).amax(1).min() > 1e-6


IMAGES = [arguments for arguments in VARIANTS if len(arguments["shape"]) == 3]


@pytest.mark.parametrize("grad", [False, True])
def test_channels_last_gives_the_same_and_stays(grad):
    """Also from one layer to the next: a layer that changed the format would cost a copy."""
    strange = []
    for arguments in IMAGES:
        net = random(build(arguments))
        x, label = inputs(arguments, dtype=torch.float32)
        with torch.set_grad_enabled(grad):
            expected = net(x, label).detach()
            net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
            for layer in net._layers():
                layer.register_forward_hook(lambda layer, _, h: strange.append(layer) if not last(h) else None)
            found = net(x, label).detach()
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())), arguments
    assert not strange


def last(h):
    return h.is_contiguous(memory_format=torch.channels_last)


def test_attention_does_not_know_the_order_of_positions_and_splits_into_heads():
    """A permutation of the positions permutes the outputs; each head's values come from its own channels alone."""
    x = torch.randn(2, 8, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = random(Attention(Style(2, heads=2), 8), std=0.5).double()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = x.flatten(2)[..., order].unflatten(2, (3, 4))
    assert torch.allclose(layer(shuffled).flatten(2), layer(x).flatten(2)[..., order], rtol=1e-10)
    tokens = layer.norm(x).flatten(2).mT
    q, k, v = (tokens @ w.mT + b for w, b in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True))
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        heads.append(torch.softmax(q[..., part] @ k[..., part].mT / 2, -1) @ v[..., part])
    expected = x + (torch.cat(heads, -1) @ layer.out.weight.mT + layer.out.bias).mT.reshape(x.shape)
    assert torch.allclose(layer(x), expected, rtol=1e-10)


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_gradients_of_gradients(arguments):
    """The gradient of |J^T v|^2 along u, against central differences."""
    net = random(build(arguments), std=0.2).double()
    x, label = inputs(arguments, 2)
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(2))

    def squared(x, create_graph=False):
        x = x.detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            (product,) = torch.autograd.grad(net(x, label), x, v, create_graph=create_graph)
        return x, product.square().sum()

    point, value = squared(x, create_graph=True)
    (slope,) = torch.autograd.grad(value, point)
    step = 3e-6
    expected = (squared(x + step * u)[1] - squared(x - step * u)[1]) / (2 * step)
    assert torch.allclose((slope * u).sum(), expected, rtol=1e-5)


def attending(net):
    return [
        [bool(list(stage.attention.modules())[1:]) for stage in stages] for stages in (*net.down, net.middle, *net.up)
    ]


def test_where_the_network_attends():
    """After every block on the way down, after the last one on the way up, and once in the middle."""
    net = build(dict(shape=(1, 8, 8), blocks=2))
    assert attending(net) == [[False, False], [True, True], [True, False], [False, False, True], [False, False, False]]
    flat = build(dict(shape=(1, 8, 8), multipliers=(1,), attention=(False,), blocks=2))
    assert attending(flat) == [[False, False], [True, False], [False] * 3]


def test_the_way_up_meets_the_way_down_in_reverse():
    net = random(build(dict(shape=(1, 8, 8), blocks=2, multipliers=(1, 1, 1), attention=(False,) * 3)))
    kept, met = [], []
    for enter, stages in zip(net.enter, net.down, strict=True):
        for layer in (enter, *stages):
            layer.register_forward_hook(lambda _, given, h: kept.append(h))
    for stages in net.up:
        for layer in stages:
            layer.register_forward_hook(lambda _, given, h: met.append(given[0][:, 8:]))
    net(*inputs(dict(shape=(1, 8, 8)), dtype=torch.float32))
    assert len(kept) == len(met) == 9
    assert all(torch.equal(a, b) for a, b in zip(kept, reversed(met), strict=True))


@pytest.mark.parametrize("resample", [None, FilterDown, FilterUp])
def test_a_rescaled_block_starts_as_its_input_over_root_two(resample):
    block = Residual(Style(1, "shift", skip_rescale=True), 4, 4, resample)
    x = torch.randn(2, 4, 8)
    expected = x if resample is None else block.skip(resample(4, 1)(x))
    assert torch.allclose(block(x, torch.randn(2, block.features)), expected / 2**0.5)
    assert torch.allclose(Attention(Style(1, skip_rescale=True), 4)(x), x / 2**0.5)


def test_the_pyramid_is_blurred_strided_and_summed():
    """Against conv_downsample_2d of score_sde: upfirdn padded by (2, 2), then a strided convolution."""
    layer = Inject(Style(2, skip_rescale=True, fir=True), 3, 5).double()
    generator = torch.Generator().manual_seed(0)
    x, h = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 3, 8, 12), (2, 5, 4, 6)))
    blurred = on_every_axis(x, TAPS, 1, 1, (2, 2))
    strided = layer.down[1]
    expected = (h + F.conv2d(blurred, strided.weight, strided.bias, stride=2)) / 2**0.5
    found, pyramid = layer(h, x)
    assert torch.allclose(found, expected, rtol=1e-12) and pyramid is found


def test_modulations_shift_before_or_scale_and_shift_after_the_norm():
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    modulation = torch.randn(2, 8, dtype=torch.float64)
    after = random(Residual(Style(1), 4, 4)).double()
    scale, shift = modulation[:, :4, None], modulation[:, 4:, None]
    h = after.conv1(F.silu(after.norm1(x)))
    h = after.norm2.norm(h) * (1 + scale) + shift
    assert torch.allclose(after(x, modulation), x + after.conv2(F.silu(h)), rtol=1e-12)
    before = random(Residual(Style(1, "shift"), 4, 4)).double()
    h = before.norm2.norm(before.conv1(F.silu(before.norm1(x))) + scale)
    assert torch.allclose(before(x, modulation[:, :4]), x + before.conv2(F.silu(h)), rtol=1e-12)


def test_every_block_hears_of_the_noise_level_through_its_own_share():
    net = random(build(dict(shape=(1, 8, 8), blocks=2)))
    assert net.features == [layer.features for layer in net._layers()]
    heard = []
    for layer in net._layers():
        layer.register_forward_hook(lambda _, given, h: heard.append(given[1]))
    x, label = inputs(dict(shape=(1, 8, 8)), dtype=torch.float32)
    net(x, label)
    assert torch.equal(torch.cat(heard, 1), net.project(F.silu(net.embed(label))))


def test_classes_matter_and_none_is_the_last():
    net = random(build(VARIANTS[0]))
    x, label = inputs(VARIANTS[0], dtype=torch.float32)
    by_class = [net(x, label, torch.full((3,), k)).detach() for k in range(4)]
    assert min(float((by_class[i] - by_class[j]).abs().max()) for i in range(4) for j in range(i)) > 1e-4
    assert torch.equal(net(x, label), by_class[3])
    with pytest.raises(ValueError, match="knows no classes"):
        build(VARIANTS[1])(*inputs(VARIANTS[1], dtype=torch.float32), class_label=torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("fourier, exponents", [(2, (1, 2)), ([7, 8], (7, 8)), ((0,), (0,))])
def test_fourier_features_of_the_input(fourier, exponents):
    net = build(dict(shape=(1, 8), fourier=fourier))
    x = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(2, 1, 8)
    angles = [2**n * torch.pi * x for n in exponents]
    expected = torch.cat([x, *(a.sin() for a in angles), *(a.cos() for a in angles)], 1)
    assert torch.allclose(net._with_octaves(x), expected, atol=1e-10)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(fir=True), "fir=True needs resample=\"residual\".*found resample='conv'"),
        (dict(resample="pool"), "resample must be one of conv, residual, found 'pool'"),
        (dict(modulation="scale"), "modulation must be one of shift, scale_shift, found 'scale'"),
        (dict(embedding="positional"), "embedding must be one of sinusoidal, fourier, found 'positional'"),
        (dict(embedding_features=7), "features must be an even number of at least 2, found 7"),
        (dict(embedding_features=0), "features must be an even number of at least 2, found 0"),
        (dict(classes=-1), "classes must be a number of classes, or 0"),
        (dict(heads=0), "heads must be positive whole numbers, found 0"),
        (dict(heads=3), r"the widths \[8, 16\] must be divisible by heads=3"),
        (dict(channels=-8), "channels must be positive whole numbers, found -8"),
        (dict(channels=8.5), "channels must be positive whole numbers, found 8.5"),
        (dict(blocks=0), "blocks must be positive whole numbers, found 0"),
        (dict(outputs=0), "outputs must be positive whole numbers, found 0"),
        (dict(multipliers=(), attention=()), "multipliers must be positive whole numbers, found none"),
        (dict(multipliers=(1, 0)), "multipliers must be positive whole numbers, found 1, 0"),
        (dict(shape=(0, 8, 8)), "shape must be positive whole numbers, found 0, 8, 8"),
        (dict(shape=(1, -8)), "shape must be positive whole numbers, found 1, -8"),
        (dict(attention=(True,)), "attention needs 2 entries, one per multiplier, found 1"),
        (dict(dropout=1.0), r"dropout must be a probability in \[0, 1\), found 1.0"),
        (dict(dropout=-0.1), "dropout must be a probability"),
        (dict(dropout=float("nan")), "dropout must be a probability"),
        (dict(fourier=-1), "fourier must be a number of octaves or a list of exponents, found -1"),
    ],
    ids=str,
)
def test_a_unet_that_can_not_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{"shape": (1, 8, 8), "channels": 8, **arguments})
