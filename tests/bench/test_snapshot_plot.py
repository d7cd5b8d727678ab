"""The picture of size against fidelity: all that was measured is in it, and nothing else."""

from __future__ import annotations

import pytest

pytest.importorskip("cv2", reason="OpenCV is not installed: make install (extra `edge`)")

import cv2
import numpy as np

from bench.report import Figures
from bench.snapshot.plot import Point, png, points_of
from protocol.errors import NotFound

FIGURES: Figures = {
    "model": "little",
    "raw_ratio": 1.0,
    "raw_kl": 0.0,
    "raw_dppl_pct": 0.0,
    "raw_top1": 1.0,
    "near_ratio": 12.0,
    "near_kl": 0.006,
    "near_dppl_pct": 0.6,
    "near_top1": 0.96,
    "gzip_ratio": 1.2,
    "failed_ratio": None,
    "failed_kl": None,
    "failed_dppl_pct": None,
    "failed_top1": None,
}


def test_a_point_is_what_has_a_size_and_a_fidelity() -> None:
    assert points_of(FIGURES) == [Point("raw", 1.0, 0.0, 0.0, 1.0), Point("near", 12.0, 0.006, 0.6, 0.96)]
    assert [point.kind for point in points_of(FIGURES)] == ["exact", "lossy"]


def test_the_picture_shows_each_point_in_its_colour() -> None:
    with pytest.raises(NotFound):
        png({"gzip_ratio": 1.2})
    picture = cv2.imdecode(np.frombuffer(png(FIGURES), np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    green, blue = (cv2.inRange(picture[:590], np.array(c), np.array(c)).any() for c in ((55, 127, 26), (218, 105, 9)))
    assert green
    assert blue
    assert not cv2.inRange(picture[:590], np.array((0, 76, 188)), np.array((0, 76, 188))).any(), "nothing was pruned"
