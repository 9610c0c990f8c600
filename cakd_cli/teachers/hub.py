"""A network of the Hugging Face hub that answers."""

from typing import ClassVar, Literal

from pydantic import Field

from cakd_cli.data import ImageDataSet
from cakd_cli.errors import InputError
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models import hub
from cakd_cli.teachers.network import Found, TeacherSpec, of_hub


class HubTeacher(TeacherSpec):
    """An image classifier of the Hugging Face hub, in the layout of timm or of transformers: hf-hub:OWNER/NAME."""

    shorthand: ClassVar[str | None] = "name"

    type: Literal["hf-hub"] = "hf-hub"
    name: str = Field(min_length=1, description="of its repository, as OWNER/NAME")

    @property
    def label(self) -> str:
        return f"hf-hub:{self.name}"

    @property
    def origin(self) -> str:
        return f"published weights of the Hugging Face hub's {self.name}"

    def missing_file(self) -> str | None:
        return None if hub.is_here(self.name) else f"{self.label}, from the Hugging Face hub"

    def find(self, data: ImageDataSet, hardware: Hardware, *, fetch: bool) -> Found:
        folder = hub.snapshot(self.name, fetch=fetch)
        config = hub.read_config(folder)
        if config is None:
            raise InputError(
                f"{self.label} has no config.json of timm or transformers", hint="take another repository of the hub"
            )
        return of_hub(hub.read_folder(folder, config), self.label)
