"""Make a small speaker-verification data set of synthetic voices: flac files, a train list and a trial list.

python make_demo_data.py --out data/demo                          # what `make demo` uses: about 50 MB
python make_demo_data.py --out /tmp/tiny --speakers 8 --trial_speakers 4 --utterances 6 --seconds 1.5
python make_demo_data.py --out data/demo_8k --sample_rate 8000   # the same voices as a telephone system records them

Source-filter voices (Fant 1960). A speaker is a pitch, a vocal-tract length with formant offsets of its own, glottal
tilt, jitter, shimmer and breathiness. An utterance is a random sequence of phones with coarticulation. A session is a
room, a microphone and a noise, so that the voice has to be learnt and not the recording.
"""

import functools
import hashlib
import math
import sys
from pathlib import Path

import numpy as np
import scipy
import soundfile
from tqdm import tqdm

from config import KEYS, SAMPLE_RATE
from corpus.audio import resample
from errors import UsageError, write_any_text
from settings.command_line import Parser, run

HOP, FFT = 128, 512
SESSIONS = 4  # of each speaker; trials of one speaker always cross sessions
LEAST = {"speakers": 1, "trial_speakers": 2, "utterances": 1, "trial_utterances": 2, "seconds": 0.1, "nontargets": 1}

# Formants in Hz of an adult male vocal tract (after Peterson and Barney 1952), and of a few sonorants.
VOWELS = np.array(
    [
        *([270, 2290, 3010], [390, 1990, 2550], [530, 1840, 2480], [660, 1720, 2410], [730, 1090, 2440]),
        *([570, 840, 2410], [440, 1020, 2240], [300, 870, 2240], [640, 1190, 2390], [490, 1350, 1690]),
        *([250, 1100, 2200], [280, 1500, 2500], [350, 1100, 2800]),
    ],
    dtype=float,
)
FRICATIVES = np.array([[2500, 900], [4500, 1500], [6000, 1500], [1500, 2500], [3500, 2500]], dtype=float)


def draw_speaker(rng) -> dict:
    """Draw what makes a voice."""
    high = rng.random() < 0.5
    return {
        "pitch": rng.normal(208, 28) if high else rng.normal(118, 19),
        "pitch_range": rng.uniform(0.05, 0.2),
        "tract": rng.normal(1.16, 0.06) if high else rng.normal(1.0, 0.06),
        "formant_shift": np.clip(rng.normal(1, [0.06, 0.07, 0.08, 0.08, 0.08]), 0.8, 1.2),
        "upper": rng.normal([3500, 4500], [250, 300]),
        "bandwidth": rng.uniform(0.7, 1.5),
        "tilt": rng.uniform(0.5, 0.97),
        "open": rng.uniform(0.45, 0.75),
        "breath": rng.uniform(0.01, 0.2),
        "jitter": rng.uniform(0.002, 0.02),
        "shimmer": rng.uniform(0.01, 0.12),
        "rate": rng.uniform(0.8, 1.25),
        "sibilance": rng.normal(1, 0.18),
        "vowels": rng.normal(1, 0.08, VOWELS.shape),  # the speaker's accent
    }


def phones(speaker, samples: int, rng):
    """Draw a phone sequence -> per-frame formants (frames, 5), voicing, frication gain, fricative centre and width."""
    frames = samples // HOP + 2
    formants, voicing = np.empty((frames, 5)), np.empty(frames)
    noise, centre = np.empty(frames), np.empty((frames, 2))
    at = 0
    while at < frames:
        length = max(4, int(rng.gamma(6, 0.012) / speaker["rate"] * SAMPLE_RATE / HOP))
        part = slice(at, at + length)
        kind = rng.choice(4, p=[0.62, 0.16, 0.14, 0.08])  # vowel, sonorant, fricative, pause or closure
        vowel = rng.integers(10) if kind == 0 else rng.integers(10, len(VOWELS))
        formants[part, :3] = VOWELS[vowel] * speaker["vowels"][vowel]
        formants[part, 3:] = speaker["upper"]
        voicing[part] = (1.0, 0.6, 0.1 * rng.integers(2), 0.0)[kind] * rng.uniform(0.7, 1.3)
        noise[part] = rng.uniform(0.03, 0.12) if kind == 2 else 0.0
        centre[part] = FRICATIVES[rng.integers(len(FRICATIVES))] * speaker["sibilance"]
        at += length
    formants *= speaker["tract"] * speaker["formant_shift"]
    return smooth(formants, 7), smooth(voicing, 5), smooth(noise, 5), smooth(centre, 5)


