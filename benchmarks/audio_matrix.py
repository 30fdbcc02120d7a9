"""Recordings of forty encodings, whole and spoiled, through scan, training, evaluation, embed.py and verify.py.

python benchmarks/audio_matrix.py --out FOLDER

Each encoding is written in eight cases, and each file goes through the five commands. It passes if no command shows a
traceback, all five agree on which files can be used, and a file that is read has the length and the loudness over time
of what was written, or the reader says that it may not. The last thing printed is the table of docs/data.md. ffmpeg is
needed to make a part of the files.
"""

import argparse
import collections
import contextlib
import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import embed  # noqa: E402 (the folder above must be on the path first)
import make_demo_data  # noqa: E402
import verify  # noqa: E402
from corpus.audio import AudioError, read_crop  # noqa: E402
from corpus.containers import UNCHECKED  # noqa: E402
from corpus.decode import Recording  # noqa: E402
from settings.command_line import run  # noqa: E402

SECONDS = 2
# Written by libsndfile: name: (container, subtype, rate).
LIBSNDFILE = {
    "wav 16 bit": ("WAV", "PCM_16", 16000),
    "wav 24 bit": ("WAV", "PCM_24", 16000),
    "wav 32 bit": ("WAV", "PCM_32", 44100),
    "wav 8 bit": ("WAV", "PCM_U8", 16000),
    "wav float": ("WAV", "FLOAT", 48000),
    "wav double": ("WAV", "DOUBLE", 16000),
    "wav A-law": ("WAV", "ALAW", 8000),
    "wav mu-law": ("WAV", "ULAW", 8000),
    "wav MS ADPCM": ("WAV", "MS_ADPCM", 16000),
    "wav IMA ADPCM": ("WAV", "IMA_ADPCM", 16000),
    "wav GSM 6.10": ("WAV", "GSM610", 8000),
    "wav extensible": ("WAVEX", "PCM_24", 16000),
    "rf64": ("RF64", "PCM_16", 16000),
    "w64": ("W64", "PCM_16", 16000),
    "aiff": ("AIFF", "PCM_16", 16000),
    "aiff float": ("AIFF", "FLOAT", 16000),
    "au": ("AU", "PCM_16", 16000),
    "au mu-law": ("AU", "ULAW", 8000),
    "caf": ("CAF", "PCM_16", 16000),
    "caf ALAC": ("CAF", "ALAC_16", 16000),
    "sph": ("NIST", "PCM_16", 16000),
    "sph mu-law": ("NIST", "ULAW", 8000),
    "flac": ("FLAC", "PCM_16", 16000),
    "flac 24 bit": ("FLAC", "PCM_24", 48000),
    "ogg Vorbis": ("OGG", "VORBIS", 16000),
    "ogg Opus": ("OGG", "OPUS", 48000),
    "voc": ("VOC", "PCM_16", 16000),
}
# Written by ffmpeg: name: (muxer, rate, further words).
FFMPEG = {
    "mp3 CBR": ("mp3", 16000, "-c:a libmp3lame -b:a 48k"),
    "mp3 VBR": ("mp3", 44100, "-c:a libmp3lame -q:a 5"),
    "mp3 without Xing": ("mp3", 44100, "-c:a libmp3lame -q:a 5 -write_xing 0"),
    "mp2": ("mp2", 16000, "-c:a mp2 -b:a 64k"),
    "ogg flac": ("ogg", 16000, "-c:a flac"),
    "m4a AAC": ("mp4", 16000, "-c:a aac"),
    "m4a ALAC": ("mp4", 16000, "-c:a alac"),
    "AAC (adts)": ("adts", 16000, "-c:a aac"),
    "webm Opus": ("webm", 48000, "-c:a libopus"),
    "mka Vorbis": ("matroska", 16000, "-c:a libvorbis"),
    "wma": ("asf", 16000, "-c:a wmav2"),
    "WavPack": ("wv", 16000, "-c:a wavpack"),
    "w64 by ffmpeg": ("w64", 16000, "-c:a pcm_s16le"),
}
# ffmpeg's muxer and codec of those that libsndfile writes, for the case of a pipe.
PIPED = {
    "WAV": "wav",
    "WAVEX": "wav",
    "AIFF": "aiff",
    "AU": "au",
    "CAF": "caf",
    "FLAC": "flac",
    "OGG": "ogg",
    "W64": "w64",
}
CODECS = {
    "PCM_16": "pcm_s16le",
    "PCM_24": "pcm_s24le",
    "FLOAT": "pcm_f32le",
    "DOUBLE": "pcm_f64le",
    "PCM_32": "pcm_s32le",
}
CODECS |= {"ALAW": "pcm_alaw", "ULAW": "pcm_mulaw", "VORBIS": "libvorbis", "OPUS": "libopus", "PCM_U8": "pcm_u8"}

