from __future__ import annotations

import base64
import math
import random
import re
from xml.etree import ElementTree

import pytest
from fake_run import finished
from test_widgets import Tree, view_at

from tfos_magic.status import BoardView
from tfos_magic.widgets import chart, render_html, words

SVG = "{http://www.w3.org/2000/svg}"


def svg_of(curve: words.Curve) -> ElementTree.Element:
    """Return the picture as a browser would parse it."""
    source = chart.draw(curve).source
    return ElementTree.fromstring(base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")))


def lines_of(curve: words.Curve) -> list[list[tuple[float, float]]]:
    """Return the points of each line in the picture, without the axes."""
    paths = [path.get("d", "") for path in svg_of(curve).findall(f"{SVG}path")[1:]]
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)] for path in paths]


def by_epoch(training, validation=()):
    places = tuple(float(number) for number in range(1, 1 + max(len(training), len(validation))))
    return words.Curve("loss", tuple(training), tuple(validation), places[: len(training)], places[: len(validation)])


def test_a_falling_loss_falls_from_left_to_right_within_the_picture():
    (line,) = lines_of(by_epoch((4.0, 2.0, 1.0)))
    xs, ys = zip(*line, strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)  # down is more
    assert all(0 <= x <= 220 and 0 <= y <= 96 for x, y in line)
    assert ys[1] - ys[0] == pytest.approx(2 * (ys[2] - ys[1]), abs=0.3)


def test_two_lines_share_a_scale_and_differ_in_more_than_colour():
    curve = by_epoch((2.0, 1.0), (2.0, 1.5))
    training, validation = lines_of(curve)
    assert training[0] == validation[0]
    assert training[1][1] > validation[1][1]
    strokes = [path.get("stroke-dasharray") for path in svg_of(curve).findall(f"{SVG}path")[1:]]
    assert strokes[0] is None
    assert strokes[1]


def test_the_axes_say_between_which_values_and_epochs():
    assert [text.text for text in svg_of(by_epoch((4.0, 2.0, 1.0))).findall(f"{SVG}text")] == [
        "4.0000",
        "1.0000",
        "epoch 1",
        "3",
    ]


def test_what_is_no_number_is_a_gap():
    path = svg_of(by_epoch((3.0, math.nan, 2.0, 1.0))).findall(f"{SVG}path")[1].get("d")
    assert path.count("M") == 2
    assert path.count("L") == 1


@pytest.mark.parametrize("values", [(math.nan, math.nan), (math.inf, -math.inf), (1e308, -1e308), (5.0, 5.0), (0.0,)])
def test_any_values_can_be_drawn_and_told(values):
    assert svg_of(by_epoch(values)).tag == f"{SVG}svg"
    assert chart.describe(by_epoch(values))
    assert render_html(BoardView(history={"loss": values}))


def test_the_words_say_what_the_picture_shows():
    assert chart.describe(by_epoch((1.9, 0.4, 0.5), (2.0, 0.7, 0.6))) == (
        "loss by epoch, 1 to 3: training from 1.9000 to 0.5000 (lowest 0.4000, highest 1.9000); "
        "validation from 2.0000 to 0.6000 (lowest 0.6000, highest 2.0000)"
    )


def test_a_chart_is_small_however_long_the_run():
    dice = random.Random(1)
    values = [dice.random() for _ in range(5000)]
    picture = chart.draw(by_epoch(values, values))
    assert len(picture.source) <= 3 * 1024
    training, _ = lines_of(by_epoch(values, values))
    assert training[0][0] < 50
    assert training[-1][0] > 200


def test_the_curve_grows_within_the_first_epoch_by_step_and_then_by_epoch():
    def loss(seconds: float) -> words.Curve:
        return next(curve for curve in words.curves(view_at(seconds)) if curve.name == "loss")

    early, later = loss(7.3), loss(8.3)
    assert early.is_by_step
    assert len(later.training) == len(early.training) + 1
    assert early.places == (40, 80, 120)
    assert not loss(17.3).is_by_step
    assert loss(17.3).places == (1, 2, pytest.approx(2.26, abs=0.05))  # the third epoch, as far as it has come
    assert loss(18.3).places[-1] > loss(17.3).places[-1]


def test_a_record_has_whole_epochs_only():
    loss, accuracy = words.curves(finished().view())
    assert loss.places == accuracy.places == (1, 2, 3, 4, 5)
    assert loss.validation_places == (1, 2, 3, 4, 5)


def test_four_metrics_are_drawn_and_the_others_are_lines_in_a_table():
    history = {f"metric{index}": (1.0, 2.0, 3.0) for index in range(6)}
    tree = Tree(render_html(BoardView(history=history)))
    images = [attrs for tag, attrs in tree.tags if tag == "img"]
    assert [image["alt"].partition(" ")[0] for image in images] == ["metric0", "metric1", "metric2", "metric3"]
    assert [text for text in tree.texts if text.startswith("metric")][-2:] == ["metric4", "metric5"]
    assert "▁▃█" in tree.text or "▁▅█" in tree.text
