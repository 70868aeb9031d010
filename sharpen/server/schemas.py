"""Request bodies as pydantic models: strict types, and every error in the words of this server.

The models stand beside their routes. They check types; what depends on the model, the limits or
other fields is checked by the route.
"""

from collections.abc import Collection
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from .errors import HTTPError, bad_field

# ids of a request are whatever it holds, until the model's limits have seen them
TextOrIds = str | list[Any]
# lists fail fast: thousands of bad items are one error
Texts = Annotated[list[str], Field(description="a list of texts", fail_fast=True)]

# an error of this type is about the field, and not about one item of it
NAME_ERROR = "not_a_known_name"
WANTED = {"bool_type": "true or false", "string_type": "text"}


class RequestModel(BaseModel):
    """The body of a request; a field that no one would read is an error."""

    model_config = ConfigDict(strict=True, extra="forbid")


Model = TypeVar("Model", bound=RequestModel)


def one_of(known: Collection[str]) -> BeforeValidator:
    """Accepts one of the known names."""

    def check(value: object) -> object:
        if not isinstance(value, str) or value not in known:
            raise PydanticCustomError(NAME_ERROR, "of {names}", {"names": ", ".join(known)})
        return value

    return BeforeValidator(check)


def parse(model: type[Model], body: object) -> Model:
    """The body as `model`; 422 for an unknown field if there is one, else for the first bad one."""
    if not isinstance(body, dict):
        message = f"the body must be an object, got {type(body).__name__}."
        raise HTTPError(422, message, code="bad_body")
    known = model.model_fields
    unknown = [str(key) for key in body if key not in known]
    if unknown and model.model_config.get("extra") == "forbid":
        message = f"unknown field `{unknown[0]}`; known: {', '.join(sorted(known))}."
        raise HTTPError(422, message, param=unknown[0], code="bad_field")
    try:
        return model.model_validate({name: body[name] for name in known if name in body})
    except ValidationError as error:
        raise _http_error(model, error.errors(include_url=False)[0]) from None


def _http_error(model: type[RequestModel], error: ErrorDetails) -> HTTPError:
    kind, place = error["type"], [*error["loc"]]
    name, index = str(place[0]), place[1] if len(place) > 1 else None
    if kind == NAME_ERROR:
        return bad_field(name, error["msg"], error["input"])
    is_item = isinstance(index, int)
    # pydantic appends the member of the union to the place
    if place[-1] == "str":
        wanted = "text or a list of token ids"
    else:
        wanted = WANTED[kind] if is_item else model.model_fields[name].description
    got = None if kind == "missing" else error["input"]
    return bad_field(f"{name}[{index}]" if is_item else name, wanted or WANTED[kind], got)
