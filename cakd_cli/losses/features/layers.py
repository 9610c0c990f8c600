"""Layers in a recipe: pairs by name, or every stage of both networks."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field
from torch import Tensor

from cakd_cli.losses.base import Lesson, Look, Needs, Shapes, Term
from cakd_cli.options import Options


class LayerPair(Options):
    """A layer of each network, by the name of its module."""

    student: str = Field(min_length=1, description="module of the student, or stage1, stage2, ...")
    teacher: str = Field(min_length=1, description="module of the teacher, or stage1, stage2, ...")


class MapsTerm(Term):
    """A term on pairs of maps (batch, channels, height, width).

    Attributes:
        usual: Which stages it compares where the recipe leaves that open.
        form: In which form it wants the maps.
    """

    of_logits = False
    usual: ClassVar[Literal["all", "last"]] = "all"
    form: ClassVar[Literal["map", "preactivation"]] = "map"

    layers: tuple[LayerPair, ...] = Field(
        (),
        strict=False,
        description="pairs of layers that give maps, by module name or stage; none = the stages of both networks",
    )

    def between(self, student: Sequence[str], teacher: Sequence[str]) -> Self:
        """Pair stages from the last one backwards, where the recipe names no layers.

        Raises:
            ValueError: If a network does not tell its stages.
        """
        if self.layers:
            return self
        for whose, stages in (("student", student), ("teacher", teacher)):
            if not stages:
                raise ValueError(f"the {whose} does not name its stages")
        count = 1 if self.usual == "last" else min(len(student), len(teacher))
        pairs = zip(student[-count:], teacher[-count:], strict=True)
        return self.model_copy(update={"layers": tuple(LayerPair(student=a, teacher=b) for a, b in pairs)})

    @property
    def pairs(self) -> list[tuple[Look, Look]]:
        """Where the term looks, in each network; nowhere while that is left to the networks."""
        return [(Look(pair.student, self.form), Look(pair.teacher, self.form)) for pair in self.layers]

    @property
    def needs(self) -> Needs:
        """A map of each layer."""
        return Needs(
            student_layers=tuple(student for student, _ in self.pairs),
            teacher_layers=tuple(teacher for _, teacher in self.pairs),
        )

    def maps(self, lesson: Lesson) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the student's and the teacher's map of each pair."""
        assert self.layers, "between() names them"
        for student, teacher in self.pairs:
            yield lesson.student[student], lesson.teacher[teacher]

    def shapes(self, shapes: Shapes) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """List the shapes of each pair's maps, without the batch."""
        return [(shapes.student[student], shapes.teacher[teacher]) for student, teacher in self.pairs]


class VectorsTerm(Term):
    """A term on the inputs of both classifiers, or on another layer of each as a vector (batch, elements)."""

    of_logits = False

    layer: LayerPair | None = Field(
        None, description="a layer of each network by module name or stage; none = the inputs of both classifiers"
    )

    @property
    def pair(self) -> tuple[Look, Look]:
        """Where the term looks, in each network."""
        if self.layer is None:
            return Look(), Look()
        return Look(self.layer.student), Look(self.layer.teacher)

    @property
    def needs(self) -> Needs:
        """A vector of each network."""
        student, teacher = self.pair
        return Needs(student_layers=(student,), teacher_layers=(teacher,))

    def vectors(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """Give the student's and the teacher's vectors."""
        student, teacher = self.pair
        return lesson.student[student], lesson.teacher[teacher]

    def widths(self, shapes: Shapes) -> tuple[int, int]:
        """Count the elements of the student's and of the teacher's vector."""
        student, teacher = self.pair
        return shapes.student[student][0], shapes.teacher[teacher][0]


class ClassMapsTerm(Term):
    """A term on what each network's own classifier says at every position of its last map."""

    of_whole_weights = True

    layer: LayerPair | None = Field(
        None,
        description="the map of each network that its classifier sees the average of, by module name or stage; none = "
        "the networks tell",
    )

    @property
    def pair(self) -> tuple[Look, Look]:
        """Where the term looks, in each network."""
        student, teacher = ("", "") if self.layer is None else (self.layer.student, self.layer.teacher)
        return Look(student, "class maps"), Look(teacher, "class maps")

    @property
    def needs(self) -> Needs:
        """Class maps of each network."""
        student, teacher = self.pair
        return Needs(student_layers=(student,), teacher_layers=(teacher,))

    def class_maps(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """Give the student's and the teacher's class maps (batch, classes, height, width)."""
        student, teacher = self.pair
        return lesson.student[student], lesson.teacher[teacher]
