"""Fused kernels for DSCT: distilling segmenters across CNNs and transformers."""

from .cafd.loss import CAFDLoss, cafd_loss, channel_attention_map
from .cafd.matched import MatchedCAFDLoss, matched_cafd_loss
from .dsct import DSCTLoss, DSCTLosses, dsct_loss
from .jaccard.loss import JaccardLoss, jaccard_loss
from .taps import FeatureTap
from .tnkd.kd import KDLoss, kd_loss
from .tnkd.loss import TNKDLoss, tnkd_loss

__version__ = "0.1.0"
__all__ = [
    "CAFDLoss",
    "DSCTLoss",
    "DSCTLosses",
    "FeatureTap",
    "JaccardLoss",
    "KDLoss",
    "MatchedCAFDLoss",
    "TNKDLoss",
    "cafd_loss",
    "channel_attention_map",
    "dsct_loss",
    "jaccard_loss",
    "kd_loss",
    "matched_cafd_loss",
    "tnkd_loss",
]
