"""The page of a data set: what it holds, what is odd in it, and what is left out, as one HTML file."""

import collections
import math
import os

import numpy as np

from corpus.measuring import judge
from corpus.quality import CLIPPED_SHARE
from errors import hours_text, plural
from preparation.corpora import Utterance
from preparation.findings import KINDS, Sound
from web.charts import Scale, bars, escape
from web.report import document, section, terms

BINS = 40
LISTED = 200  # files of a kind that are named on the page; bad_files.txt has all
EXAMPLES = 5  # files named in a row of a table
PEOPLE = 10  # with the least speech
GENDERS = {"f": "female", "m": "male", "": "not known"}
ODD = {  # kinds of findings that leave a file in
    "clipped": "clipped in 0.1 to 1 % of the samples",
    "offset": "DC offset: the level is not that of the sound",
    "repaired": "read in spite of its header",
    "converted": "read through another program: slower than wav or flac",
    "decoder warnings": "the decoder complains",
}


def render(
    name: str, said: list[str], kept: list[Utterance], sounds: dict[str, Sound], faults, use: list, sample_rate: int
) -> str:
    """Return the page.

    ``said``: a line for each corpus; ``kept``: the utterances in the lists; ``faults``: [(path, kind, detail)];
    ``use``: [(term, text)] on what they are used for; ``sample_rate`` that of a run.
    """
    rows = [sounds[utterance.path] for utterance in kept]
    people = {}
    for utterance, sound in zip(kept, rows):
        people.setdefault(utterance.speaker, []).append(sound.seconds)
    hours = sum(sound.seconds for sound in rows) / 3600
    counts = f"{len(kept):,} recordings of {plural(len(people), 'person')}, {hours_text(hours)}"
    left = f"; {plural(len(faults), 'file')} left out" if faults else "; no file is left out"
    lines = "".join(f'<p class="quiet">{escape(line)}</p>' for line in said)
    lead = f'<section><p class="lead">{counts}{left}</p>{lines}{_facts(kept, rows, use)}</section>'
    formats = _formats(kept, rows, sample_rate)
    body = [lead, _bad(faults), _odd(kept, sounds), _pictures(rows, people), formats, _people(people)]
    return document(f"Data set {name}", "".join(body))


def _facts(kept, rows, use) -> str:
    seconds = np.array([sound.seconds for sound in rows])
    speech = sum(sound.speech for sound in rows)
    low, middle, high = np.percentile(seconds, (0, 50, 100))
    gender = {utterance.speaker: utterance.gender for utterance in kept}
    genders = collections.Counter(GENDERS[g] for g in gender.values())
    sessions = len({(u.speaker, u.session) for u in kept if u.session})
    shown = [
        *((term, escape(text)) for term, text in use),
        ("Length", f"{low:.2f} to {high:.2f} s, half below {middle:.2f} s" if high > low else f"{low:.2f} s each"),
        ("Speech", f"{100 * speech / max(seconds.sum(), 1e-9):.0f} % of the time"),
        ("Clipped", plural(sum(sound.flat > CLIPPED_SHARE for sound in rows), "recording")),
        ("Sessions", f"{sessions:,}" if sessions else "not known"),
        ("People by gender", ", ".join(f"{n} {g}" for g, n in sorted(genders.items())) if len(genders) > 1 else ""),
    ]
    return terms(shown, "facts")


def _table(heads: list[str], rows: list[list[str]], caption: str = "") -> str:
    """A table of HTML cells; a column whose head begins with '#' holds numbers."""
    number = [head.startswith("#") for head in heads]
    top = "".join(f'<th scope="col"{_class(n)}>{escape(h.lstrip("#"))}</th>' for h, n in zip(heads, number))
    body = "".join("<tr>" + "".join(f"<td{_class(n)}>{c}</td>" for c, n in zip(row, number)) + "</tr>" for row in rows)
    words = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{words}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _class(number: bool) -> str:
    return ' class="n"' if number else ""


def _bad(faults: list[tuple[str, str, str]]) -> str:
    """The bad files by kind, each kind folded."""
    by_kind = {}
    for path, kind, detail in faults:
        by_kind.setdefault(kind, []).append((path, detail))
    parts = []
    for kind in sorted(by_kind, key=list(KINDS).index):
        found = by_kind[kind]
        rows = [[f"<code>{escape(path)}</code>", escape(detail)] for path, detail in found[:LISTED]]
        more = f'<p class="quiet">and {len(found) - LISTED} more, in bad_files.txt</p>' if len(found) > LISTED else ""
        head = f'<span class="tag bad">{escape(kind)}</span> {len(found)} <span class="quiet">{KINDS[kind]}</span>'
        table = _table(["file", "what is wrong"], rows)
        parts.append(f"<details><summary>{head}</summary>{table}{more}</details>")
    return section("Left out, by kind", "".join(parts))


