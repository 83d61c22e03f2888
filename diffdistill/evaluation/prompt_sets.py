"""A file of prompts that a protocol asks for, named with its hash; nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from diffdistill.data.prompts import read_prompts
from diffdistill.errors import UserError
from diffdistill.files import CACHE, sha256

FOLDER_VARIABLE = "DIFFDISTILL_PROMPTS"


def prompts_folder() -> Path:
    """Return where files of prompts are looked for: DIFFDISTILL_PROMPTS, or ~/.cache/diffdistill/prompts."""
    return Path(os.environ.get(FOLDER_VARIABLE) or CACHE / "prompts")


class PromptSet(BaseModel):
    """Prompts in the order of their file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(
        description="a path, or a name in the folder of prompts (DIFFDISTILL_PROMPTS or ~/.cache/diffdistill/prompts)"
    )
    column: str = Field("prompt", description="where the prompts are, in a table")
    sha256: str | None = Field(
        None, description="hex hash of the file; null takes the file that is there and writes its hash down"
    )

    @property
    def path(self) -> Path:
        """Return where the file is, or should be."""
        return path if (path := Path(self.file)).is_file() else prompts_folder() / self.file

    def pinned(self) -> PromptSet:
        """Return the same set with the hash of the file that is there.

        Raises:
            UserError: no file, or one of another hash than the protocol names.
        """
        if not self.path.is_file():
            raise UserError(
                f"the protocol asks for the prompts of {self.file}, which is not there. Put the file at {self.path}."
            )
        found = sha256(self.path)
        if self.sha256 not in (None, found):
            raise UserError(
                f"{self.path} is not the file of prompts that the protocol names: its sha256 is {found}, wanted {self.sha256}. "
                "Put the right file there, or write a protocol of your own with this hash."
            )
        return self.model_copy(update={"sha256": found})

    def read(self, count: int) -> list[str]:
        """Return the first `count` prompts.

        Raises:
            UserError: no such file, one of another hash, or fewer prompts than that.
        """
        self.pinned()
        prompts = read_prompts(self.path, self.column)
        if len(prompts) < count:
            raise UserError(
                f"{self.path} holds {len(prompts)} prompts; the protocol asks for {count}. "
                "Put the whole file there, or lower num_images, which makes another protocol."
            )
        return prompts[:count]
