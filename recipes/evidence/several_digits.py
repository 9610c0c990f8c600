"""Draw images with several labels from the digits that ship with cakd: tensors:several-digits.safetensors.

    python recipes/evidence/several_digits.py several-digits.safetensors

Each image of 16 x 16 has four places of 8 x 8; each place is empty with probability 0.4, else it holds a digit drawn
with replacement, so an image has zero to four of the ten classes. Test images are made of test digits alone.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import cakd_cli.data.images

EMPTY = 0.4
COUNTS = {"train": 8000, "test": 2000}


def main(path: Path) -> None:
    """Write the file."""
    digits = load_file(Path(cakd_cli.data.images.__file__).parent / "assets" / "digits.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for part, count in COUNTS.items():
        images, labels = digits[f"{part}_images"], digits[f"{part}_labels"].long()
        chosen = torch.randint(len(images), (count, 2, 2), generator=generator)
        there = torch.rand(count, 2, 2, generator=generator) >= EMPTY
        drawn = images[chosen].squeeze(3) * there[..., None, None]
        # (image, row of places, column of places, 8, 8) -> (image, 1, 16, 16)
        tensors[f"{part}_images"] = drawn.permute(0, 1, 3, 2, 4).reshape(count, 1, 16, 16).contiguous()
        several = torch.zeros(count, 10, dtype=torch.uint8)
        several.scatter_reduce_(1, labels[chosen].flatten(1), there.flatten(1).to(torch.uint8), "amax")
        tensors[f"{part}_labels"] = several
    save_file(tensors, path, metadata={"class_names": str([str(i) for i in range(10)]).replace("'", '"')})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
