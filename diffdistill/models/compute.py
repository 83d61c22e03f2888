"""How the networks of a run are computed: settings that change no result beyond rounding."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from diffdistill.models.attention import AttentionName


class ComputeConfig(BaseModel):
    """How the networks are computed; no setting changes what is learnt beyond rounding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: AttentionName = Field(
        "auto",
        description="kernel of attention: auto for the fastest of torch's that the call allows, or one by name, which is refused where it "
        "cannot run (`diffdistill doctor` lists them)",
    )
