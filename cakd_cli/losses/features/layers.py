"""Pairs of layers in a recipe."""

from pydantic import Field

from cakd_cli.options import Options


class LayerPair(Options):
    """A layer of each network, by the name of its module."""

    student: str = Field(min_length=1, description="module of the student, or stage1, stage2, ...")
    teacher: str = Field(min_length=1, description="module of the teacher, or stage1, stage2, ...")
