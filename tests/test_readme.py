"""What the README tells Python users to call is there, and takes what it is given."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import dslm

README = Path(__file__).parent.parent / "README.md"


def test_calls_from_python_fit_what_they_call():
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    called = set()
    for call in ast.walk(ast.parse(block)):
        if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("dslm."):
            name = ast.unparse(call.func).removeprefix("dslm.")
            given = {keyword.arg: None for keyword in call.keywords}
            inspect.signature(getattr(dslm, name)).bind(*call.args, **given)
            called.add(name)
    assert called == {"open_checkpoint", "plan_growth", "resize", "plan_shrink", "shrink_checkpoint"}


def test_no_module_hides_what_the_package_gives():
    """Importing a submodule sets it as an attribute of its package, over a function of the same name."""
    import dslm.shrink.down  # imports nearly all there is

    for name in dslm.__all__:
        assert not inspect.ismodule(getattr(dslm, name)), name
