"""The faults, controls and compounds of the bench, in the order of the table."""

import re

import catalog_data
import catalog_heldout
import catalog_loss
import catalog_model
import catalog_quiet
import catalog_training


def order(fault):
    """F before C before K before H, then by number and letter."""
    kind, number, letter = re.fullmatch(r"([FCKH])(\d+)([a-z]?)", fault.id).groups()
    return "FCKH".index(kind), int(number), letter


PARTS = (catalog_data, catalog_model, catalog_loss, catalog_training, catalog_quiet, catalog_heldout)
FAULTS = tuple(sorted((fault for part in PARTS for fault in part.FAULTS), key=order))
