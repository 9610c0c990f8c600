"""The scripts behind published figures still run."""

import runpy
from pathlib import Path

from safetensors.torch import load_file

EVIDENCE = Path(__file__).parent.parent / "recipes" / "evidence"


def test_images_of_several_digits_are_drawn_and_read(cakd, tmp_path):
    script = runpy.run_path(str(EVIDENCE / "several_digits.py"))
    script["COUNTS"].update(train=40, test=20)
    script["main"](tmp_path / "several.safetensors")

    drawn = load_file(tmp_path / "several.safetensors")
    assert drawn["train_images"].shape == (40, 1, 16, 16)
    # An image with a digit has ink, and one without any has none.
    assert (drawn["train_labels"].any(1) == drawn["train_images"].flatten(1).any(1)).all()
    checked = cakd("data", "check", f"tensors:{tmp_path / 'several.safetensors'}", "--json")
    assert checked.code == 0, checked.err
