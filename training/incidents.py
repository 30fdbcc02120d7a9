"""What becomes of a fault of a run: it is reported, dumped and counted."""

from dataclasses import replace
from pathlib import Path

from config import Config
from settings import plugins
from settings.injections import parse_injections
from settings.user_code import imported_user_code, source_hash
from training.distillation import distillation_of
from training.dumps import FaultDumps, StepRecord, concatenate_window
from training.faults import Fault
from training.sharded import is_sharded
from training.slices import put_together, slices_of


class Incidents(FaultDumps):
    """Reports, dumps and counts the faults of a run. ``classes``: of the loss."""

    def __init__(self, config: Config, ranks, files, classes: int):
        super().__init__(Path(config.save_path, "debug_nan"), config.nan_max_dumps, config.nan_max_gb, ranks, classes)
        self.config, self.files = config, files
        self.file_dumps = 0
        self.left_out = 0  # steps, whichever process was at fault
        self.injections = parse_injections(config.nan_inject, ranks.rank)

    def handle(self, record: StepRecord, window, fault: Fault) -> dict:
        """Report and dump on the rank at fault, tell all ranks, and write one event; returns the incident."""
        summary, batch = None, concatenate_window(window)
        self.left_out += 1
        paths = [batch["files"][row]["path"] for row in fault.rows]
        record = self.with_whole_state(record, fault, paths)
        if fault.at_fault:
            summary = {
                "rank": self.ranks.rank,
                "reason": fault.reason,
                "what": fault.what,
                "phase": fault.phase,
                "files": paths,
                "dump": self.dump(record, batch, fault, paths),
            }
        found = [s for s in self.ranks.gather(summary) if s]
        for incident in found:
            self.files.event("incident", epoch=record.epoch, step=record.step, batch=record.batch, **incident)
        return found[0] if found else {"what": "unknown", "reason": "unknown"}

    def with_whole_state(self, record: StepRecord, fault: Fault, paths: list[str]) -> StepRecord:
        """A record with the rows of all processes, on each that dumps; a collective where weights are split."""
        if not slices_of(record.network):
            return record
        with_state, shared, _ = self.needs(record, fault)
        refused = self.is_known(fault, paths) or bool(self.writer.refusal(0))
        needed = (with_state and not shared) or is_sharded(record.network)  # for the statistics of the weights
        wanted = self.ranks.gather(fault.at_fault and needed and not refused)
        for rank in [rank for rank, asks in enumerate(wanted) if asks]:
            whole = put_together(record.own_state(), record.network, record.optimizer, self.ranks, to=rank)
            if rank == self.ranks.rank:
                record = replace(record, whole=whole)
        return record

    def file_faults(self, record: StepRecord, batch, unusable: dict[str, str]) -> dict | None:
        """Dump a batch in which files ({path: reason}) that cannot be used gave way to others; it is trained on.

        Returns the incident, None for files beyond the half of ``nan_max_dumps`` that such dumps may take.
        """
        if self.file_dumps >= (self.config.nan_max_dumps + 1) // 2:
            return None
        self.file_dumps += 1

        def concerned(info):
            return any(d.get("path") in unusable for d in [*info.get("replaced", []), *info["augment"]])

        rows = [row for row, info in enumerate(batch["files"]) if concerned(info)]
        what = "; ".join(f"{path}: {reason}" for path, reason in unusable.items())
        fault = Fault("data_error", what, rows)
        saved = self.save(record, self.content(record, concatenate_window([batch]), fault, {}))
        return {
            "saved": saved,
            "epoch": record.epoch,
            "step": record.step,
            "batch": record.batch,
            "rank": self.ranks.rank,
            "reason": fault.reason,
            "what": what,
            "files": list(unusable),
            "dump": self.last_name,
        }

    def more(self, record: StepRecord, batch: dict) -> dict:
        """The configuration, what there is to tell of a teacher, and no samples if ``nan_dump_audio`` is off."""
        more: dict = {"config": self.config.values()}
        taught = distillation_of(record.network)
        if taught is not None:
            more["teacher"] = taught.record(self.config.nPerSpeaker)
        return more if self.config.nan_dump_audio else {**more, "data": batch["data"][..., :0].clone()}

    def state_dict(self) -> dict:
        """What a resumed run must know."""
        counts = {"written": self.writer.written, "file_dumps": self.file_dumps, "spikes": self.spikes}
        counts["left_out"] = self.left_out
        history = list(self.history) if self.ranks.main else []  # all have the same: of hundreds, one keeps it
        return {"history": history, "seen": self.seen, "sources": self.sources(), **counts}

    def load_state_dict(self, state: dict):
        """Take over a saved state."""
        self.history.extend(state["history"])
        # A fault of code that has changed since is another fault.
        same = state.get("sources") == self.sources()
        self.seen, self.left_out = (state["seen"], state.get("left_out", 0)) if same else ({}, 0)
        self.writer.written = state["written"]
        self.file_dumps, self.spikes = state.get("file_dumps", 0), state.get("spikes", 0)

    def sources(self) -> dict[str, str]:
        """Hashes of the plug-in files in use, and of what they import from the checkout."""
        chosen = {
            Path(folder, f"{getattr(self.config, key)}.py")
            for folder, key in plugins.CHOSEN_BY.items()
            if getattr(self.config, key)
        }
        return source_hashes(chosen | imported_user_code(plugins.ROOT))


def source_hashes(paths) -> dict[str, str]:
    """SHA-256 of plug-in files: 'loss/aamsoftmax.py' -> hash."""
    return {p.as_posix(): source_hash(plugins.ROOT / p) for p in sorted(paths)}
