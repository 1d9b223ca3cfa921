"""The grammar in which the tables of the families are written."""

from __future__ import annotations

import re

import pytest

from dslm.errors import UnsupportedFamilyError
from dslm.families import load_family
from dslm.families.axes import Role, parse_line
from tables import every_family

LINES = [
    # line, shape for the sizes below, roles, normed
    ("vocab -> hidden", (96, 32), (Role.READ, Role.WRITE), (False, False)),
    ("hidden <- (heads head_dim)", (32, 24), (Role.WRITE, Role.READ), (False, False)),
    ("(heads 3 head_dim) <- hidden", (72, 32), (Role.WRITE, Role.READ), (False, False)),
    ("(heads head_dim)+(kv_heads head_dim)+(kv_heads head_dim) <- hidden", (56, 32), (Role.WRITE, Role.READ),
     (False, False)),
    ("2+positions -> hidden", (66, 32), (Role.READ, Role.WRITE), (False, False)),
    ("gain hidden", (32,), (Role.GAIN,), (False,)),
    ("shift head_dim if x and not y", (4,), (Role.SHIFT,), (False,)),
    ("bias (heads head_dim)", (24,), (Role.BIAS,), (False,)),
    ("normed (heads head_dim) <- hidden", (24, 32), (Role.WRITE, Role.READ), (True, False)),
    ("normed bias (heads head_dim) if attention_bias", (24,), (Role.BIAS,), (True,)),
]  # fmt: skip
SMALL = {"vocab": 96, "hidden": 32, "heads": 6, "kv_heads": 4, "head_dim": 4, "positions": 64}


@pytest.mark.parametrize(("line", "shape", "roles", "normed"), LINES)
def test_a_line_is_parsed(line, shape, roles, normed):
    spec = parse_line(line)
    assert spec.shape(SMALL) == shape
    assert tuple(axis.role for axis in spec.axes) == roles
    assert tuple(axis.normed for axis in spec.axes) == normed
    assert spec.condition == line.partition(" if ")[2]


BAD_LINES = [
    "", "hidden", "gain", "bias ", "normed", "hidden heads", "hidden <-", "<- hidden", "-> ", "hidden -> ",
    "hiden <- vocab", "hidden <- vocabulary", "hidden heads <- vocab", "() <- hidden", "(heads hidden",
    "heads) <- hidden", "hidden <- heads <- vocab", "vocab -> hidden -> heads", "hidden <- vocab -> heads",
    "gain hidden+", "+hidden <- vocab", "hidden++heads <- vocab", "Hidden <- vocab", "hidden <- (heads, head_dim)",
    "hidden*2 <- vocab", "gain hidden <- vocab", "gain bias hidden", "bias hidden heads",
    "((heads head_dim)) <- hidden", "-1 <- hidden", "hidden <= vocab", "gain  if x",
]  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_outside_the_grammar_is_refused_and_repeated(line):
    with pytest.raises(UnsupportedFamilyError, match=re.escape(repr(line))) as caught:
        parse_line(line)
    assert caught.value.hint


@every_family
def test_every_line_of_every_table_reads_back_as_written(name):
    for alternatives in load_family(name).tensors.values():
        for spec in alternatives:
            body = spec.text.partition(" if ")[0].removeprefix("normed ")
            if len(spec.axes) == 1:
                written = f"{spec.axes[0].role.value} {spec.axes[0]}"
            else:
                arrow = "<-" if spec.axes[0].role is Role.WRITE else "->"
                written = f"{spec.axes[0]} {arrow} {spec.axes[1]}"
            assert written == body
            assert spec.dimensions, f"{spec.text} has no dimension"
