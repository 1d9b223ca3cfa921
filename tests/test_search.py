"""The search for a shape: what it finds, builds and measures."""

from __future__ import annotations

import pytest

import dslm.shrink.down as down_module
import searching
import shrinking
from dslm.checkpoint.reader import open_folder
from dslm.errors import SizeError
from dslm.plan import plan_growth, plan_shrink
from dslm.resizing import resize
from dslm.shrink import rebuild as rebuild_module
from dslm.shrink import search as search_module
from dslm.shrink.calibrate import Calibration
from dslm.shrink.recipe import Recipe
from dslm.shrink.search import ranked, search
from dslm.shrink.weights import Stored
from dslm.sizes import Sizes, count_parameters
from searching import MODELS, NAMES, captured, sizes_of, total

cache, llama = searching.cache, searching.llama  # fixtures


@pytest.mark.parametrize(("family", "variant"), MODELS, ids=NAMES)
def test_what_is_found_is_legal_near_and_measured_first(family, variant, tmp_path):
    source = shrinking.make_source(tmp_path / "tiny", family, variant)
    weights, wanted = Stored(source), round(0.75 * count_parameters(source.family, source.config)["total"])
    found = search(weights, wanted, shrinking.windows(), build=2, device="cpu").shapes
    measured = [shape.measured for shape in found if shape.measured is not None]
    assert 1 <= len(measured) <= 2
    assert measured == sorted(measured)
    assert [s.measured for s in found[: len(measured)]] == measured
    assert found[0].measured == min(measured) <= max(measured)
    assert len({shape.sizes for shape in found}) == len(found)
    for shape in found:
        plan = plan_shrink(
            source.name, source.family, source.config, shape.sizes
        )  # refuses what is not legal
        after = plan.target.into_config(source.family, source.config)
        assert count_parameters(source.family, after)["total"] == shape.parameters
        assert abs(shape.parameters / wanted - 1) <= 0.02
        assert shape.predicted > 0
        assert len(shape.layers) == (0 if shape.measured is None else shape.sizes.num_hidden_layers)


def test_what_is_measured_is_what_down_gets(llama, tmp_path, monkeypatch):
    given = _calibration()
    monkeypatch.setattr(search_module, "calibration", given)
    windows = search_module.read_windows(llama.checkpoint, ["self"], samples=24, length=20)
    best = search(llama, round(0.8 * total(llama)), windows, build=1, device="cpu").shapes[0]
    monkeypatch.setattr(down_module, "calibration", given)
    done = shrinking.down(llama.checkpoint, tmp_path / "out", best.sizes)
    assert done.losses["held-out"][1] == best.measured
    assert done.layers == best.layers


def _calibration():
    windows = shrinking.windows(fit=16, held_out=4, check=0)
    return lambda *_, **__: Calibration(windows.fit, windows.held_out, "a test")


def test_shapes_that_are_built_differ_in_more_than_their_ffn(llama):
    found = search(llama, round(0.6 * total(llama)), shrinking.windows(), build=4, device="cpu").shapes
    built = [s.sizes.replace(intermediate_size=0) for s in found if s.measured is not None]
    assert len(set(built)) == len(built) > 1


def test_the_loss_is_asked_once_for_all_shapes_and_not_by_one_that_only_loses_layers(
    llama, tmp_path, monkeypatch
):
    asked, answer = [], rebuild_module.importance
    monkeypatch.setattr(rebuild_module, "importance", lambda *given: asked.append(1) or answer(*given))
    builder = search_module._Builder(llama, shrinking.windows(), Recipe().closed(), "cpu", tmp_path, None)
    one_group = {"num_attention_heads": 2, "num_key_value_heads": 1}
    for change, times in (
        ({"num_hidden_layers": 2}, 0),
        ({"intermediate_size": 30}, 1),
        (one_group, 1),
    ):
        builder.built(search_module.Scored(llama.checkpoint.sizes.replace(**change), 0, 0.0))
        assert len(asked) == times
    asked.clear()
    shapes = search(llama, round(0.6 * total(llama)), shrinking.windows(), build=3, device="cpu").shapes
    assert sum(shape.measured is not None for shape in shapes) == 3
    assert len(asked) == 1, "what single cuts cost and what is built share the answer"


def test_nothing_is_built_unless_asked(llama, monkeypatch):
    monkeypatch.setattr(search_module, "approximate", None)
    wanted = round(0.8 * total(llama))
    found = search(llama, wanted, shrinking.windows(), build=0, device="cpu").shapes
    assert found == ranked(captured(llama, shrinking.windows()), llama, wanted)
    assert all(shape.measured is None for shape in found)


def test_what_is_redundant_is_found_to_cost_nothing(llama, tmp_path):
    source = llama.checkpoint
    plan = plan_growth(source.name, source.family, source.config, source.sizes.replace(intermediate_size=96))
    resize(source, plan, tmp_path / "grown")
    grown, windows = Stored(open_folder(tmp_path / "grown")), shrinking.windows()
    found = search(grown, total(llama), windows, build=6, device="cpu").shapes
    (same,) = (s for s in found if s.measured is not None and _but_ffn(s.sizes) == _but_ffn(sizes_of(llama)))
    assert same.sizes.intermediate_size >= 48
    assert same.measured == pytest.approx(captured(llama, windows).base, abs=1e-4)


def _but_ffn(sizes: Sizes) -> Sizes:
    return sizes.replace(intermediate_size=1)


def test_impossible_targets_are_refused(llama):
    with pytest.raises(SizeError, match="not smaller"):
        search(llama, total(llama), shrinking.windows(), build=0, device="cpu")
    with pytest.raises(SizeError, match="too few"):
        search(llama, 10, shrinking.windows(), build=0, device="cpu")
