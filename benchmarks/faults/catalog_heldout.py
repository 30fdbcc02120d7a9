"""Faults that the analyser was not tuned on (H01 to H72), and more controls (C21 to C29)."""

import catalog_heldout_data
import catalog_heldout_features
import catalog_heldout_half
import catalog_heldout_loss
import catalog_heldout_more
import catalog_heldout_training

PARTS = (
    catalog_heldout_features,
    catalog_heldout_loss,
    catalog_heldout_half,
    catalog_heldout_more,
    catalog_heldout_training,
    catalog_heldout_data,
)
FAULTS = tuple(fault for part in PARTS for fault in part.FAULTS)
