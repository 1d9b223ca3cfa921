"""The dial: captures of what cuts cost, predictions from them, the search for a shape, and its cache."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

import dslm.shrink.down as down_module
import pico
import shrinking
from dslm.checkpoint.reader import open_folder
from dslm.cli.main import run
from dslm.errors import SizeError, VerificationError
from dslm.plan import plan_growth, plan_shrink
from dslm.report.shapes import SizePoint, size_picture
from dslm.resizing import resize
from dslm.shrink import capture as capture_module
from dslm.shrink import search as search_module
from dslm.shrink.calibrate import Calibration
from dslm.shrink.capture import Capture, capture, captured, damage, masked_losses
from dslm.shrink.fold import Stored
from dslm.shrink.rebuild import Windows, rebuild
from dslm.shrink.reconstruct import Recipe
from dslm.shrink.search import predict, ranked, search
from dslm.shrink.walk import Walk
from dslm.sizes import Sizes, count_parameters
from test_down_cli import add_tokenizer, words

MODELS = [
    ("llama", "gqa-tied"),
    ("gemma2", "windows-softcaps"),
    ("opt", "pre-norm"),
    ("phi3", "gqa-partial-rotary"),
    ("gpt_neox", "parallel"),
    ("qwen3", "gqa-tied"),
]
NAMES = ["-".join(model) for model in MODELS]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "captures"


@pytest.fixture
def llama(tmp_path):
    return Stored(shrinking.make_source(tmp_path / "tiny", "llama", "gqa-tied"))


def sizes_of(weights) -> Sizes:
    return Sizes.from_config(weights.family, weights.config)


def total(weights) -> int:
    return count_parameters(weights.family, weights.config)["total"]


# ---------------------------------------------------------------- captures and predictions


@pytest.mark.parametrize(("family", "variant"), MODELS, ids=NAMES)
def test_cutting_nothing_costs_nothing_and_cutting_more_never_costs_less(family, variant, tmp_path):
    weights = Stored(shrinking.make_source(tmp_path / "tiny", family, variant))
    sizes = sizes_of(weights)
    found = capture(Walk(weights), pico.tokens(rows=3), sizes)
    assert predict(found, sizes) == found.base
    group = sizes.num_attention_heads // sizes.num_key_value_heads
    for series in (
        [sizes.replace(num_hidden_layers=n) for n in range(1, 4)],
        [sizes.replace(intermediate_size=n) for n in range(1, 49)],
        [sizes.replace(hidden_size=n) for n in range(1, 33)],
        [sizes.replace(num_attention_heads=sizes.num_key_value_heads * n) for n in range(1, group + 1)],
        [
            sizes.replace(num_key_value_heads=n, num_attention_heads=n * group)
            for n in range(1, sizes.num_key_value_heads + 1)
        ],
    ):
        for solve in (True, False):
            losses = [predict(found, shape, solve=solve) for shape in series]
            assert all(math.isfinite(loss) for loss in losses)
            assert losses[-1] == found.base
            assert all(smaller >= larger for smaller, larger in pairwise(losses))
            assert len(series) == 1 or losses[0] > losses[-1]


def test_damage_goes_through_its_points_and_on_beyond_them():
    points = ((0.1, 0.01), (0.2, 0.04), (0.5, 0.04))
    assert [damage(points, share) for share, _ in points] == pytest.approx([nats for _, nats in points])
    assert damage(points, 0.15) == pytest.approx(0.0225)  # a power law, here a square
    assert damage(points, 0.05) == pytest.approx(0.0025)
    assert damage(points, 1.0) == pytest.approx(0.08)  # at least linear
    assert damage(points, 0.0) == 0.0
    assert damage(((0.5, 0.4),), 0.25) == pytest.approx(0.1)
    assert damage((), 0.1) == math.inf


def test_a_cut_that_overflows_is_hopeless_and_not_free():
    assert capture_module._rising({0.1: math.nan, 0.05: -1.0}) == ((0.05, 1e-4), (0.1, 100.0))


CUTS = {
    "units": {"intermediate_size": 17},
    "groups": {"num_key_value_heads": 1, "num_attention_heads": 2},
    "heads": {"num_attention_heads": 2},
    "both": {"intermediate_size": 30, "num_attention_heads": 2},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("family", "variant"), [m for m in MODELS if m[0] not in ("opt", "gpt_neox")])
def test_silencing_is_what_slicing_does(family, variant, cut, tmp_path):
    weights = Stored(shrinking.make_source(tmp_path / "tiny", family, variant))
    sizes, ids = sizes_of(weights), pico.tokens(1, rows=3, length=20)
    target = sizes.replace(**CUTS[cut])
    silenced, whole = masked_losses(Walk(weights), ids, [target, sizes])
    windows = Windows(ids, ids, {})
    layers = tuple(range(sizes.num_hidden_layers))
    sliced = rebuild(weights, target, layers, None, windows, tmp_path, recipe=Recipe(solve=False))
    assert sliced.losses["held-out"] == pytest.approx((whole, silenced), abs=1e-5)
    assert abs(silenced - whole) > 1e-4


def test_a_model_without_a_loss_is_refused(tmp_path, monkeypatch, llama):
    monkeypatch.setattr(capture_module, "removal_losses", lambda *_: [math.nan])
    with pytest.raises(VerificationError, match="loss is not finite"):
        captured(llama, shrinking.windows())


# ---------------------------------------------------------------- the search


@pytest.mark.parametrize(("family", "variant"), MODELS, ids=NAMES)
def test_what_is_found_is_legal_near_and_measured_first(family, variant, tmp_path):
    source = shrinking.make_source(tmp_path / "tiny", family, variant)
    weights, wanted = Stored(source), round(0.75 * count_parameters(source.family, source.config)["total"])
    found = search(weights, wanted, shrinking.windows(), build=2, device="cpu")
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
    windows = search_module.read_windows(llama.checkpoint, None, samples=24, length=20)
    best = search(llama, round(0.8 * total(llama)), windows, build=1, device="cpu")[0]
    monkeypatch.setattr(down_module, "calibration", given)
    done = shrinking.down(llama.checkpoint, tmp_path / "out", best.sizes)
    assert done.losses["held-out"][1] == best.measured
    assert done.layers == best.layers


def _calibration():
    windows = shrinking.windows(fit=16, held_out=4, check=0)
    return lambda *_, **__: Calibration(windows.fit, windows.held_out, "a test")


def test_shapes_that_are_built_differ_in_more_than_their_ffn(llama):
    found = search(llama, round(0.6 * total(llama)), shrinking.windows(), build=4, device="cpu")
    built = [s.sizes.replace(intermediate_size=0) for s in found if s.measured is not None]
    assert len(set(built)) == len(built) > 1


def test_nothing_is_built_unless_asked(llama, monkeypatch):
    monkeypatch.setattr(search_module, "rebuild", None)
    wanted = round(0.8 * total(llama))
    found = search(llama, wanted, shrinking.windows(), build=0, device="cpu")
    assert found == ranked(captured(llama, shrinking.windows()), llama, wanted)
    assert all(shape.measured is None for shape in found)


def test_what_is_redundant_is_found_to_cost_nothing(llama, tmp_path):
    source = llama.checkpoint
    plan = plan_growth(source.name, source.family, source.config, source.sizes.replace(intermediate_size=96))
    resize(source, plan, tmp_path / "grown")
    grown, windows = Stored(open_folder(tmp_path / "grown")), shrinking.windows()
    found = search(grown, total(llama), windows, build=6, device="cpu")
    (same,) = (s for s in found if s.measured is not None and _but_ffn(s.sizes) == _but_ffn(sizes_of(llama)))
    assert same.sizes.intermediate_size >= 48
    assert same.measured == pytest.approx(captured(llama, windows, device="cpu").base, abs=1e-4)


def _but_ffn(sizes: Sizes) -> Sizes:
    return sizes.replace(intermediate_size=1)


def test_impossible_targets_are_refused(llama):
    with pytest.raises(SizeError, match="not smaller"):
        search(llama, total(llama), shrinking.windows(), build=0, device="cpu")
    with pytest.raises(SizeError, match="too few"):
        search(llama, 10, shrinking.windows(), build=0, device="cpu")


# ---------------------------------------------------------------- the cache


def test_the_next_target_needs_no_walk(llama, cache, monkeypatch):
    windows = shrinking.windows()
    first = captured(llama, windows, device="cpu")
    assert len(list(cache.iterdir())) == 1

    def walk(*_):
        raise AssertionError("walked again")

    monkeypatch.setattr(capture_module, "Walk", walk)
    assert captured(llama, windows, device="cpu") == first
    assert search(llama, round(0.9 * total(llama)), windows, build=0, device="cpu")
    with pytest.raises(AssertionError, match="walked again"):
        captured(llama, shrinking.windows(seed=1), device="cpu")


def test_other_weights_with_the_same_headers_are_another_model(llama, tmp_path, cache):
    model = pico.make_model("llama", "gqa-tied", seed=1)
    other = Stored(open_folder(pico.save(model, tmp_path / "other"), name="tiny"))
    windows = shrinking.windows()
    assert captured(llama, windows, device="cpu") != captured(other, windows, device="cpu")
    assert len(list(cache.iterdir())) == 2


def _edited(change):
    def edit(text: bytes) -> bytes:
        held = json.loads(text)
        change(held)
        return json.dumps(held).encode()

    return edit


BROKEN = {
    "empty": lambda text: b"",
    "half": lambda text: text[: len(text) // 2],
    "not text": lambda text: b"\xff\x00",
    "a list": lambda text: b"[]",
    "no numbers": _edited(lambda held: held.update(base="x")),
    "not finite": _edited(lambda held: held.update(base=math.nan)),
    "an axis is missing": _edited(lambda held: held["damages"].pop("units")),
    "points are no pairs": _edited(lambda held: held["damages"].update(units=[[1]])),
    "points fall": _edited(lambda held: held["damages"].update(units=[[0.1, 2.0], [0.2, 1.0]])),
    "damages are null": _edited(lambda held: held.update(damages=None)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_cache_is_made_anew(name, llama, cache):
    first = captured(llama, shrinking.windows(), device="cpu")
    (place,) = cache.iterdir()
    sound = place.read_bytes()
    place.write_bytes(BROKEN[name](sound))
    assert captured(llama, shrinking.windows(), device="cpu") == first
    assert place.read_bytes() == sound
    assert list(cache.iterdir()) == [place]


def test_a_cache_that_cannot_be_written_is_done_without(llama, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DSLM_CACHE", str(tmp_path / "file"))
    assert isinstance(captured(llama, shrinking.windows(), device="cpu"), Capture)


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = pico.save(pico.make_model("llama", "gqa-tied"), tmp_path_factory.mktemp("dial") / "tiny")
    add_tokenizer(folder)
    return folder


@pytest.fixture
def call(original, tmp_path, monkeypatch, capsys):
    shutil.copytree(original, tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(words(1200))
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


MEASURED = ("--calibration", "text.txt", "--sequence-length", 32)


def test_plan_shows_predictions_measurements_and_a_picture(call):
    code, out, err = call("plan", "tiny", "--params", "21k", *MEASURED, "--build", 2, "--yaml", "p.yaml")
    assert (code, err) == (0, "")
    assert re.search(r"layers +hidden +FFN +heads +kv heads +parameters +off +predicted +measured", out)
    rows = [line.split() for line in out.splitlines() if re.match(r"\d+ +3 ", line)]
    assert ["-" in row[-1] for row in rows] == [False, False] + [True] * (len(rows) - 2)
    assert re.search(r"^ 100% +26\.3k +#{20,}", out, re.MULTILINE)
    assert re.search(r"^ +50% +1\d\.\dk +#{20,} +[\d.]+ nats, perplexity", out, re.MULTILINE)
    assert "first shape written to p.yaml" in out
    assert call("down", "tiny", "--plan", "p.yaml", "-o", "out", "--device", "cpu")[0] == 0
    assert yaml.safe_load(Path("p.yaml").read_text())["calibration"]["text"] == "text.txt"
    made = open_folder(Path("out")).sizes
    assert [made.num_hidden_layers, made.hidden_size, made.intermediate_size] == [
        int(n) for n in rows[0][1:4]
    ]


def test_plan_has_it_all_in_json(call):
    code, out, _ = call("plan", "tiny", "--params", "21k", *MEASURED, "--build", 1, "--json", "-n", 3)
    found = json.loads(out)
    assert (code, found["schema"], found["target"], found["parameters"]) == (0, 1, 21000, 26336)
    assert len(found["candidates"]) <= 3
    first, *others = found["candidates"]
    assert first["measured"]["perplexity"] == pytest.approx(math.exp(first["measured"]["loss"]))
    assert first["layers"] == list(range(3))
    assert all(other["measured"] is None and other["layers"] is None for other in others)
    assert [p["share"] for p in found["picture"]] == [1, 0.95, 0.9, 0.85, 0.75, 0.6, 0.5]
    assert found["picture"][0]["predicted"] == found["before"]
    losses = [p["predicted"]["loss"] for p in found["picture"]]
    assert losses[0] == min(losses)


def test_down_takes_the_best_of_what_was_built(call, tmp_path):
    asked = ("down", "tiny", "--params", "21k", *MEASURED, "--samples", 16, "--search", 2, "--device", "cpu")
    code, out, err = call(*asked, "-o", "out", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    measured = [s["measured"]["loss"] for s in found["shapes"] if s["measured"]]
    assert len(measured) == 2
    assert found["shapes"][0]["measured"]["loss"] == min(measured)
    assert found["parameters"]["after"] == found["shapes"][0]["parameters"]
    made = open_folder(tmp_path / "out").sizes.as_dict()
    assert made == {word: found["shapes"][0][word] for word in made}
    code, out, _ = call(*asked, "--dry-run")
    assert code == 0
    assert re.search(r"predicted +measured", out)
    assert "nothing written (--dry-run)" in out


REFUSED = [
    (["plan", "--params", "30k", *MEASURED], 1, "--calibration ranks smaller shapes"),
    (["plan", "--params", "21k", "--build", 2], 2, "--build needs --calibration"),
    (["plan", "--params", "21k", "--samples", 8], 2, "--samples needs --calibration"),
    (["plan", "--params", "10", *MEASURED], 1, "too few"),
    (["plan", "--params", "21k", "--calibration", "absent.txt"], 1, "absent.txt"),
    (["plan", "--params", "21k", *MEASURED, "--samples", 1], 1, "samples is 1"),
    (["down", "-upd", "2", "--search", 2], 1, "--search has nothing to choose from"),
    (["down", "--params", "21k", "--keep-ratio", "0.5", "--search", 2], 1, "were given"),
    (["down", "--params", "21k", "--search", -1], 2, "-1"),
    (["down", "--params", "21k", "--search", 1, "-o", "text.txt", *MEASURED], 1, "text.txt"),
]


@pytest.mark.parametrize(("arguments", "code", "named"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_cannot_be_is_refused_before_anything_is_measured(arguments, code, named, call, monkeypatch):
    monkeypatch.setattr(capture_module, "capture", None)
    command, *options = arguments
    found, _, err = call(command, "tiny", *options)
    assert found == code
    assert named in err
    assert "Traceback" not in err


def test_planning_without_a_text_imports_no_torch(original):
    code = (
        "import sys; from dslm.cli.main import run\n"
        f"assert run(['plan', {str(original)!r}, '--params', '21k']) == 0\n"
        "loaded = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_picture_of_losses_beyond_numbers_has_bars():
    lines = size_picture([SizePoint(1, 2_000_000, 2.0), SizePoint(0.5, 1_000_000, 1e6)])
    assert [line.count("#") for line in lines] == [40, 40]
    assert "perplexity inf" in lines[1]


def test_same_capture_every_time(llama, cache):
    found = []
    for _ in range(2):
        torch.manual_seed(len(found))
        found.append(captured(llama, shrinking.windows(), device="cpu"))
        next(cache.iterdir()).unlink()
    assert found[0] == found[1]
