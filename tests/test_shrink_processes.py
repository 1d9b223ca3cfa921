"""Several processes, each with some of the windows, find together what one finds with all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pico
import shrinking
from dslm.checkpoint.reader import open_folder
from dslm.shrink.depth import bridged_losses
from dslm.shrink.encoder import survey_stream
from dslm.shrink.rebuild import Rebuilt, Windows, rebuild
from dslm.shrink.recipe import Recipe
from dslm.shrink.survey import removal_losses
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Stored

# family, variant -> sizes: everything that has sums of its own, tied and not, pre-norm and post-norm
CASES = {
    ("llama", "gqa-tied"): {
        "hidden_size": 24,
        "intermediate_size": 30,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    ("phi", "mha"): {"hidden_size": 24, "intermediate_size": 30},
    ("olmo2", "biases"): {"intermediate_size": 30, "num_attention_heads": 2, "num_key_value_heads": 1},
}
ALL_OR_NONE = "olmo2", "biases"
SHARES = {"fit": (9, 15), "held_out": (4, 2)}
WORKER = """
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
import test_shrink_processes as test
from dslm.shrink import streams

streams.BATCH_TOKENS = 100  # the processes have two batches and three

place, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
for family, variant in test.CASES:
    test.save(test.shrunk(place, family, variant, test.share(rank)), place / f"{family}-{rank}.safetensors")
test.save(test.shrunk(place, *test.ALL_OR_NONE, test.all_or_none(rank)), place / f"all-{rank}.safetensors")
test.save(test.one_layer_less(place, test.share_of_many(rank), 300), place / f"less-{rank}.safetensors")
torch.save(test.ranking(place, test.share(rank).fit), place / f"ranking-{rank}.pt")
torch.distributed.destroy_process_group()
"""


def share(rank: int) -> Windows:
    """The windows of one process; together they are `shrinking.windows`."""
    whole = shrinking.windows()
    fit, held_out = whole.fit.split(SHARES["fit"])[rank], whole.held_out.split(SHARES["held_out"])[rank]
    return Windows(fit, held_out, whole.checks)


def all_or_none(rank: int) -> Windows:
    """The same windows, of which the second process has none to fit on."""
    whole = shrinking.windows()
    return Windows(
        whole.fit if rank == 0 else whole.fit[:0], whole.held_out.split((2, 4))[rank], whole.checks
    )


def share_of_many(rank: int) -> Windows:
    """More windows than `share`, for optimiser steps; the second process has none that are held out."""
    whole = shrinking.windows(fit=64)
    return Windows(whole.fit.split((24, 40))[rank], whole.held_out.split((6, 0))[rank], whole.checks)


def one_layer_less(place: Path, windows: Windows, steps: int) -> Rebuilt:
    """A model without its second layer; the blocks beside it take so many steps."""
    source = open_folder(place / "olmo2")
    scratch = place / f"less{steps}-{len(list(place.iterdir()))}-{os.getpid()}"
    scratch.mkdir()
    target = source.sizes.replace(num_hidden_layers=2)
    return rebuild(Stored(source), target, (0, 2), None, windows, scratch, recipe=Recipe(gap_steps=steps))


def shrunk(place: Path, family: str, variant: str, windows: Windows) -> Rebuilt:
    source = open_folder(place / family)
    target = source.sizes.replace(**CASES[family, variant])
    scratch = place / f"scratch{len(list(place.iterdir()))}-{os.getpid()}"
    scratch.mkdir()
    stream, weights = None, Stored(source)
    if target.hidden_size == 24:
        stream = survey_stream(Walk(weights), windows.fit, tied=target.tied).encoder(24)
    layers = (0, 2) if target.num_hidden_layers == 2 else (0, 1, 2)
    return rebuild(weights, target, layers, stream, windows, scratch, recipe=Recipe().closed())


def ranking(place: Path, ids: torch.Tensor) -> torch.Tensor:
    """The losses that decide which layers go, bridged and not."""
    walk = Walk(Stored(open_folder(place / "llama")))
    choices = [frozenset({1}), frozenset({2}), frozenset({1, 2})]
    return torch.tensor([bridged_losses(walk, ids, ids, choices), removal_losses(walk, ids, choices)])


def tensors(found: Rebuilt) -> dict[str, torch.Tensor]:
    whole = {name: found.read(name).contiguous() for name in found.family.layout(found.config)}
    return whole | {"errors": torch.tensor(found.errors, dtype=torch.float64)}


def save(found: Rebuilt, path: Path) -> None:
    save_file(tensors(found), path)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative distance of two tensors of one name."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Sources, and what two processes made of them together."""
    place = tmp_path_factory.mktemp("processes")
    for family, variant in CASES:
        pico.save(pico.make_model(family, variant), place / family)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(place), str(rank)],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return place


def test_two_processes_rank_layers_as_one_does(place):
    together = [torch.load(place / f"ranking-{rank}.pt") for rank in range(2)]
    alone = ranking(place, shrinking.windows().fit)
    for found in together:
        assert torch.allclose(found, alone, rtol=1e-5)
    one_share = ranking(place, share(0).fit)
    assert not torch.allclose(one_share, alone, rtol=1e-4)


@pytest.mark.parametrize(("family", "variant"), CASES, ids=map("-".join, CASES))
def test_two_processes_find_what_one_finds(family, variant, place):
    together = [load_file(place / f"{family}-{rank}.safetensors") for rank in range(2)]
    assert distance(*together) < 1e-6, "both processes end up with the same model"
    alone = tensors(shrunk(place, family, variant, shrinking.windows()))
    assert distance(alone, together[0]) < 1e-4
    for rank in range(2):
        part = tensors(shrunk(place, family, variant, share(rank)))
        assert distance(alone, part) > 1e-2, "a share of the windows is not enough to find it"


def test_one_process_may_have_no_windows_to_fit_on(place):
    together = [load_file(place / f"all-{rank}.safetensors") for rank in range(2)]
    assert distance(*together) < 1e-6
    alone = tensors(shrunk(place, *ALL_OR_NONE, shrinking.windows()))
    assert distance(alone, together[0]) < 1e-4


def test_two_processes_take_the_same_steps(place):
    together = [load_file(place / f"less-{rank}.safetensors") for rank in range(2)]
    assert distance(*together) < 1e-6
    without = one_layer_less(place, shrinking.windows(fit=64), 0)
    alone = one_layer_less(place, shrinking.windows(fit=64), 300)
    assert distance(tensors(alone), together[0]) < 1e-4
    assert distance(tensors(without), together[0]) > 0.01
