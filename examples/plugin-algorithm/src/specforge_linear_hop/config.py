"""What SpecForge reads of the package before it trains anything. Imports no tensor library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from specforge.algorithms.catalog import Entry
from specforge.algorithms.draft_config import DraftConfig

ENTRY = Entry(
    options="specforge_linear_hop.config:LinearHopOptions", algorithm="specforge_linear_hop.algorithm:LinearHop"
)


@dataclass(frozen=True, kw_only=True)
class LinearHopDraftConfig(DraftConfig):
    """The architecture of one draft: a single matrix."""

    @property
    def num_parameters(self) -> int:
        return 2 * self.hidden_size * self.hidden_size


class LinearHopOptions(BaseModel):
    """The ``algorithm`` section of a run with ``name: linear-hop``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["linear-hop"] = Field("linear-hop", description="The algorithm these options belong to.")
    num_hops: PositiveInt = Field(3, description="Tokens drafted in training.")