def _odd(kept, sounds: dict[str, Sound]) -> str:
    """What is odd in files that are in the lists all the same."""
    found = collections.defaultdict(list)
    for utterance in kept:
        sound = sounds[utterance.path]
        for kind, _ in judge(sound, {"train"}):
            found[kind].append(utterance.listed)
        if sound.seconds > 1 and sound.speech < 0.3 * sound.seconds:
            found["silence"].append(utterance.listed)
    titles = ODD | {"silence": "speech in less than 30 % of the time: --trim, --min_speech"}
    rows = []
    for kind in (kind for kind in titles if found[kind]):
        names = ", ".join(f"<code>{escape(name)}</code>" for name in found[kind][:EXAMPLES])
        rows.append([escape(titles[kind]), str(len(found[kind])), names])
    return section("In the lists, and odd", _table(["what", "#files", "such as"], rows) if rows else "")


def _pictures(rows: list[Sound], people: dict[str, list[float]]) -> str:
    share = [100 * min(s.speech / s.seconds, 1.0) for s in rows if s.seconds]
    peaks = [max(20 * math.log10(max(s.peak, 1e-6)), -60.0) for s in rows]
    charts = [
        ("Length of a recording", [s.seconds for s in rows], "seconds", None),
        ("Recordings of a person", [float(len(of)) for of in people.values()], "recordings", None),
        ("Seconds of a person", [sum(of) for of in people.values()], "seconds", None),
        ("Level", [max(s.level, -90.0) for s in rows], "dB of full scale (RMS)", None),
        ("Largest sample", peaks, "dB of full scale; 0 is the limit of 16 bit", None),
        ("Share of speech, by energy", share, "% of the time", (0.0, 100.0)),
        ("Silence before the speech", [s.begin for s in rows], "seconds", None),
        ("Silence behind the speech", [max(s.seconds - s.end, 0.0) for s in rows], "seconds", None),
    ]
    return section(
        "Distributions: how many recordings or people",
        f'<div class="two">{"".join(_chart(*chart) for chart in charts)}</div>',
    )


def _chart(title: str, values: list[float], words: str, limits) -> str:
    values = np.array(values)
    low, high = limits or (float(values.min()), float(values.max()))
    unit = escape(words.partition(";")[0])
    if high - low < 1e-6:
        return f"<figure><figcaption>{title}</figcaption><p>{low:.4g} {unit}, all of them.</p></figure>"
    log = limits is None and low > 0 and high / low > 50
    axis = Scale(low, high, log)
    edges = np.geomspace(low, high, BINS + 1) if log else np.linspace(low, high, BINS + 1)
    counts = np.histogram(np.clip(values, low, high), edges)[0].tolist()
    picture = bars(title, counts, axis, words)
    return f"<figure><figcaption>{title}</figcaption>{picture}</figure>"


def _formats(kept, rows: list[Sound], sample_rate: int) -> str:
    counts = collections.Counter(
        (s.rate, s.channels, os.path.splitext(u.path)[1].lstrip(".").lower()) for u, s in zip(kept, rows)
    )
    table = []
    for (rate, channels, ending), count in counts.most_common(20):
        done = [f"resampled to {sample_rate:,} Hz"] if rate != sample_rate else []
        done += ["mixed down"] if channels > 1 else []
        table.append([f"{rate:,}", str(channels), escape(ending), f"{count:,}", ", ".join(done) or "as it is"])
    heads = ["#Hz", "#channels", "kind", "#recordings", "what becomes of it"]
    return section("Rates and channels", _table(heads, table))


def _people(people: dict[str, list[float]]) -> str:
    """Those with the least speech, who can teach and be tested least."""
    least = sorted(people, key=lambda name: (sum(people[name]), name))[:PEOPLE]
    rows = [[escape(name), str(len(people[name])), f"{sum(people[name]):.1f}"] for name in least]
    single = sum(len(of) == 1 for of in people.values())
    caption = f"{plural(single, 'person')} with one recording only" if single else ""
    return section("People with the least", _table(["person", "#recordings", "#seconds"], rows, caption))