def smooth(x, width: int):
    """Coarticulation: average over neighbouring frames with a Hann window."""
    window = np.hanning(width + 2)[1:-1]
    padded = np.pad(x, [(width // 2, width // 2)] + [(0, 0)] * (x.ndim - 1), "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=0)
    return windows @ (window / window.sum())


def glottis(speaker, samples: int, rng):
    """Glottal flow derivative with pitch movement, jitter and shimmer; and its open phase (samples,)."""
    time = np.arange(samples) / SAMPLE_RATE
    accents = sum(rng.normal(0, 1) * np.sin(2 * np.pi * (f * time + rng.random())) for f in (0.4, 0.9, 1.7))
    pitch = speaker["pitch"] * rng.normal(1, 0.04) * np.exp(speaker["pitch_range"] * (0.5 * accents - 0.25 * time))
    count = int(pitch.max() * samples / SAMPLE_RATE) + 10
    wobble = np.repeat(rng.normal(0, 1, count), int(SAMPLE_RATE / pitch.mean()) + 1)[:samples]
    wobble = np.pad(wobble, (0, samples - len(wobble)))
    phase = np.cumsum(pitch * (1 + speaker["jitter"] * wobble)) / SAMPLE_RATE + rng.random()
    cycle, within = np.floor(phase).astype(int), phase % 1
    gain = 1 + speaker["shimmer"] * rng.normal(0, 1, cycle.max() + 1)[cycle]
    opened = np.clip(within / speaker["open"], 0, 1)
    flow = np.where(opened < 1, opened**2 * (1 - opened) * 6.75, 0) * gain  # cubic glottal pulse (Klatt and Klatt 1990)
    derivative = np.diff(flow, prepend=flow[0]) * 12
    return scipy.signal.lfilter([1 - speaker["tilt"]], [1, -speaker["tilt"]], derivative) * 3, opened < 1


def tract_response(formants, bandwidth: float):
    """Magnitude (frequencies, frames) of a cascade of resonances at formants (frames, 5).

    Each resonance is 1 at 0 Hz and far above its centre: the formants left out would hold the spectrum up there.
    """
    f = np.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1)[:, None]
    response = np.ones((len(f), len(formants)))
    for k, width in enumerate((70, 90, 140, 220, 300)):
        centre, b = formants[:, k], width * bandwidth
        response *= (centre**2 + f**2) / np.sqrt((centre**2 - f**2) ** 2 + (b * f) ** 2)
    return response


def synthesize(speaker, seconds: float, rng) -> np.ndarray:
    """Speak a random utterance: (samples,) at unit root mean square."""
    samples = int(seconds * SAMPLE_RATE)
    formants, voicing, noise, centre = phones(speaker, samples, rng)
    pulses, opened = glottis(speaker, samples, rng)
    source = pulses + speaker["breath"] * 0.1 * rng.normal(0, 1, samples) * (0.3 + 0.7 * opened)

    def spectrum(x):
        return scipy.signal.stft(x, nperseg=FFT, noverlap=FFT - HOP)[2]

    voiced, hiss = spectrum(source), spectrum(rng.normal(0, 1, samples))
    count = voiced.shape[1]
    index = np.minimum(np.arange(count), len(voicing) - 1)
    f = np.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1)[:, None]
    band = np.exp(-0.5 * ((f - centre[index, 0]) / centre[index, 1]) ** 2)
    mixed = voiced * tract_response(formants[index], speaker["bandwidth"]) * voicing[index] + hiss * band * noise[index]
    x = scipy.signal.istft(mixed, nperseg=FFT, noverlap=FFT - HOP)[1][:samples]
    return x / np.sqrt(np.mean(x**2) + 1e-12)


def draw_session(rng) -> dict:
    """Draw a room, a microphone and a background noise."""
    decay, samples = rng.uniform(0.08, 0.5), int(0.4 * SAMPLE_RATE)
    tail = rng.normal(0, 1, samples) * np.exp(-6.9 * np.arange(samples) / SAMPLE_RATE / decay)
    room = np.concatenate([[1.0], tail * rng.uniform(0.005, 0.05)])
    response = np.interp(np.linspace(0, 1, 129), np.linspace(0, 1, 7), rng.normal(0, 2, 7))
    microphone = np.roll(np.fft.irfft(10 ** (response / 20)), 128) * np.hanning(256)
    colour = rng.uniform(-0.3, 0.95)
    return {
        "impulse": scipy.signal.fftconvolve(room, microphone),
        "colour": colour,
        "snr": rng.uniform(16, 35),
        "hum": rng.random() < 0.3,
    }


def record(x, session, rng) -> np.ndarray:
    """Record a voice in a session: (samples,) float32 below full scale."""
    samples = len(x)
    x = scipy.signal.fftconvolve(x, session["impulse"])[:samples]
    x = x / np.sqrt(np.mean(x**2) + 1e-12)
    noise = scipy.signal.lfilter([1], [1, -session["colour"]], rng.normal(0, 1, samples))
    if session["hum"]:
        noise = noise + noise.std() * sum(
            np.sin(2 * np.pi * 50 * k * np.arange(samples) / SAMPLE_RATE) / k for k in (1, 3, 5)
        )
    noise *= 10 ** (-session["snr"] / 20) / np.sqrt(np.mean(noise**2))
    x = x + noise
    return (x * rng.uniform(0.2, 0.8) / np.abs(x).max()).astype(np.float32)


def make_speaker(name: str, out: Path, utterances: int, seconds: float, seed: list[int], rate: int) -> list[str]:
    """Write a speaker's files at ``rate`` Hz in SESSIONS sessions; returns their paths below ``out``/wav."""
    rng = np.random.default_rng(seed)
    speaker, paths = draw_speaker(rng), []
    sessions = [draw_session(rng) for _ in range(SESSIONS)]
    for number in range(utterances):
        session = number % SESSIONS
        path = f"{name}/session{session}/{number:05d}.flac"
        (out / "wav" / path).parent.mkdir(parents=True, exist_ok=True)
        length = seconds * rng.uniform(0.85, 1.15)
        x = record(synthesize(speaker, length, rng), sessions[session], rng)
        soundfile.write(out / "wav" / path, resample(x, SAMPLE_RATE, sample_rate=rate), rate)
        paths.append(path)
    return paths


def make_trials(speakers: dict[str, list[str]], nontargets: int, rng) -> list[str]:
    """All pairs of one speaker that cross sessions, and ``nontargets`` random pairs of two speakers."""
    lines = []
    for paths in speakers.values():
        for i, a in enumerate(paths):
            lines += [f"1 {a} {b}" for b in paths[i + 1 :] if a.split("/")[1] != b.split("/")[1]]
    names, chosen = sorted(speakers), set()
    possible = len(names) * (len(names) - 1) // 2 * min(map(len, speakers.values())) ** 2
    while len(chosen) < min(nontargets, possible // 2):
        one, two = sorted(rng.choice(len(names), 2, replace=False))
        chosen.add((str(rng.choice(speakers[names[one]])), str(rng.choice(speakers[names[two]]))))
    return lines + [f"0 {a} {b}" for a, b in sorted(chosen)]


def check_numbers(args):
    """UsageError that names the first flag whose number makes no data set, and the number."""
    known = KEYS["sample_rate"]
    if not known.low <= args.sample_rate <= known.high or args.sample_rate % known.multiple:
        text = f"expected a multiple of {known.multiple} from {known.low} to {known.high} Hz"
        raise UsageError(f"--sample_rate: {text}, got {args.sample_rate}")
    for flag, least in {**LEAST, "seed": 0}.items():
        if not least <= getattr(args, flag) < math.inf:
            raise UsageError(f"--{flag}: must be at least {least}, got {getattr(args, flag):g}")


def main(argv) -> int:
    """Write the data set; does nothing if it is complete already."""
    write_any_text()
    parser = Parser("make_demo_data.py", __doc__.splitlines()[0])
    parser.add_argument("--out", default="data/demo", help="folder to write (default data/demo)")
    parser.add_argument("--speakers", type=int, default=200, help="training speakers (default 200)")
    parser.add_argument("--trial_speakers", type=int, default=24, help="other speakers, for the trials (default 24)")
    parser.add_argument("--utterances", type=int, default=4, help="utterances of a training speaker (default 4)")
    parser.add_argument("--trial_utterances", type=int, default=8, help="utterances of a trial speaker (default 8)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help="mean seconds of a training utterance; trials last 1.6 times that (default 2.0)",
    )
    parser.add_argument("--nontargets", type=int, default=3000, help="nontarget trials (default 3000)")
    rates = f"of the files; above {SAMPLE_RATE} they hold nothing above {SAMPLE_RATE // 2000} kHz"
    parser.add_argument("--sample_rate", type=int, default=SAMPLE_RATE, help=f"Hz {rates} (default {SAMPLE_RATE})")
    parser.add_argument("--seed", type=int, default=1, help="seed (default 1)")
    args = parser.parse_args(argv)
    check_numbers(args)
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    out, stamp = Path(args.out), f"{vars(args) | {'out': None, 'version': version}}\n"
    if (out / "made_with.txt").is_file() and (out / "made_with.txt").read_text() == stamp:
        print(f"{out} is already there")
        return 0
    try:
        train, trials = write_set(args, out)
        (out / "made_with.txt").write_text(stamp)  # last: an interrupted run starts again
    except (OSError, soundfile.SoundFileError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"--out: cannot write '{getattr(error, 'filename', None) or out}': {reason}") from error
    print(f"{out}: {train} training utterances, {trials} trials of {args.trial_speakers} other speakers")
    return 0


def write_set(args, out: Path) -> tuple[int, int]:
    """Write voices and lists; returns how many training utterances and trials there are."""
    train, trial = [], {}
    for number in tqdm(range(args.speakers + args.trial_speakers), desc="speaking", unit="speaker", disable=None):
        is_train = number < args.speakers
        name = f"train{number:03d}" if is_train else f"trial{number - args.speakers:03d}"
        count, seconds = (args.utterances, args.seconds) if is_train else (args.trial_utterances, 1.6 * args.seconds)
        paths = make_speaker(name, out, count, seconds, [args.seed, number], args.sample_rate)
        if is_train:
            train += [f"{name} {path}" for path in paths]
        else:
            trial[name] = paths
    trials = make_trials(trial, args.nontargets, np.random.default_rng(args.seed))
    for file, lines in (("train_list.txt", train), ("trials.txt", trials)):
        (out / file).write_text("\n".join(lines) + "\n")
    return len(train), len(trials)


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
