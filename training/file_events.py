"""Files that the loader could not use as they are: each is named once and counted over all processes."""

from config import Config
from corpus.train_list import TrainList
from errors import plural

UNITS = {"resampled": "Hz", "mixed down": "channels"}  # of the number in events on files that are used all the same
NOTES = ("repaired", "converted", "decoder warnings", "channels cancel")  # kinds of such events without a number
COUNTED = ("unreadable", "nonfinite")  # kinds that count towards max_bad_files_pct; the others concern noise files
ALWAYS_ALLOWED = 3  # bad files that end no run, however short its list


class FileEvents:
    """Takes the loader's events, each (kind, path, number, reason), and says when bad files end the run.

    ``note`` and ``replace_rows`` take the batches of this process. ``share`` tells them to all processes, so that each
    has the same ``known`` files {path: (line in the list, reason)} and finds at the same step that there are
    ``too_many``. Files of ``known`` that a resumed run does not meet again, since they were repaired, do not count.
    """

    def __init__(self, config: Config, listed: TrainList, ranks, files, log):
        self.listed, self.total, self.ranks, self.files, self.log = listed, len(listed), ranks, files, log
        percent = config.max_bad_files_pct
        self.allowed = max(ALWAYS_ALLOWED, int(percent / 100 * self.total)) if percent else 0
        self.known = {}
        self.met = set()  # paths since this process started, of all processes
        self.bad, self.lost_speaker = {}, None  # those of ``met`` that count; a speaker without a readable file
        self.found, self.incidents = [], []  # events and incidents of this process since the last ``share``
        # (kind, number) -> {path: reason} of files used all the same; each (kind, number) is said once a run
        self.converted, self.reported = {}, set()

    def note(self, batch, dump):
        """Take note of a batch's events; ``dump(batch, {path: reason})`` makes an incident of files new to the run."""
        unusable = {}
        for event in batch["events"]:
            kind, path, number, reason = event
            if kind in UNITS or kind in NOTES:
                if (kind, number) not in self.reported:
                    self.converted.setdefault((kind, number), {}).setdefault(path, reason)
            elif self.meet(event) and kind in ("unreadable", "augmentation"):
                unusable[path] = reason
        incident = dump(batch, unusable) if unusable else None
        if incident:
            self.incidents.append(incident)

    def meet(self, event) -> bool:
        """Keep an event for the next ``share``, once for each path; returns whether the path is new to the run."""
        path = event[1]
        if path in self.met:
            return False
        self.met.add(path)
        self.found.append(event)
        return path not in self.known

    def replace_rows(self, batch):
        """Put the spare in the place of each row whose file, or augmentation, is known to bring NaN or Inf.

        A batch with one that is new to the run stays as it is: it is refused and dumped, once for each.
        """
        files, columns = batch["files"], batch["data"].shape[1]
        new = [event for event, _ in batch["spares"].values() if self.meet(event)]
        if new:
            return
        for row, (_, spare) in batch["spares"].items():
            if spare is not None:
                crop, files[row], events = spare
                batch["data"][row // columns, row % columns] = crop
                batch["peak"][row] = files[row]["peak"]
                for event in events:
                    self.meet(event)

    def share(self):
        """Tell all processes what each has found; a collective. New files are said and counted."""
        for found, incidents in self.ranks.gather((self.found, self.incidents)):
            for kind, path, number, reason in found:
                if kind == "speaker":
                    self.lost_speaker = path
                elif kind in COUNTED:
                    self.bad[path] = number, reason
                if path not in self.known:
                    line = f" ({self.listed.place_of(path, number)})" if kind in COUNTED else ""
                    self.log(f"{kind}: {path}{line}: {reason}")
                self.known[path] = number, reason
                self.met.add(path)
            for incident in incidents:
                self.log(f"  {incident.pop('saved')}")
                self.files.event("incident", **incident)
        self.found, self.incidents = [], []

    def too_many(self) -> bool:
        """Whether the processes have met more bad files than ``max_bad_files_pct`` allows, or have lost a speaker."""
        return self.lost_speaker is not None or len(self.bad) > self.allowed

    def verdict(self) -> str:
        """Why the run ends, in one line; the bad files are written to result/bad_files.txt."""
        path = self.files.bad_files([f"{path}\t{line}\t{reason}" for path, (line, reason) in sorted(self.bad.items())])
        if self.lost_speaker is not None:
            lists = ", ".join(source.path for source in self.listed.sources)
            text = f"none of the files tried of speaker '{self.lost_speaker}' can be read: repair them, or take "
            return f"{text}the speaker out of {lists}; {plural(len(self.bad), 'bad file')}: {path}"
        first, (line, reason) = next(iter(self.bad.items()))
        share = 100 * len(self.bad) / self.total
        return (
            f"{plural(len(self.bad), 'file')} ({share:.1f} % of the list) cannot be used (max_bad_files_pct): {first} "
            f"({self.listed.place_of(first, line)}): {reason}; repair them or take them out: all are in {path}"
        )

    def state_dict(self) -> dict:
        """What a resumed run must know, of all processes; a collective."""
        known = dict(self.known)
        for found in self.ranks.gather(self.found):
            known.update((path, (number, reason)) for _, path, number, reason in found)
        return {"known": known, "reported": sorted(self.reported)}

    def load_state_dict(self, state: dict):
        """Take over a saved state."""
        self.known = {path: tuple(value) for path, value in state["known"].items()}
        self.reported = {tuple(key) for key in state["reported"]}

    def report_conversions(self):
        """Say how many files of all processes were resampled, mixed down or repaired: each kind once a run."""
        total = {}
        for found in self.ranks.gather({k: (len(paths), min(paths.items())) for k, paths in self.converted.items()}):
            for key, (count, first) in found.items():
                before, earliest = total.get(key, (0, first))
                total[key] = before + count, min(earliest, first)
        for (kind, number), (count, (first, reason)) in sorted(total.items()):
            what = f" of {number} {UNITS[kind]}" if kind in UNITS else ""
            said = f": {reason}" if reason else ""
            self.log(f"{kind}: {plural(count, 'file')}{what}, the first {first}{said}")
        self.reported |= total.keys()
        self.converted.clear()
