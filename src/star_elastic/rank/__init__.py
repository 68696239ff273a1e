"""Importance of every unit and every layer, and the reordering that nests the sizes.

`measure` runs a calibration sample through the parent, in memory or block by block from disk;
`scores_of` and `order` rank its units, `layer_errors` and `layer_order` its layers; `reorder` and
`reorder_checkpoint` put units into their order. Criteria and papers: `criteria`, `depth`.
"""

from star_elastic.rank.blocks import Blocks
from star_elastic.rank.calibration import calibration
from star_elastic.rank.criteria import Order, Raw, Scores, order, random_order, scores_of
from star_elastic.rank.depth import layer_errors, layer_order
from star_elastic.rank.permute import reorder, reorder_checkpoint
from star_elastic.rank.probes import measure, score
from star_elastic.rank.store import SCORES, load_scores, save_scores

__all__ = [
    "SCORES",
    "Blocks",
    "Order",
    "Raw",
    "Scores",
    "calibration",
    "layer_errors",
    "layer_order",
    "load_scores",
    "measure",
    "order",
    "random_order",
    "reorder",
    "reorder_checkpoint",
    "save_scores",
    "score",
    "scores_of",
]