CASES = ("whole", "cut", "header lies", "pipe", "0 bytes", "1 sample", "silent", "opposite phase")
MEANING = {
    "read": "read whole",
    "repaired": "read whole, and told how the header was wrong",
    "told": "read, and told what is wrong with it",
    "shorter": "read as a shorter recording: the container has no length; told",
    "refused": "refused with the reason",
}


# --------------------------------------------------------------------------------------------------- making the files


def by_ffmpeg(path, x, rate: int, muxer: str, words: str, pipe=False) -> bool:
    """Write samples (n,) or (n, 2) through ffmpeg; False where it does not know the encoding."""
    buffer = io.BytesIO()
    soundfile.write(buffer, x, rate, format="WAV", subtype="FLOAT")
    if muxer == "mp4" and pipe:
        words += " -movflags frag_keyframe+empty_moov"
    command = ["ffmpeg", "-loglevel", "quiet", "-y", "-i", "-", *words.split(), "-f", muxer, "-" if pipe else str(path)]
    done = subprocess.run(command, input=buffer.getvalue(), stdout=subprocess.PIPE)
    if done.returncode == 0 and pipe:
        path.write_bytes(done.stdout)
    return done.returncode == 0


def written(path: Path, x, name: str) -> bool:
    """Write samples as an encoding; False where it cannot hold them."""
    if name in FFMPEG:
        muxer, rate, words = FFMPEG[name]
        return by_ffmpeg(path, x, rate, muxer, words)
    container, subtype, rate = LIBSNDFILE[name]
    try:
        soundfile.write(path, x, rate, format=container, subtype=subtype)
    except soundfile.SoundFileError:
        return False
    return True


def piped(path: Path, x, name: str) -> bool:
    """Write samples as a program does that writes to a pipe and cannot go back to the header."""
    if name in FFMPEG:
        muxer, rate, words = FFMPEG[name]
        return by_ffmpeg(path, x, rate, muxer, words, pipe=True)
    container, subtype, rate = LIBSNDFILE[name]
    if container not in PIPED:
        return False
    codec = "flac" if container == "FLAC" else CODECS.get(subtype)
    if codec and container in ("AIFF", "AU", "CAF"):
        codec = codec.replace("s16le", "s16be").replace("f32le", "f32be")
    return bool(codec) and by_ffmpeg(path, x, rate, PIPED[container], f"-c:a {codec}", pipe=True)


