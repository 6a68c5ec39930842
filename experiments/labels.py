"""Labels written beside the points that they name, where they cover nothing: for figures without a legend."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from experiments.canvas import FAINT

GAPS = (8, 14, 22, 34, 50, 70, 95, 130, 170)  # pixels between a point and its label
ANGLES = 24


def place_labels(curves: Sequence[Tensor], sizes: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
    """For each curve the point to label, and the centre of its label: (L, 2) and (L, 2), all in pixels.

    curves: L tensors (R, 2), the points of a polygonal line each. sizes: (L, 2), width and height of the labels.
    frame: (x0, y0, x1, y1), which no label may leave. Greedy: the labels with the least room around them come first,
    each takes the place with the least cost (distance, points and lines covered, labels covered).
    """
    ink = torch.cat([_dotted(curve) for curve in curves])
    ends = torch.stack([curve[-1] for curve in curves])
    crowd = torch.cdist(ends, torch.cat(list(curves))).lt(80).sum(dim=1)
    anchors, centres = torch.zeros_like(sizes), torch.zeros_like(sizes)
    taken: list[Tensor] = []
    for i in crowd.argsort(descending=True, stable=True).tolist():
        anchor, centre, gap = _candidates(curves[i], sizes[i])
        boxes = _boxes(centre, sizes[i])
        cost = gap + 40 * _covered(boxes, ink) + _outside(boxes, frame) + 40 * _crossings(anchor, centre, taken)
        cost += 400 * sum((_overlap(boxes, other) for other in taken), torch.zeros(len(boxes)))
        # The nearest ink should be the curve's own: a label beside a stranger misleads.
        cost += 15 * (_nearest(boxes, ink) < _nearest(boxes, _dotted(curves[i])) - 1)
        others = torch.cat([ends[:0], *(_dotted(curve) for j, curve in enumerate(curves) if j != i)])
        cost += 60 * _near(anchor, others)
        best = int(cost.argmin())
        anchors[i], centres[i] = anchor[best], centre[best]
        taken.append(boxes[best])
    return anchors, centres


def label_curves(axes, curves: dict[str, Tensor], colours: Sequence[str]) -> None:
    """Writes each name beside a point of its curve (R, 2), where it covers nothing; a line leads there from afar.

    colours: one per curve; the names are written in a darker shade.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke

    axes.figure.draw_without_rendering()  # settles the layout, and with it where points are in pixels
    pixels = [torch.as_tensor(axes.transData.transform(curve.numpy())) for curve in curves.values()]
    sizes = torch.tensor([_text_size(axes, name) for name in curves], dtype=torch.float64)
    frame = torch.tensor(axes.get_window_extent().extents, dtype=torch.float64)
    places = zip(curves, *place_labels(pixels, sizes, frame), sizes, strict=True)
    for i, (name, anchor, centre, size) in enumerate(places):
        far = bool(((centre - anchor).abs() > size / 2 + 14).any())
        spot, point = (axes.transData.inverted().transform(xy.numpy()) for xy in (centre, anchor))
        line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4} if far else None
        style = {
            "ha": "center",
            "va": "center",
            "fontsize": 9,
            "color": [0.75 * part for part in to_rgb(colours[i])],
        }
        text = axes.annotate(name, point, spot, arrowprops=line, **style)
        text.set(in_layout=False, path_effects=[withStroke(linewidth=2.5, foreground="white")])


def _text_size(axes, words: str) -> tuple[float, float]:
    text = axes.text(0.5, 0.5, words, fontsize=9, transform=axes.transAxes)
    box = text.get_window_extent()
    text.remove()
    return box.width + 6, box.height + 2


def _candidates(curve: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points of the curve, label centres around them (P, 2), and the gaps between both (P,); the last point first."""
    angle = torch.arange(ANGLES) * 2 * math.pi / ANGLES
    direction = torch.stack([angle.cos(), angle.sin()], dim=1)
    gap = torch.tensor(GAPS, dtype=curve.dtype)
    around = (direction * size / 2 + gap[:, None, None] * direction).flatten(0, 1).to(curve.dtype)
    points = curve.flip(0)
    anchors = points.repeat_interleave(len(around), dim=0)
    return anchors, anchors + around.repeat(len(points), 1), gap.repeat_interleave(ANGLES).repeat(len(points))


def _boxes(centres: Tensor, size: Tensor) -> Tensor:
    """Boxes (x0, y0, x1, y1) of one size around P centres: (P, 4)."""
    return torch.cat([centres - size / 2, centres + size / 2], dim=1)


def _dotted(curve: Tensor, spacing: float = 4.0) -> Tensor:
    """Points (Q, 2) at most `spacing` apart along a polygonal line (R, 2)."""
    parts = [curve[-1:]]
    for a, b in pairwise(curve):
        weight = torch.linspace(0, 1, 2 + int((b - a).norm() / spacing), dtype=curve.dtype)[:-1, None]
        parts.append(a + weight * (b - a))
    return torch.cat(parts)


def _covered(boxes: Tensor, ink: Tensor, margin: float = 6.0) -> Tensor:
    """How many points of the ink (Q, 2) each of P boxes covers, or nearly: (P,)."""
    return _distances(boxes, ink).lt(margin).sum(dim=1)


def _nearest(boxes: Tensor, ink: Tensor) -> Tensor:
    return _distances(boxes, ink).amin(dim=1)


def _distances(boxes: Tensor, points: Tensor) -> Tensor:
    """From P boxes to Q points, 0 inside: (P, Q)."""
    beyond = torch.maximum(boxes[:, None, :2] - points, points - boxes[:, None, 2:]).clamp_min(0)
    return beyond.norm(dim=-1)


def _outside(boxes: Tensor, frame: Tensor) -> Tensor:
    """A cost far above all others for boxes that leave the frame: (P,)."""
    beyond = torch.cat([frame[:2] - boxes[:, :2], boxes[:, 2:] - frame[2:]], dim=1).clamp_min(0).sum(dim=1)
    return 1000 * (beyond > 0) + 10 * beyond


def _near(points: Tensor, ink: Tensor, radius: float = 14.0) -> Tensor:
    """Whether any ink (Q, 2) is near each of P points: (P,)."""
    return (torch.cdist(points, ink) < radius).any(dim=1)


def _overlap(boxes: Tensor, other: Tensor) -> Tensor:
    """Whether each of P boxes meets the other one: (P,)."""
    return ((boxes[:, :2] < other[2:]) & (boxes[:, 2:] > other[:2])).all(dim=1)


def _crossings(anchors: Tensor, centres: Tensor, taken: list[Tensor]) -> Tensor:
    """How many labels the line from each anchor to its label crosses: (P,)."""
    weight = torch.linspace(0, 1, 12, dtype=anchors.dtype)[:, None, None]
    points = anchors + weight * (centres - anchors)
    hits = [((points > box[:2]) & (points < box[2:])).all(dim=-1).any(dim=0) for box in taken]
    return sum(hits, torch.zeros(len(anchors)))
