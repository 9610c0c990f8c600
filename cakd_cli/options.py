"""What every part of a recipe shares: unknown keys are errors, and nothing is converted silently."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError


class Options(BaseModel):
    """A frozen mapping of a recipe, with the type, range and meaning of each key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# Of mistakes that cakd finds itself: their message is whole, and nothing is added to it.
MISTAKE = "mistake"


def mistake(message: str) -> PydanticCustomError:
    """What a validator raises; ``message`` is a sentence for the user, without the key."""
    return PydanticCustomError(MISTAKE, "{message}", {"message": message})


def mistakes(found: Sequence[tuple[tuple[str | int, ...], str]], value: Any) -> ValidationError:
    """What a validator raises that looks at several keys together.

    Args:
        found: Path of each key from the validated mapping, and what is wrong with it.
        value: The validated mapping.
    """
    details = [InitErrorDetails(type=mistake(message), loc=keys, input=value) for keys, message in found]
    return ValidationError.from_exception_data(type(value).__name__, details)
