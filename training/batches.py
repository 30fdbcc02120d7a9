"""The way of a batch to the device, where what waits of its augmentation is done, and back into a dump."""

import torch


def on_device(batch: dict, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(data, label) of a batch on a device, with all of its augmentation; the device is not waited for.

    What has waited (``augment_on: device``) is done once: the batch then has the result.
    """
    later = device.type != "cpu"  # what comes back from a device is to be there
    data, label = (batch[key].to(device, non_blocking=later) for key in ("data", "label"))
    waiting = batch.pop("waiting", None)
    if waiting is not None:
        with torch.no_grad():
            waiting.apply(data.view(-1, data.shape[-1]))
        batch["data"], batch["waited"] = data, waiting
    return data, label


def as_dumped(batch: dict) -> dict:
    """A batch on the CPU with all of its augmentation, and with the provenance that belongs to that.

    Only here the RMS of the rows is found, for few batches are ever dumped.
    """
    on_device(batch, batch["data"].device)
    data, waited = batch["data"].cpu(), batch.pop("waited", None)
    rows = data.view(-1, data.shape[-1])
    for info, row in zip(batch["files"], rows, strict=True):
        info["rms"] = float(row.double().square().mean().sqrt())
    if waited is not None:
        for row in waited.rows:
            batch["files"][row]["peak"] = float(rows[row].abs().max())
        waited.tell(batch["files"])
    return {**batch, "data": data}