def lying(path: Path, x, name: str) -> bool:
    """Give all samples the header of a recording of half the length: it promises less than is there."""
    if not (written(path, x[: len(x) // 2], name)):
        return False
    short = path.read_bytes()
    written(path, x, name)
    whole = path.read_bytes()
    if name in LIBSNDFILE and LIBSNDFILE[name][0] == "FLAC":
        head = 42  # 'fLaC', the head of STREAMINFO and its content
    else:
        head = whole.find(x_bytes(x, name)) if name in LIBSNDFILE else -1
    if head <= 0:
        return False
    path.write_bytes(short[:head] + whole[head:])
    return True


def x_bytes(x, name: str) -> bytes:
    """The first samples as an uncompressed encoding stores them, to find where they begin."""
    container, subtype, rate = LIBSNDFILE[name]
    raw = io.BytesIO()
    endian = "BIG" if container in ("AIFF", "AU", "CAF") else "LITTLE"
    if not soundfile.check_format("RAW", subtype, endian):
        return b"none"
    soundfile.write(raw, x[:2000], rate, format="RAW", subtype=subtype, endian=endian)
    return raw.getvalue()[:500]


def make_files(folder: Path, speech) -> dict[tuple[str, str], Path]:
    """Write every encoding in every case -> {(encoding, case): path}; a case that it cannot have is left out."""
    files = {}
    for number, name in enumerate([*LIBSNDFILE, *FFMPEG]):
        rate = LIBSNDFILE[name][2] if name in LIBSNDFILE else FFMPEG[name][1]
        x = resample_to(speech, rate)
        for case in CASES:
            path = folder / f"{number:02d}" / f"{case.replace(' ', '_')}.{name.split()[0]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if make_case(path, x, name, case) and path.exists():
                files[name, case] = path
            else:
                path.unlink(missing_ok=True)
    return files


def make_case(path: Path, x, name: str, case: str) -> bool:
    """Write one file."""
    if case == "pipe":
        return piped(path, x, name)
    if case == "header lies":
        return lying(path, x, name)
    if case == "0 bytes":
        path.touch()
        return True
    sounds = {"1 sample": x[:1], "silent": np.zeros_like(x), "opposite phase": np.stack([x, -x], axis=1)}
    made = written(path, sounds.get(case, x), name)
    if made and case == "cut":
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    return made


def resample_to(x, rate: int):
    """Bring samples at 16 kHz to another rate."""
    if rate == 16000:
        return x
    import scipy.signal

    return scipy.signal.resample_poly(x, rate, 16000).astype(np.float32)


# ------------------------------------------------------------------------------------------------ through the commands


def called(main, *words) -> tuple[int, str, str]:
    """Run a command in this process -> (status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(main, [str(word) for word in words])
    return status, out.getvalue(), err.getvalue()


def program(log: Path, *words) -> str:
    """Run the trainer as a program -> its output, kept in ``log`` too."""
    command = [sys.executable, str(ROOT / "trainSpeakerNet.py"), *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log.write_text(done.stdout)
    return done.stdout


def configuration(out: Path, files, voices: Path) -> Path:
    """Write the lists and a tiny configuration: a speaker for each encoding, with a good recording each."""
    good = sorted((voices / "wav").rglob("*.flac"))
    train, trials = [], []
    for path in files.values():
        number = path.parent.name
        if f"s{number} {good[int(number)]}" not in train:
            train.append(f"s{number} {good[int(number)]}")
        train.append(f"s{number} {path}")
        trials.append(f"1 {good[int(number)]} {path}")
    trials += [f"0 {good[i]} {good[i + 1]}" for i in range(0, 40, 2)]
    (out / "train.txt").write_text("\n".join(train) + "\n")
    (out / "trials.txt").write_text("\n".join(trials) + "\n")
    config = out / "matrix.yaml"
    config.write_text(
        f"train_list: {out}/train.txt\ntrain_path: /\ntest_list: {out}/trials.txt\ntest_path: /\n"
        f"save_path: {out}/run\nmodel: ECAPA_TDNN\nchannels: 16\naggregate: 32\nn_mels: 24\nnOut: 32\n"
        "trainfunc: aamsoftmax\noptimizer: adam\nscheduler: steplr\nbatch_size: 32\nmax_frames: 100\neval_frames: 0\n"
        "max_epoch: 1\nmax_bad_files_pct: 100\nnan_patience: 1000\ndevice: cpu\nthreads: 1\n"
    )
    return config


def refusals(out: Path, files: dict, voices: Path) -> tuple[dict[str, set], dict[Path, str], list[str]]:
    """Run the five commands -> ({command: paths it refused}, {path: what the scan said of it}, tracebacks).

    embed.py and verify.py want more than something to read: 25 ms, and 0.3 s above silence.
    """
    config, refused, faults = configuration(out, files, voices), {}, []
    paths = {str(path): path for path in files.values()}
    words = ["--config", config]

    def named(text: str, mark: str = "") -> set:
        lines = [line.split("; ")[0] for line in text.splitlines() if mark in line]
        return {path for name, path in paths.items() if any(name in line for line in lines)}

    texts = {"scan": program(out / "scan.log", *words, "--preflight")}
    report = (out / "run/result/preflight.txt").read_text()
    said, kind = {}, ""
    for line in report.splitlines():
        kind = line.split(":")[0].strip() if line.startswith("  ") and not line.startswith("   ") else kind
        for path in named(line):
            said.setdefault(path, kind)
    refused["scan"] = {path for path, kind in said.items() if "cannot be read" in kind}
    texts["train"] = program(out / "train.log", *words)
    refused["train"] = named(texts["train"], "unreadable: ")
    model = out / "run/model/last.model"
    texts["eval"] = program(
        out / "eval.log", *words, "--save_path", out / "eval", "--eval", "--initial_model", model,
        "--max_nan_score_pct", 100,
    )  # fmt: skip
    lost = list((out / "eval/result").glob("nan_trials_epoch_*.txt"))
    refused["eval"] = named(lost[0].read_text()) if lost else set()
    (out / "files.txt").write_text("\n".join(paths) + "\n")
    _, _, texts["embed"] = called(
        embed.main, "--initial_model", model, "--list", out / "files.txt", "--out", out / "all.npz"
    )
    (out / "embed.log").write_text(texts["embed"])
    refused["embed"] = {path for name, path in paths.items() if f"\n{name}: " in f"\n{texts['embed']}"}
    refused["verify"], texts["verify"] = set(), ""
    good = sorted((voices / "wav").rglob("*.flac"))[0]
    for path in files.values():
        status, out_text, err = called(verify.main, good, path, "--initial_model", model, "--threshold", 0)
        texts["verify"] += f"{path}: {status}\n{out_text}{err}"
        if status:
            refused["verify"].add(path)
    (out / "verify.log").write_text(texts["verify"])
    for command, text in texts.items():
        if "Traceback (most recent call last)" in text:
            faults.append(f"{command}: a traceback, see {out}/{command}.log")
    return refused, said, faults


def loudness(x) -> np.ndarray:
    """RMS of windows of 50 ms every 10 ms at 16 kHz."""
    windows = np.lib.stride_tricks.sliding_window_view(x, 800)[::160]
    return np.sqrt(np.square(windows).mean(axis=1))


def likeness(x, y) -> float:
    """Correlation of the loudness over time; some codecs begin up to a tenth of a second late or early."""
    mine, theirs = loudness(x), loudness(y)
    pairs = [(mine[late:], theirs) for late in range(11)] + [(mine, theirs[early:]) for early in range(1, 11)]
    return max(np.corrcoef(a[: len(b)], b[: len(a)])[0, 1] for a, b in pairs)


def misread(path: Path, speech) -> str:
    """How far a file that is read is not what was written, empty where it is."""
    try:
        x = read_crop(path).x
    except AudioError as error:
        return f"read_crop: {error}"
    if abs(len(x) - len(speech)) > 2400:
        return f"{len(x) / 16000:.2f} s of {len(speech) / 16000:.2f} s"
    alike = likeness(x, speech)
    return "" if alike > 0.95 else f"the loudness over time is another (correlation {alike:.2f})"


def outcome(case: str, path: Path, refused: dict, said: dict, speech) -> tuple[str, str]:
    """(what happened to a file, what is wrong with that): a word of ``MEANING``, and a fault or nothing."""
    readers = ("scan", "train", "eval")
    if path in refused["scan"]:
        missing = [command for command, paths in refused.items() if path not in paths]
        return "refused", f"refused by scan, not by {', '.join(missing)}" if missing else ""
    only = [command for command in readers if path in refused[command]]
    if only:
        return "refused", f"refused by {', '.join(only)}, not by scan"
    if case in ("1 sample", "silent"):
        wanted = {"1 sample": ("embed", "verify"), "silent": ("verify",)}[case]
        less = [command for command in wanted if path not in refused[command] and loud_or_long(path, case)]
        return "told", f"taken by {', '.join(less)}" if less else ""
    if case == "opposite phase":  # verify.py refuses it as silent, if all is lost
        return "told", "" if path in said else lossy_phase(path)
    if path in refused["embed"] or path in refused["verify"]:
        return "refused", "refused by embed or verify, not by scan"
    wrong = misread(path, speech)
    notes = [text for kind, text in notes_of(path) if kind == "repaired"]
    if case == "cut":
        return "shorter", "" if any("no length" in text for text in notes) else f"a cut file is taken: {wrong}"
    if wrong:
        return "read", wrong
    return ("told" if UNCHECKED in notes else "repaired" if notes else "read"), ""


def notes_of(path: Path) -> list:
    """What the reader says of a file."""
    with Recording(path) as recording:
        for _ in recording.blocks():
            pass
        return recording.notes


def loud_or_long(path: Path, case: str) -> bool:
    """Whether a file of one sample, or silent, still is that: encoders fill up frames and add noise."""
    x = read_crop(path).x
    return len(x) < 400 if case == "1 sample" else np.abs(x).max() < 1e-5


def lossy_phase(path: Path) -> str:
    """Nothing where a lossy codec has left the mean of the channels audible, else a fault."""
    crop = read_crop(path)
    quiet = np.sqrt(np.square(crop.x).mean()) < 0.1 * np.sqrt(np.square(read_crop(path, channel="1").x).mean())
    return "its channels cancel, and scan is silent" if crop.channels > 1 and quiet else ""


def table(results: dict) -> list[str]:
    """The outcomes as a Markdown table; encodings of the same row stand together."""
    rows = collections.defaultdict(list)
    for name in [*LIBSNDFILE, *FFMPEG]:
        rows[tuple(results.get((name, case), "-") for case in CASES)].append(name)
    lines = ["| encodings | " + " | ".join(CASES) + " |", "| --- |" + " --- |" * len(CASES)]
    return lines + [f"| {', '.join(names)} | {' | '.join(row)} |" for row, names in rows.items()]


def main() -> int:
    """Make the files, run the commands, and compare; exit status 0 if all held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files, the runs and their logs")
    args = parser.parse_args()
    if not shutil.which("ffmpeg"):
        raise SystemExit("audio_matrix.py: ffmpeg is needed to write a part of the files")
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    voices = out / "voices"
    called(make_demo_data.main, "--out", voices, "--speakers", 44, "--trial_speakers", 2)
    speech = read_crop(sorted((voices / "wav").rglob("*.flac"))[0], SECONDS * 16000).x
    files = make_files(out / "files", speech)
    names = len({name for name, _ in files})
    print(f"{len(files)} files of {names} encodings, soundfile {soundfile.__version__}", flush=True)
    refused, said, faults = refusals(out, files, voices)
    results = {}
    for (name, case), path in files.items():
        results[name, case], fault = outcome(case, path, refused, said, speech)
        if fault:
            faults.append(f"{name}, {case} ({path}): {fault}")
    print("\n".join(faults or ["no traceback, and nothing read in silence that is not what was written"]))
    print("\n".join(table(results)))
    print("\n".join(f"{word}: {meaning}" for word, meaning in MEANING.items()))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
