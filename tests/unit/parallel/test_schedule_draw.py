"""A schedule drawn: lines of text that fit, a picture, and a trace whose fields a viewer reads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.parallel.pipeline import draw_picture
from abyssal.parallel.pipeline.draw_colours import colour
from abyssal.parallel.pipeline.draw_text import Band, bands
from abyssal.parallel.pipeline.schedule import Schedule, schedule
from abyssal.parallel.pipeline.schedule_figures import activations
from abyssal.parallel.pipeline.simulate import Timeline, Times, simulate
from abyssal.parallel.pipeline.trace import trace, write_trace
from tests.support.pipeline_schedules import schedules

PNG = b"\x89PNG\r\n\x1a\n"


def lines(drawn: list[Band], rank: int) -> list[str]:
    return ["".join(piece.text for piece in band.rows[rank]) for band in drawn]


def test_names_in_full_where_a_line_has_room_for_them() -> None:
    drawn = bands(simulate(schedule("zb1p", 2, 3)), 40)
    assert lines(drawn, 0) == ["F0F1..I0W0F2I1W1I2W2"]
    assert lines(drawn, 1) == ["..F0I0F1I1W0F2I2W1W2"]
    (folded,) = lines(bands(simulate(schedule("dualpipev", 1, 2)), 40), 0)
    assert folded == "F0f0F1b0--f1+B0-b1--I1W1"


def test_letters_where_it_has_none_and_bands_where_those_are_too_many() -> None:
    timeline = simulate(schedule("1f1b", 2, 4))
    assert lines(bands(timeline, 15), 0) == ["FF..B-FB-FB-.B-"]
    drawn = bands(timeline, 8)
    assert lines(drawn, 0) == ["FF..B-FB", "-FB-.B-"]
    assert lines(drawn, 1) == [".FB-FB-F", "B-FB-.."]
    assert [(band.start, band.end) for band in drawn] == [(0, 8), (8, 15)]


@settings(max_examples=30, deadline=None)
@given(schedules(), st.integers(8, 200), st.sampled_from([1.0, 0.01, 3.3]), st.sampled_from([0.0, 0.7]))
def test_whatever_is_drawn_fits(made: Schedule, width: int, weight: float, send: float) -> None:
    timeline = simulate(made, Times(weight=weight, send=send))
    drawn = bands(timeline, width)
    assert 1 <= len(drawn) <= 9
    for band in drawn:
        lengths = {sum(len(piece.text) for piece in row) for row in band.rows}
        assert len(lengths) == 1 and lengths.pop() <= width
    assert drawn[0].start == 0 and drawn[-1].end == timeline.makespan


def test_every_kind_and_direction_has_a_colour_of_its_own_that_black_text_stands_out_on() -> None:
    colours = [colour(kind, chunk) for kind in ("F", "B", "I", "W") for chunk in (0, 1)]
    assert len(set(colours)) == 8
    for one in colours:
        red, green, blue = (int(one[place : place + 2], 16) / 255 for place in (1, 3, 5))
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)]
        luminance = 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
        assert (luminance + 0.05) / 0.05 > 4.5  # WCAG's contrast of text


def test_a_picture_has_a_number_in_every_work_and_both_directions_in_its_legend(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    timeline = simulate(schedule("dualpipe", 2, 4))
    figure = draw_picture._figure(timeline, "below")
    texts = Counter(text.get_text() for text in figure.axes[0].texts)
    assert texts == Counter(str(work.micro_batch) for _, work in timeline.schedule.works())
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "forward: from rank 0 up" in legend and "forward: from rank 1 down" in legend
    assert "overlapped pair" in legend
    assert figure.axes[0].get_title(loc="left") == "dualpipe: 2 ranks, 4 micro-batches\nbelow"
    draw_picture.draw(timeline, tmp_path / "one.png")
    draw_picture.draw(timeline, tmp_path / "one.svg")
    assert (tmp_path / "one.png").read_bytes().startswith(PNG)
    assert ElementTree.parse(tmp_path / "one.svg").getroot().tag.endswith("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "one.svg"]


def test_a_picture_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(draw_picture, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'abyssal\[plot\]'"):
        draw_picture.draw(simulate(schedule("gpipe", 1, 1)), tmp_path / "one.png")


def _traced(timeline: Timeline) -> list[dict]:
    return json.loads(json.dumps(trace(timeline)))["traceEvents"]


def test_a_trace_has_a_track_a_rank_and_every_action_on_it() -> None:
    timeline = simulate(schedule("dualpipe", 4, 8), Times(send=0.25))
    events = _traced(timeline)
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert names == [f"rank {rank}" for rank in range(4)]
    for rank, spans in enumerate(timeline.spans):
        slices = [event for event in events if event["ph"] == "X" and event["tid"] == rank]
        assert [one["ts"] for one in slices] == [span.start * 1000 for span in spans]
        assert [one["dur"] for one in slices] == [(span.end - span.start) * 1000 for span in spans]
    first = next(event for event in events if event["ph"] == "X")
    assert first["name"] == "F 0" and first["cat"] == "forward" and first["pid"] == 0
    assert first["args"] == {"kind": "forward", "stage": 0, "micro_batch": 0, "direction": "from rank 0 up"}
    pair = next(event for event in events if event.get("cat") == "pair")
    assert pair["name"] == "F 3 + B 5"
    assert (pair["args"]["forward"]["micro_batch"], pair["args"]["backward"]["micro_batch"]) == (3, 5)


def test_arrows_of_a_trace_leave_inside_the_maker_and_arrive_at_the_reader() -> None:
    made = schedule("1f1b", 3, 4)
    events = _traced(simulate(made))
    slices = [event for event in events if event["ph"] == "X"]
    sent = {event["id"]: event for event in events if event["ph"] == "s"}
    read = {event["id"]: event for event in events if event["ph"] == "f"}
    assert set(sent) == set(read) and len(sent) == 2 * (made.num_ranks - 1) * made.num_micro_batches
    for name, event in sent.items():
        part, stage, micro_batch = name.split()
        inside = [one for one in slices if one["tid"] == event["tid"] and one["ts"] <= event["ts"]]
        maker = max(inside, key=lambda one: one["ts"])
        assert event["ts"] < maker["ts"] + maker["dur"]
        assert (maker["args"]["stage"], maker["args"]["micro_batch"]) == (int(stage), int(micro_batch))
        assert maker["name"][0] == {"F": "F", "I": "B"}[part]
        assert read[name]["ts"] >= event["ts"]
        assert abs(read[name]["tid"] - event["tid"]) == 1


def test_the_curve_of_a_trace_peaks_at_the_activations_in_flight(tmp_path: Path) -> None:
    made = schedule("dualpipev", 2, 5)
    write_trace(simulate(made), tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for rank, most in enumerate(activations(made)):
        curve = [event["args"]["chunks"] for event in events if event["ph"] == "C" and event["tid"] == rank]
        assert max(curve) == most and curve[-1] == 0
