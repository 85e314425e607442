"""The bases of what crosses a boundary: plain records, and messages with a version."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, field_validator
from pydantic_core import PydanticCustomError

SCHEMA_MISMATCH = "schema_mismatch"
"""Type of the validation error that the codec reports as `SchemaMismatch`."""


class Record(BaseModel):
    """A frozen value inside a message; unknown fields are errors, bytes are base64 in JSON only."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_inf_nan="constants",
        ser_json_bytes="base64",
        val_json_bytes="base64",
    )


class Message(Record):
    """A frozen record that crosses a subsystem or process boundary.

    `schema_version` is `major.minor`. A reader of version M.m accepts every M.x and refuses every other major
    version. Each field added in a minor version has a default, so an older message still reads. A newer minor
    version reads too as long as it uses only known fields: what cannot be understood is refused, never dropped.
    """

    SCHEMA: ClassVar[str] = "1.0"
    schema_version: str = "1.0"

    @field_validator("schema_version")
    @classmethod
    def _readable(cls, version: str) -> str:
        """Refuse text that is no version, and every major version but our own."""
        if version == cls.SCHEMA:
            return version
        major, dot, minor = version.partition(".")
        if not (dot and _is_number(major) and _is_number(minor)):
            raise ValueError(f"schema version {version!r} is not of the form 'major.minor'")
        if major != cls.SCHEMA.partition(".")[0]:
            raise PydanticCustomError(
                SCHEMA_MISMATCH,
                "{kind} has schema version {given}; this release reads {known}: use the same major version",
                {"kind": cls.__name__, "given": version, "known": cls.SCHEMA},
            )
        return version


def _is_number(text: str) -> bool:
    """Whether `text` is a plain decimal number of a sane length, without a leading zero."""
    return text.isascii() and text.isdigit() and len(text) < 7 and (text == "0" or text[0] != "0")
