"""Samples from the same noise, animations, schedules, learned densities: what stands where, and in which colours."""

import math
from contextlib import contextmanager
from itertools import combinations

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image
from tanh_process import Benes

from experiments import animation, pictures, plane_figures, process_figures, sampler_figures
from experiments.canvas import BLUE, FAINT, MARKERS, ORANGE, PALETTE, curve_look, equal_contrast, tile
from experiments.run import Run
from sde import EDM, VE, VP, RectifiedFlow
from solvers import DDIM


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def square(half=2.0, m=7):
    axis = torch.linspace(-half, half, m)
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a module draws, as Matplotlib has them."""
    kept = []
    for module in (sampler_figures, process_figures, plane_figures):

        @contextmanager
        def spy(*arguments, original=module.canvas, **more):
            with original(*arguments, **more) as figure:
                kept.append(figure)
                yield figure

        monkeypatch.setattr(module, "canvas", spy)
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# What is refused.

NAN = torch.full((4, 2), torch.nan)
PAIR = {"a": normal(3, 1, 4, 4), "b": normal(3, 1, 4, 4, seed=1)}
CLOCK = ([1.0, 0.5, 0.1], [-9.0, 0.0, 9.0])
REFUSED = {
    "samples['b']: expected shape (3, 1, 4, 4), found (2, 1, 4, 4)": lambda p: sampler_figures.same_noise_images(
        PAIR | {"b": normal(2, 1, 4, 4)}, "a", p
    ),
    "reference: expected one of a, b, found 'flow'": lambda p: sampler_figures.same_noise_images(PAIR, "flow", p),
    "reference: expected one of no samples": lambda p: sampler_figures.same_noise_points({}, "flow", p),
    "1 or 3 channels, found (3, 2, 4, 4)": lambda p: sampler_figures.same_noise_images(
        {"a": normal(3, 2, 4, 4)}, "a", p
    ),
    "columns: expected at least 1, found 0": lambda p: sampler_figures.same_noise_images(PAIR, "a", p, columns=0),
    "samples['a']: expected shape (N, C, H, W), found (0, 1, 4, 4)": lambda p: sampler_figures.same_noise_images(
        {"a": torch.zeros(0, 1, 4, 4)}, "a", p
    ),
    "samples['a']: expected finite numbers, found 8 NaN": lambda p: sampler_figures.same_noise_points(
        {"a": NAN}, "a", p
    ),
    "expected another sampler beside the reference 'a'": lambda p: sampler_figures.same_noise_points(
        {"a": normal(4, 2)}, "a", p
    ),
    "trajectory: expected shape (K, N, C, H, W), found (0, 1, 1, 4, 4)": lambda p: animation.animated_images(
        torch.zeros(0, 1, 1, 4, 4), [], [], p
    ),
    "trajectory: expected finite numbers, found 24 NaN": lambda p: animation.animated_points(
        NAN.expand(3, 4, 2), *CLOCK, p, normal(9, 2)
    ),
    "times: expected shape (3), found (2)": lambda p: animation.animated_points(
        normal(3, 4, 2), [1, 0], CLOCK[1], p, normal(9, 2)
    ),
    "log_snr: expected shape (3), found (2)": lambda p: animation.animated_images(
        normal(3, 1, 1, 4, 4), CLOCK[0], [0, 1], p
    ),
    "log_snr: expected finite numbers, found 1 NaN": lambda p: animation.animated_images(
        normal(3, 1, 1, 4, 4), CLOCK[0], [0, 1, math.nan], p
    ),
    "trajectory: expected shape (N, C, H, W) with 1 or 3": lambda p: animation.animated_images(
        normal(3, 1, 2, 4, 4), *CLOCK, p
    ),
    "processes: expected at least one, found none": lambda p: process_figures.schedules({}, p),
    "chosen: expected one of VP, found 'EDM'": lambda p: process_figures.schedules({"VP": VP()}, p, chosen="EDM"),
    "data: expected finite numbers, found 8 NaN": lambda p: plane_figures.density_beside_data(
        normal(7, 7), square(), NAN, p
    ),
    "grid: expected shape (7, 7, 2), found (6, 6, 2)": lambda p: plane_figures.density_beside_data(
        normal(7, 7), square(m=6), normal(9, 2), p
    ),
    "learned: expected shape (1, M, M, 2), found (2, 7, 7, 2)": lambda p: plane_figures.scores_over_data(
        normal(2, 7, 7, 2), square(), normal(9, 2), p, [1]
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refuses(words, tmp_path):
    with pytest.raises(ValueError) as error:
        REFUSED[words](tmp_path / "figure")
    assert words in str(error.value)
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# The same noise.


def test_sample_i_of_every_sampler_stands_in_column_i_and_the_nearest_row_comes_first(tmp_path, drawn):
    columns, names = 5, ["far_off", "reference", "near"]
    offsets = {"reference": 0.0, "near": 0.2, "far_off": 0.8}
    # Red tells the column and green the row.
    red = torch.linspace(-1, 1, columns)
    samples = {
        name: torch.stack((red, torch.full((columns,), offsets[name]), torch.zeros(columns)), 1)[..., None, None]
        for name in names
    }
    shown = {name: x.expand(-1, -1, 4, 4) for name, x in samples.items()}
    path = sampler_figures.same_noise_images(shown, "reference", tmp_path / "new" / "same.png")
    picture = (torch.from_numpy(plt.imread(path)[..., :3]) * 255).round()
    places = {}
    for name in names:
        for i in range(columns):
            colour = ((samples[name][i, :, 0, 0].double() + 1) / 2 * 255).round()
            y, x = torch.nonzero(((picture - colour).abs() <= 1).all(dim=-1), as_tuple=True)
            assert len(x) > 1000, (name, i)
            places[name, i] = x.double().median().item(), y.double().median().item()
    for i in range(columns):
        assert max(abs(places[name, i][0] - places["near", i][0]) for name in names) <= 1  # of 60 pixels
        assert [places[name, i][1] for name in ("reference", "near", "far_off")] == sorted(
            places[name, i][1] for name in names
        )
    across = [places["near", i][0] for i in range(columns)]
    assert across == sorted(across) and len(set(across)) == columns
    words = [text.get_text() for text in drawn[0].axes[0].texts]
    assert words[:6] == ["reference", "reference", "near", f"{0.2 / 3**0.5:.3f}", "far off", f"{0.8 / 3**0.5:.3f}"]


def test_lines_lead_from_each_point_of_the_reference_to_the_same_sample(tmp_path, drawn):
    start = normal(9, 2)
    samples = {"heun": start + 0.3, "flow": start, "ddim": start + torch.tensor([0.4, 0.0])}
    sampler_figures.same_noise_points(samples, "flow", tmp_path / "same.png", data=normal(50, 2), shown=6)
    panels = drawn[0].axes
    assert [axes.get_title() for axes in panels] == ["ddim\nRMS distance 0.400", "heun\nRMS distance 0.424"]
    for axes, name in zip(panels, ("ddim", "heun"), strict=True):
        lines, rings, dots = axes.collections[-3:]
        found = torch.tensor([segment.tolist() for segment in lines.get_segments()])
        assert torch.allclose(found, torch.stack((start, samples[name]), 1)[:6])
        assert torch.allclose(torch.as_tensor(rings.get_offsets().tolist()), start[:6])
        assert torch.allclose(torch.as_tensor(dots.get_offsets().tolist()), samples[name][:6])


# ---------------------------------------------------------------------------------------------------------------------
# Animations.


def digits(frames=5, count=6):
    """Noise of deviation 50 that turns into images of deviation about 1/2."""
    scale = torch.linspace(50, 0, frames).view(-1, 1, 1, 1, 1)
    return scale * normal(frames, count, 1, 8, 8) + normal(count, 1, 8, 8, seed=1).clamp(-1, 1)


def frames_of(path):
    with Image.open(path) as file:
        found, stands = [], []
        for i in range(file.n_frames):
            file.seek(i)
            stands.append(file.info["duration"])
            height, width = file.size[::-1]
            found.append(torch.frombuffer(bytearray(file.convert("RGB").tobytes()), dtype=torch.uint8))
        return torch.stack(found).view(-1, height, width, 3).long(), stands, file.info


def test_an_animation_has_a_frame_per_state_pauses_at_the_end_and_repeats(tmp_path):
    clock = torch.linspace(1, 0.01, 5), torch.linspace(-9, 9, 5)
    path = animation.animated_images(digits(), *clock, tmp_path / "new" / "a.gif", columns=3)
    assert path.read_bytes()[:6] == b"GIF89a"
    _, stands, info = frames_of(path)
    assert stands == [animation.FIRST, *[animation.FRAME] * 3, animation.LAST] and info["loop"] == 0
    assert animation.LAST >= 2000 > animation.FIRST > animation.FRAME
    again = animation.animated_images(digits(), *clock, tmp_path / "b.gif", columns=3)
    assert again.read_bytes() == path.read_bytes()
    points = 3 * normal(5, 20, 2)
    both = [animation.animated_points(points, *clock, tmp_path / name, normal(99, 2)) for name in ("c.gif", "d.gif")]
    assert both[0].read_bytes() == both[1].read_bytes() and frames_of(both[0])[1] == stands
    assert plt.get_fignums() == []


def test_the_last_frame_is_the_samples_and_all_have_their_contrast(tmp_path):
    x = digits()
    path = animation.animated_images(x, torch.linspace(1, 0.01, 5), torch.linspace(-9, 9, 5), tmp_path / "a.gif", 3)
    frames, *_ = frames_of(path)
    shown = torch.stack([tile(state, 3, animation.TILE) for state in equal_contrast(x, torch.linspace(1, 0.01, 5))])
    body = frames[:, animation.HEAD :]
    assert body.shape == shown.shape
    assert (body - 255 * shown).abs().max() <= 255 / (2 * animation.GREYS - 2) + 1
    last = ((x[-1].clamp(-1, 1) + 1) / 2 * 255)[0, 0]
    factor = animation.TILE // 8
    assert (body[-1, 2 : 2 + 8 * factor : factor, 2 : 2 + 8 * factor : factor, 0] - last).abs().max() <= 5.2


def test_still_states_keep_their_frames(tmp_path):
    """Pillow joins frames that are the same; the line above tells them apart."""
    x = digits(1).expand(6, -1, -1, -1, -1)
    frames, stands, _ = frames_of(
        animation.animated_images(x, torch.full((6,), 0.5), torch.zeros(6), tmp_path / "a.gif")
    )
    assert len(frames) == 6 and sum(stands) == animation.FIRST + 4 * animation.FRAME + animation.LAST
    one = animation.animated_images(digits(1), [0.0], [math.inf], tmp_path / "b.gif")
    assert len(frames_of(one)[0]) == 1


def test_every_frame_tells_its_time_and_noise_level(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(animation, "_write", lambda figure, show, frames, path, colours: kept.extend((show, figure)))
    animation.animated_points(normal(3, 4, 2), [1, 0.5, 2e-5], [-math.inf, 0.25, 13], tmp_path / "a.gif", normal(9, 2))
    words = [[artist.get_text() for artist in kept[0](i) if hasattr(artist, "get_text")] for i in range(3)]
    assert words == [
        ["t = 1", "log-SNR = −∞"],
        ["t = 0.5", "log-SNR = +0.2"],
        ["t = 2e-05", "log-SNR = +13.0"],
    ]


def test_points_move_with_a_tail_and_end_without_one(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(animation, "_write", lambda figure, show, frames, path, colours: kept.append(show))
    x = normal(6, 4, 2).double()
    animation.animated_points(x, torch.linspace(1, 0, 6), torch.zeros(6), tmp_path / "a.gif", normal(9, 2), tail=2)
    for i, since in enumerate((0, 0, 0, 1, 2, 5)):
        lines, dots = kept[0](i)[:2]
        assert torch.allclose(torch.as_tensor(dots.get_offsets().tolist()).double(), x[i])
        tails = torch.as_tensor([segment.tolist() for segment in lines.get_segments()], dtype=torch.float64)
        assert torch.allclose(tails, x[since : i + 1].transpose(0, 1))


@pytest.mark.parametrize("shape", [(24, 1, 8, 8), (8, 3, 32, 32)], ids=str)
def test_an_animation_is_less_than_a_megabyte_even_of_noise_alone(tmp_path, shape):
    frames = pictures._FRAMES
    assert shape[0] == min(24, max(2, pictures._PIXELS // math.prod(shape[2:])))
    clock = torch.linspace(1, 0, frames), torch.zeros(frames)
    path = animation.animated_images(normal(frames, *shape), *clock, tmp_path / "a.gif")
    assert path.stat().st_size < 1e6
    assert len(frames_of(path)[0]) == frames


def test_photographs_keep_their_colours(tmp_path):
    """The end of a way from noise to smooth colours: on average a colour is off by less than 8 of 255."""
    axis = torch.linspace(-1, 1, 32)
    smooth = torch.stack((axis.expand(32, 32), axis.expand(32, 32).T, -axis.expand(32, 32))).expand(4, 3, 32, 32)
    x = torch.stack([smooth + scale * normal(4, 3, 32, 32) for scale in (50, 1, 0.3, 0)])
    path = animation.animated_images(x, [3, 2, 1, 0], torch.zeros(4), tmp_path / "a.gif", 4)
    shown = 255 * tile(x[-1], 4, animation.TILE)
    assert (frames_of(path)[0][-1, animation.HEAD :] - shown).abs().mean() < 8


def test_white_stays_white_among_colours(tmp_path):
    path = animation.animated_points(normal(4, 300, 2), [3, 2, 1, 0], torch.zeros(4), tmp_path / "a.gif", normal(99, 2))
    frames, *_ = frames_of(path)
    assert (frames == 255).all(dim=-1).float().mean() > 0.5
    assert ((frames - torch.tensor([0, 0x72, 0xB2])).abs() < 24).all(dim=-1).sum() > 1000  # the points' blue


@pytest.mark.parametrize("sde", [VP(), VE(), EDM(), RectifiedFlow()], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("steps", [pictures._STRIP, DDIM(steps=200, grid="log_snr")], ids=lambda solver: solver.grid)
def test_frames_are_chosen_at_equal_angles(sde, steps):
    level = sde.log_snr(steps.times(sde).double())
    chosen = animation.evenly(level, pictures._FRAMES)
    assert chosen[0] == 0 and chosen[-1] == len(level) - 1 and (chosen.diff() > 0).all()
    angle = torch.atan((-level / 2).exp())
    # No frame is further from its place than the nearest of all states.
    wanted = torch.linspace(angle[0].item(), angle[-1].item(), pictures._FRAMES, dtype=torch.float64)
    best = (wanted[:, None] - angle).abs().amin(dim=1)
    assert torch.allclose((wanted[:, None] - angle[chosen]).abs().amin(dim=1), best)
    # And none is missing: whatever the process, there are states to choose from.
    assert len(chosen) == pictures._FRAMES


def test_far_noise_has_ticks_at_powers_of_ten_that_are_apart(tmp_path, drawn):
    noise, data = 50 * normal(1, 40, 2), normal(1, 40, 2)
    plane_figures.trajectories_2d(torch.cat((noise, data)), tmp_path / "t.png", data[0])
    (axes,) = drawn[0].axes
    for axis in (axes.xaxis, axes.yaxis):
        assert [text.get_text() for text in axis.get_ticklabels()] == ["-100", "-10", "-1", "0", "1", "10", "100"]
    places = torch.as_tensor([axes.transAxes.inverted().transform(axes.transData.transform((x, 0)))[0] for x in (0, 1)])
    assert places.diff() > 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Schedules, densities.


def test_schedules_are_those_of_each_process_and_the_band_is_the_chosen_one(tmp_path, drawn):
    known = {"VP": VP(), "EDM": EDM()}
    process_figures.schedules(known, tmp_path / "s.png", chosen="EDM")
    (figure,) = drawn
    for axes, part in zip(figure.axes, ("alpha", "sigma", "log_snr"), strict=True):
        *lines, band = axes.lines
        for line, sde in zip(lines, known.values(), strict=True):
            t = torch.as_tensor(line.get_xdata()) * sde.t_max
            assert t[0] == sde.t_min and t[-1] == sde.t_max
            assert torch.allclose(torch.as_tensor(line.get_ydata()), getattr(sde, part)(t), rtol=1e-9)
        assert (band.get_ydata() == lines[1].get_ydata()).all() and band.get_linewidth() > 5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["VP", "EDM"]


def test_the_process_of_a_run_stands_beside_the_family(tmp_path, drawn):
    for sde, own, count in ((VP(), "VP", 7), (VP(beta_max=9.0), "VP (this one)", 8)):
        assert len(pictures.of_process(sde, Run(tmp_path / str(count), ""))) == 1
        names = [text.get_text() for text in drawn[-1].legends[0].get_texts()]
        assert own in names and len(names) == count
    assert pictures.of_process(Benes(), Run(tmp_path / "none", "")) == []


def test_a_density_on_a_grid_tells_its_integral(tmp_path, drawn):
    wide = square(6.0, 61) * torch.tensor([1.0, 0.5])  # cells that are not square
    log_prob = torch.distributions.Normal(0.0, 1.0).log_prob
    for grid, width in ((wide, 0.5), (square(1.0, 81), 1.0)):
        learned = log_prob(grid[..., 0]) + log_prob(grid[..., 1] / width) - math.log(width)
        plane_figures.density_beside_data(learned, grid, normal(9, 2), tmp_path / "d.png")
    titles = [figure.axes[1].get_title() for figure in drawn]
    assert titles[0] == "learned (integral 1.000)"
    mass = float(titles[1].removeprefix("learned (integral ").removesuffix(")"))
    assert mass == pytest.approx(math.erf(1 / 2**0.5) ** 2, rel=0.03)


def test_learned_scores_point_the_way_they_do(tmp_path, drawn):
    grid = square()
    plane_figures.scores_over_data(torch.stack((-grid, grid)), grid, normal(99, 2), tmp_path / "s.png", [0.1, 1])
    inward, outward = (next(c for c in axes.collections if hasattr(c, "U")) for axes in drawn[0].axes[:2])
    assert (inward.U == -outward.U).all() and (inward.V == -outward.V).all()
    assert inward.U[0] > 0 and inward.U[-1] < 0  # from the left edge to the right, from the right one to the left


# ---------------------------------------------------------------------------------------------------------------------
# Colours.

# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency", 2009:
# on linear RGB, at full severity.
SEEN = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


def lab(colour, seen):
    """CIELAB, under D65, of a colour as "#rrggbb", seen through a matrix on linear RGB."""
    srgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=torch.float64)
    linear = torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor(XYZ, dtype=torch.float64)
    xyz = to_xyz @ (torch.tensor(seen, dtype=torch.float64) @ linear).clamp(0, 1) / to_xyz.sum(1)
    f = torch.where(xyz > 216 / 24389, xyz ** (1 / 3), (24389 / 27 * xyz + 16) / 116)
    return torch.stack((116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])))


@pytest.mark.parametrize("kind", SEEN)
def test_any_two_colours_are_told_apart_with_any_colour_vision(kind):
    """At least 15 apart in CIELAB (about 2.3 is just noticeable), for those of curves and white.

    The grey of what stands behind is only ever beside blue and orange.
    """
    white = lab("#ffffff", SEEN[kind])
    assert torch.allclose(white, torch.tensor([100.0, 0, 0], dtype=torch.float64), atol=1e-3)  # white stays white
    pairs = [*combinations((*PALETTE, "#ffffff"), 2), (FAINT, BLUE), (FAINT, ORANGE), (FAINT, "#ffffff")]
    seen = {colour: lab(colour, SEEN[kind]) for pair in pairs for colour in pair}
    apart = {pair: (seen[pair[0]] - seen[pair[1]]).norm().item() for pair in pairs}
    near = {pair: round(value, 1) for pair, value in apart.items() if value < 15}
    assert not near


def test_no_two_curves_of_a_figure_look_alike():
    """Those of one colour, or of colours that are near, differ in their markers, and from the eighth on in dashes."""
    for look, count in ((curve_look, 77), (process_figures._look, 9)):
        looks = [look(i) for i in range(count)]
        shown = {(one["color"], one["marker"]) for one in looks}
        assert len(shown) == count
        assert len({one["marker"] for one in looks[: len(MARKERS)]}) == min(count, len(MARKERS))
