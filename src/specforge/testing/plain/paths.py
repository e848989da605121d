"""The plain path of every algorithm by its name."""

from __future__ import annotations

from specforge.testing.plain.base import PlainPath
from specforge.testing.plain.block_drafts import DFLASH, DOMINO, DSPARK
from specforge.testing.plain.medusa import MEDUSA
from specforge.testing.plain.unrolled import EAGLE3, MTP, PEAGLE

PLAIN_PATHS: dict[str, PlainPath] = {
    "eagle3": EAGLE3,
    "peagle": PEAGLE,
    "dflash": DFLASH,
    "domino": DOMINO,
    "dspark": DSPARK,
    "mtp": MTP,
    "medusa": MEDUSA,
}
