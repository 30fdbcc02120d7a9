"""The faults, controls and compounds of the bench, in the order of the table."""

import re

import catalog_data
import catalog_loss
import catalog_model
import catalog_quiet
import catalog_training


def order(fault):
    """F before C before K, then by number and letter."""
    kind, number, letter = re.fullmatch(r"([FCK])(\d+)([a-z]?)", fault.id).groups()
    return "FCK".index(kind), int(number), letter


PARTS = (catalog_data, catalog_model, catalog_loss, catalog_training, catalog_quiet)
FAULTS = tuple(sorted((fault for part in PARTS for fault in part.FAULTS), key=order))
