"""Policies of augmentation: every plug-in on disk, what is drawn and made again, and mistakes in the YAML file."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy
import soundfile
import torch
from programs import ROOT
from surroundings import RATE, SNR_DB, augmenter, voice

from augmentation.waveforms import energy
from corpus.audio import AudioError
from corpus.augmentation import Augment, Augmented, AugmentWAV, apply_draws
from corpus.crop import Crop
from corpus.loader import make_loader
from corpus.sound_pack import UNCACHED
from DatasetLoader import SpeakerBatchSampler, TrainDataset, collate
from errors import UsageError
from postmortem.augmentation_fixes import for_augmentation
from postmortem.provenance import origin_of, rows_with_known_code, same_as_files
from settings import plugins
from settings.checks import check_paths
from settings.reader import load_config, to_yaml
from settings.user_code import source_hash
from training.file_events import FileEvents

NAMES = plugins.available("augmentation")


@pytest.mark.parametrize("name", NAMES)
def test_every_plugin_changes_a_crop_and_its_draws_make_it_again(around, name):
    if name == "amr":
        pytest.importorskip("av")
    found = augmenter(around, [{name: {}}])
    for seed, x in enumerate((voice(), 0 * voice(), 3 * voice(2, 0.3), voice(3, 0.01))):
        kept = x.copy()
        y, draws, _ = found.augment(x, np.random.default_rng(seed))
        assert y.dtype == np.float32 and y.shape == x.shape and np.isfinite(y).all() and np.array_equal(x, kept)
        assert draws and all(type(v) in (str, int, float, bool) for draw in draws for v in draw.values())
        assert np.array_equal(apply_draws(x, draws), y)
        assert np.array_equal(found.augment(x, np.random.default_rng(seed))[0], y)
        assert seed or not np.array_equal(y, x)
    assert found.augment(np.full(900, np.nan, np.float32), np.random.default_rng(0))[0].shape == (900,)


def level_db(x, low, high):
    spectrum = np.abs(np.fft.rfft(x)) ** 2
    frequency = np.fft.rfftfreq(len(x), 1 / RATE)
    return 10 * np.log10(spectrum[(frequency >= low) & (frequency < high)].sum() + 1e-20)


def through(around, name, x, **keys):
    return augmenter(around, [{name: keys}]).augment(x, np.random.default_rng(1))[0]


def test_channels_do_what_they_are_named_for(around):
    x = (0.1 * np.random.default_rng(0).normal(0, 1, RATE)).astype(np.float32)
    phone = through(around, "telephone", x)
    assert (
        level_db(phone, 0, 150) < level_db(x, 0, 150) - 20
        and level_db(phone, 3700, 8000) < level_db(x, 3700, 8000) - 40
    )
    assert abs(level_db(phone, 600, 3000) - level_db(x, 600, 3000)) < 0.3
    for name in ("mu_law", "a_law", "gsm"):
        narrow = through(around, name, x)
        assert level_db(narrow, 4500, 8000) < level_db(x, 4500, 8000) - 20, name
    tone = (0.3 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)
    for name in ("mu_law", "a_law", "gsm", "opus", "mp3"):  # aligned in time, and near the original
        coded = through(around, name, tone)
        assert np.dot(coded, tone) / np.sqrt(energy(coded) * energy(tone)) > 0.97, name
    drawn = augmenter(around, [{"coloured_noise": {"snr": 10, "slope": 2}}]).augment(x, np.random.default_rng(1))[0] - x
    assert 10 * np.log10(energy(x) / energy(drawn)) == pytest.approx(10, abs=0.1)
    assert level_db(drawn, 20, 200) > level_db(drawn, 2000, 8000) + 15
    assert np.abs(through(around, "clipping", x, level=0.25)).max() == pytest.approx(0.25 * np.abs(x).max())
    assert energy(through(around, "gain", x, db=6)) / energy(x) == pytest.approx(10**0.6, rel=1e-3)
    assert (through(around, "packet_loss", x, share=0.5, repeat=False).reshape(-1, 320) == 0).all(1).mean() > 0.2
    impulse = np.r_[1.0, np.zeros(3999)].astype(np.float32)
    assert np.argmax(through(around, "reverb", impulse)) == 0
    assert np.argmax(through(around, "reverb", impulse, align=False)) == 80


def test_coloured_noise_has_any_number_of_samples(around):
    for samples in (
        3375,
        6075,
        4000,
        1,
    ):  # the first two are odd, and lengths that a Fourier transform takes as they are
        x = voice()[:samples]
        assert through(around, "coloured_noise", x, slope=1).shape == (samples,)


def test_a_tempo_changes_the_length_of_pieces_and_not_the_pitch(around):
    time = np.arange(2 * RATE) / RATE
    for factor in (0.8, 1.25):
        tone = (0.3 * np.sin(2 * np.pi * 220 * time)).astype(np.float32)
        played = through(around, "tempo", tone, factor=factor)
        spectrum = np.abs(np.fft.rfft(played * np.hanning(len(played))))
        assert np.argmax(spectrum) * RATE / len(played) == pytest.approx(220, abs=1.5)
        assert np.std(played) == pytest.approx(np.std(tone), rel=0.02)
        slow = (tone * (1 + np.sin(2 * np.pi * 4 * time)) / 2).astype(np.float32)  # four times a second
        played = through(around, "tempo", slow, factor=factor)[: int(len(slow) / max(factor, 1))]
        level = np.square(played[: len(played) // 80 * 80]).reshape(-1, 80).mean(axis=1)
        spectrum = np.abs(np.fft.rfft((level - level.mean()) * np.hanning(len(level)), 1 << 14))
        assert np.argmax(spectrum) * RATE / 80 / (1 << 14) == pytest.approx(4 * factor, rel=0.05)
    found = augmenter(around, [{"tempo": {"factor": 1.1}}])
    draws = found.augment(voice(), np.random.default_rng(0))[1]
    for moves in ("", "1 2", draws[0]["moves"].replace(" ", " 9", 1), "x"):  # of a dump from elsewhere
        with pytest.raises(AudioError, match="cannot be made again"):
            apply_draws(voice(), [{**draws[0], "moves": moves}])


def test_amr_is_near_the_original_in_its_band_and_refused_without_its_encoder(around, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("augmentation.amr.importlib.util.find_spec", lambda name: None)
        with pytest.raises(UsageError, match="augmentation: amr: needs PyAV, which is not installed; pip install av"):
            augmenter(around, ["amr"])
    av = pytest.importorskip("av")
    with monkeypatch.context() as patch:
        patch.setattr(av, "codecs_available", {"aac"})
        with pytest.raises(UsageError, match="has no encoder of AMR"):
            augmenter(around, ["amr"])
    x = voice(seconds=1)
    phone, poor = (through(around, "amr", x, kbps=kbps) for kbps in (12.2, 4.75))
    assert level_db(phone, 4200, 8000) < level_db(x, 4200, 8000) - 20 and not np.array_equal(phone, poor)
    tone = (0.3 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)
    coded = through(around, "amr", tone)[800:]
    assert np.dot(coded, tone[800:]) / np.sqrt(energy(coded) * energy(tone[800:])) > 0.95
    with pytest.raises(UsageError, match=r"kbps: \[5, 5.1\], expected a range with one of 4.75, 5.15"):
        augmenter(around, [{"amr": {"kbps": [5, 5.1]}}])


def test_the_old_keys_have_the_distribution_of_voxceleb_trainer(around, tmp_path):
    """Signal-to-noise ratios, mean spectrum and reverberation time, against a loop in float64 that is written anew."""
    found, rng = AugmentWAV(str(around / "musan"), str(around / "rir"), 0.8, str(tmp_path)), np.random.default_rng(5)
    x, rows = voice(), []
    for seed in range(400):
        rows.append(found.augment(x, np.random.default_rng(seed))[:2])
    plain = sum(not draws for _, draws in rows)
    assert 0.2 * 400 - 30 < plain < 0.2 * 400 + 30
    ratios = {kind: [d["snr_db"] for _, draws in rows for d in draws if d["kind"] == kind] for kind in SNR_DB}
    for kind, (low, high) in SNR_DB.items():
        assert scipy.stats.kstest(ratios[kind], scipy.stats.uniform(low, high - low).cdf).pvalue > 1e-3, kind
        crops = [draws for _, draws in rows if draws and draws[0]["kind"] == kind]
        assert 50 < len(crops) < 115 and {len(draws) for draws in crops} == (
            set(range(3, 8)) if kind == "speech" else {1}
        )
    wide = x.astype(np.float64)
    files = {kind: [soundfile.read(p)[0] for p in (around / "musan" / kind).iterdir()] for kind in SNR_DB}
    rirs = [soundfile.read(p)[0] for p in sorted((around / "rir").iterdir())]
    spectra = {"new": [], "old": []}
    for kind, (low, high) in SNR_DB.items():
        for y, _ in [row for row in rows if row[1] and row[1][0]["kind"] == kind][:40]:
            spectra["new"].append(np.abs(np.fft.rfft(y)) ** 2)
            mixed = wide.copy()
            for _ in range(rng.integers(3, 8) if kind == "speech" else 1):
                noise = files[kind][rng.integers(8)][: len(x)]
                power = np.mean(wide**2) / 10 ** (rng.uniform(low, high) / 10)
                mixed += noise * np.sqrt(power / np.mean(noise**2))
            spectra["old"].append(np.abs(np.fft.rfft(mixed)) ** 2)
    new, old = (10 * np.log10(np.mean(spectra[k], axis=0)[:12000].reshape(30, -1).mean(axis=1)) for k in ("new", "old"))
    assert np.abs(new - old).max() < 1
    impulse = np.r_[1.0, np.zeros(7999)].astype(np.float32)
    for number, rir in enumerate(rirs):
        expected = np.convolve(impulse, rir / np.sqrt(np.sum(rir**2)))[:8000]
        path = str(sorted((around / "rir").iterdir())[number])
        assert np.allclose(apply_draws(impulse, [{"kind": "reverb", "path": path}]), expected, atol=1e-6)


def test_rows_of_a_policy_are_the_same_for_any_number_of_workers(settings, around, tmp_path):
    policy = (
        "[{one_of: {p: 0.8, of: [noise, {babble: {count: [2, 4]}}, reverb]}}, {speed: {p: 0.3}}, {a_law: {p: 0.3}}]"
    )
    keys = {"augmentation": policy, "musan_path": around / "musan", "rir_path": around / "rir", "speed_perturb": True}
    config = load_config([f"--{key}={value}" for key, value in {**settings, **keys}.items()])[0]
    assert config.augment
    dataset = TrainDataset(config)
    sampler, runs = SpeakerBatchSampler(dataset, config, False), []
    for workers in (0, 1, 2):
        sampler.set_position(1)
        runs.append(list(make_loader(dataset, sampler, collate, config, workers)))
    for run in runs[1:]:
        assert all(torch.equal(a["data"], b["data"]) and a["files"] == b["files"] for a, b in zip(runs[0], run))
    kinds = {draw["kind"] for batch in runs[0] for info in batch["files"] for draw in info["augment"]}
    assert {"a_law", "speed"} <= kinds and kinds & {"noise", "speech", "reverb"}
    for row, info in enumerate(runs[0][0]["files"]):
        made = Crop.from_dict(info).load(runs[0][0]["data"].shape[-1])[1]
        assert np.array_equal(made, runs[0][0]["data"][0, row].numpy())


@pytest.mark.parametrize(
    "text, message",
    [
        ("[nois: {p: 0.4}]", ":3: augmentation: no plug-in 'augmentation/nois.py' - did you mean 'noise'?"),
        ("\n  - noise: {snt: [0, 15]}", ":4: augmentation: noise: unknown key 'snt' - did you mean 'snr'?"),
        ("\n  - noise\n  - gain: {db: [3, 1]}", ":5: augmentation: gain: db: expected a range as [-10, 10], the lower"),
        ("\n  - gain: {p: 1.5}", ":4: augmentation: gain: p: expected a share from 0 to 1, got '1.5'"),
        ("\n  - packet_loss: {ms: soon}", ":4: augmentation: packet_loss: ms: expected a value as 20, got 'soon'"),
        ("noise", ": augmentation: expected a list, as [{noise:"),
        ("\n  - one_of: {p: 0.5}", ":4: augmentation: one_of: expected {p: 0.8, of: [noise, reverb]}; no list 'of'"),
        ("\n  - opus: {kbps: 2}", "augmentation: opus: kbps: [2, 2], expected from 6 to 256"),
        (
            "\n  - gain\n  - frequency_drop: {frequency: [7500, 9000]}",
            ":5: augmentation: frequency_drop: frequency: [7500",
        ),
        (
            "\n  - white_noise: {snr: [0, .inf]}",
            ":4: augmentation: white_noise: snr: expected finite numbers, got '[0, inf]'",
        ),
        ("\n  - gain: {db: .nan}", ":4: augmentation: gain: db: expected finite numbers, got 'nan'"),
        ("\n  - telephone: {low: .nan}", ":4: augmentation: telephone: low: expected a finite number, got 'nan'"),
        (
            "\n  - babble: {count: [0.5, 2]}",
            ":4: augmentation: babble: count: [0.5, 2], expected whole numbers of at least 0",
        ),
        (
            "\n  - chunk_drop: {count: [-1, 2]}",
            ":4: augmentation: chunk_drop: count: [-1, 2], expected whole numbers of",
        ),
        ("\n  - packet_loss: {share: 2}", ":4: augmentation: packet_loss: share: [2, 2], expected from 0 to 1"),
        ("\n  - noise", "augmentation: noise needs musan_path with recordings in a folder 'noise'"),
    ],
)
def test_mistakes_in_a_policy_are_named_with_their_line(data, tmp_path, text, message):
    path = tmp_path / "x.yaml"
    lists = f"train_list: {data}/train_list.txt\ntrain_path: {data}/wav\ntest_list: {data}/trials.txt"
    lists += f"\ntest_path: {data}/wav"
    head = f"model: ECAPA_TDNN\ntrainfunc: aamsoftmax\naugmentation: {text}\n{lists}\nsave_path: {tmp_path}/run\n"
    path.write_text(head)
    with pytest.raises(UsageError) as caught:
        config, written, *_ = load_config(["--config", str(path)])
        check_paths(config, written)
    assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_a_policy_that_was_printed_is_read_again(settings, write, tmp_path):
    policy = [{"gain": {"p": 0.5, "db": [-3, 3]}}, "white_noise", {"one_of": {"of": ["gain", {"telephone": {}}]}}]
    first = load_config(["--config", write({**settings, "augmentation": policy})])[0]
    (tmp_path / "printed.yaml").write_text(to_yaml(first.values()))
    config = load_config(["--config", str(tmp_path / "printed.yaml")])[0]
    expected = [policy[0], {"white_noise": {}}, {"one_of": {"of": [{"gain": {}}, {"telephone": {}}]}}]
    assert config.augmentation == expected and config.augment


def test_the_plugin_of_the_documentation_works():
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    space = {}
    exec(page.split("## An augmentation")[1].split("```python\n")[1].split("```")[0], space)
    plugin, x = space["Augmentation"](hertz=60), 0 * voice()
    draw = plugin.draw(x, np.random.default_rng(0), None)
    hum = plugin.apply(x, draw, None)
    assert hum.dtype == np.float32 and np.argmax(np.abs(np.fft.rfft(hum))) * RATE / len(x) == pytest.approx(60, abs=1)
    assert -50 <= 20 * np.log10(np.abs(hum).max()) <= -30


def test_a_row_of_a_dump_is_made_again_only_by_the_code_of_the_run(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, voice(), RATE)
    info = Crop(str(path), augment=[{"kind": "gain", "gain_db": 6.0}]).to_dict()
    code = "augmentation/gain.py"
    known = {code: source_hash(ROOT / code)}

    def refused(dump, trust=False):
        (row,) = rows_with_known_code({"files": [info], **dump}, trust)
        try:
            Crop.from_dict(row).load(8000)
        except AudioError as error:
            return str(error)
        return ""

    assert refused({"source_hashes": known}) == ""
    changed = {"source_hashes": {code: "0" * 64}}
    assert refused(changed) == f"{code} differs from the run's; --trust-changed-code runs it"
    assert refused(changed, trust=True) == ""
    assert "no hash in the dump" in refused({"source_hashes": {}})  # one that names code of its own choice
    info = {**info, "augment": []}
    assert refused({}) == ""
    info = {**info, "augment": [{"kind": "noise", "path": str(path), "start": 0, "gain": 0.1}]}
    assert refused({}) == ""  # of a dump from before the plug-ins


@pytest.mark.parametrize(
    "draw",
    [
        {"kind": "opus", "rate": 12345, "kbps": 8.0},  # what libsndfile refuses
        {"kind": "packet_loss", "seed": 1, "share": 0.5, "samples": 0, "repeat": True},
        {"kind": "gain"},
        {"kind": "gain", "gain_db": "six"},
        {"kind": "telephone", "low": 3000, "high": 300},
        {"kind": 5},
        {"kind": "noise", "path": 5, "start": 0, "gain": 1.0},
    ],
)
def test_a_draw_that_cannot_be_made_again_ends_no_analysis(tmp_path, draw):
    path = tmp_path / "a.wav"
    soundfile.write(path, voice(), RATE)
    info = Crop(str(path), augment=[draw]).to_dict()
    row = np.full(8000, np.nan, np.float32)
    with pytest.raises(AudioError):
        Crop.from_dict(info).load(8000)
    assert origin_of(row, info).cause == "unknown"
    assert same_as_files(torch.from_numpy(row)[None, None], [info], [0]) is None


def test_ranges_that_are_taken_give_finite_crops_at_their_ends(around):
    wide = "[{frequency_drop: {frequency: [0, 8000], width: [0, 8000]}}, {coloured_noise: {snr: -200, slope: 10}}]"
    low = "[{gain: {db: -200}}, {clipping: {level: 0.001}}, {chunk_drop: {count: 0}}, {packet_loss: {share: 1}}]"
    for policy in (wide, low):
        for seed in range(8):
            y = augmenter(around, policy).augment(voice(), np.random.default_rng(seed))[0]
            assert np.isfinite(y).all()


def test_a_count_of_none_adds_no_recording(around):
    found, x = augmenter(around, "[{noise: {count: [0, 1]}}]"), voice()
    added = [len(found.augment(x, np.random.default_rng(seed))[1]) for seed in range(20)]
    assert set(added) == {0, 1}
    assert augmenter(around, "[{babble: {count: 0}}]").augment(x, np.random.default_rng(0))[0] is x


def test_what_would_end_a_loader_process_is_said_before_the_run(around, monkeypatch):
    monkeypatch.setattr(soundfile, "available_subtypes", lambda container: {"VORBIS": ""})
    with pytest.raises(
        UsageError, match=r"augmentation: opus: libsndfile \S+ has no OPUS in OGG; pip install -U sound"
    ):
        augmenter(around, "[opus]")
    monkeypatch.undo()

    def refuse(*_, **__):
        raise soundfile.LibsndfileError(1)

    monkeypatch.setattr(soundfile, "write", refuse)  # one that was built without the encoder
    with pytest.raises(UsageError) as caught:
        augmenter(around, "[noise, {one_of: {of: [{mp3: {p: 0}}]}}]").try_out()
    said = str(caught.value)
    assert (
        "augmentation: mp3: it was tried, and fails: " in said and "LibsndfileError" in said and caught.value.entry == 1
    )


@pytest.mark.parametrize(
    "draw, apply, said",
    [
        ("{'g': 1.0}", "x / np.float32(0)", "own: it gives NaN or Inf for noise of a level of"),
        ("{'g': np.random.rand()}", "x", "own: gives something else each time; draw from rng alone, in draw"),
        ("{'g': 1.0}", "x * np.float32(np.random.rand())", "own: gives something else each time"),
    ],
)
def test_what_a_plug_in_must_not_do_is_said_before_the_run(around, monkeypatch, draw, apply, said):
    class Own:
        def draw(self, x, rng, sounds):
            return eval(draw)

        def apply(self, x, drawn, sounds):
            return eval(apply)

    sounds = augmenter(around, "[gain]").sounds
    monkeypatch.setattr("corpus.augmentation.plugin_of", lambda name: Own)
    with pytest.raises(UsageError, match=f"augmentation: {said}"):
        Augment("own", {}, 16000).try_out(voice(), sounds)


def test_the_numbers_of_numpy_in_a_draw_are_plain(around, monkeypatch):
    class Own:
        def draw(self, x, rng, sounds):
            return {"a": np.float32(0.5), "b": np.int64(3), "c": (1, np.float64(2)), "d": "text"}

        def apply(self, x, draw, sounds):
            return x * np.float32(draw["a"])

    crop = Augmented(voice(), augmenter(around, "[gain]").sounds)
    monkeypatch.setattr("corpus.augmentation.plugin_of", lambda name: Own)
    Augment("own", {}, 16000).augment(crop, np.random.default_rng(0))
    assert [type(value) for value in crop.draws[0].values()] == [str, float, int, tuple, str]
    assert [type(value) for value in crop.draws[0]["c"]] == [int, float]


def test_a_trial_reads_no_recording(around, monkeypatch):
    read = []
    monkeypatch.setattr("corpus.sounds.read_crop", lambda path, *rest, **more: read.append(path))
    augmenter(around, "[noise, music, babble, reverb]", cache=UNCACHED).try_out()
    assert read == []


@pytest.mark.parametrize(
    "file, words, used, note",
    [
        (
            "augment: false",
            ["--augmentation", "[gain]"],
            True,
            "x.yaml:1: augment: false is not used: command line: --",
        ),
        ("augment: false\naugmentation: [gain]", [], False, "x.yaml:2: augmentation is not used: "),
        ("augmentation: [gain]", ["--no-augment"], False, "augmentation is not used: command line: --augment: false"),
        ("augmentation: [gain]\naugment: true", [], True, ""),
        ("augmentation: [gain]", [], True, ""),
    ],
)
def test_augment_and_a_policy_that_contradict_each_other(settings, tmp_path, file, words, used, note):
    path = tmp_path / "x.yaml"
    path.write_text(file)
    rest = [f"--{key}={value}" for key, value in settings.items() if key != "augment"]
    config, _, notes, _ = load_config(["--config", str(path), *words, *rest])
    said = [line for line in notes if "is not used" in line]
    assert config.augment == used and len(said) == bool(note) and all(note in line for line in said)


LOUD = "[white_noise, {gain: {db: 200}}, {gain: {db: 200}}, {gain: {db: 200}}, {gain: {db: 200}}]"  # beyond float32


def first_batch(settings, **keys):
    config = load_config([f"--{key}={value}" for key, value in {**settings, "augmentation": LOUD, **keys}.items()])[0]
    dataset = TrainDataset(config)
    sampler = SpeakerBatchSampler(dataset, config, False)
    sampler.set_position(1)
    return config, dataset, next(iter(make_loader(dataset, sampler, collate, config, 0)))


def test_nan_that_an_augmentation_brings_is_laid_to_it_and_the_clean_crop_takes_its_place(settings):
    config, dataset, batch = first_batch(settings)
    alone = SimpleNamespace(gather=lambda value: [value])
    said = []
    events = FileEvents(config, dataset.list, alone, None, said.append)
    bad = batch["data"].clone()
    assert not bad.isfinite().flatten(2).all(2).any() and len(batch["spares"]) == bad.shape[0] * bad.shape[1]
    events.replace_rows(batch)
    assert torch.equal(batch["data"].nan_to_num(), bad.nan_to_num())  # the first is refused and dumped
    events.share()
    assert said == ["augmentation: augmentation/gain.py: it gives NaN or Inf samples"] and not events.bad
    events.replace_rows(batch)
    assert batch["data"].isfinite().all() and batch["peak"].isfinite().all()
    for row, info in enumerate(batch["files"]):
        made = Crop.from_dict(info).load(bad.shape[-1])[1]
        assert np.array_equal(made, batch["data"].flatten(0, 1)[row].numpy()) and info["augment"][0]["reason"]


def test_nan_of_a_file_is_laid_to_the_file_and_its_spare_is_sound_whatever_the_augmentation(settings, tmp_path):
    rng = np.random.default_rng(0)
    lines = []
    for speaker in "ab":
        for number in range(3):
            x = rng.normal(0, 0.1, RATE).astype(np.float32)
            x[:: 100 if number == 0 else RATE + 1] = np.nan if number == 0 else 0
            soundfile.write(tmp_path / f"{speaker}{number}.wav", x, RATE, subtype="FLOAT")
            lines.append(f"{speaker} {speaker}{number}.wav")
    (tmp_path / "list.txt").write_text("\n".join(lines))
    keys = {"train_list": tmp_path / "list.txt", "train_path": tmp_path, "batch_size": 2, "max_frames": 30}
    dataset = first_batch(settings, **keys)[1]
    for utterance in range(6):
        (_, _, (info,), _) = dataset[1, ((utterance, 0),)]
        event, (x, provenance, events) = info["spare"]
        path = str(tmp_path / dataset.path(utterance))
        from_file = path.endswith("0.wav")
        assert event[:2] == (("nonfinite", path) if from_file else ("augmentation", "augmentation/gain.py"))
        assert np.isfinite(x).all() and np.isfinite(provenance["peak"])
        assert [kind for kind, *_ in events] == (["augmentation"] if from_file else [])


def test_a_plugin_that_changes_its_crop_is_refused(around, monkeypatch):
    monkeypatch.setattr("augmentation.gain.Augmentation.apply", staticmethod(lambda x, draw, sounds: np.negative(x, x)))
    with pytest.raises(UsageError, match="gain: it changes the crop that it is given"):
        augmenter(around, "[gain]").try_out()


def test_the_analysis_names_the_plugin_that_brings_nan_and_not_the_speech_file(tmp_path):
    path, x = tmp_path / "a.wav", voice()
    soundfile.write(path, x, RATE, subtype="FLOAT")
    phone = {"kind": "telephone", "low": 300.0, "high": 3400.0}
    loud = [phone, *({"kind": "gain", "gain_db": 200.0} for _ in range(4))]
    row = np.full(8000, np.nan, np.float32)
    info = Crop(str(path), augment=loud).to_dict()
    found = origin_of(row, info)  # all of them together
    assert (found.cause, found.path) == ("augmentation", "augmentation/gain.py")
    info = Crop(str(path), augment=[phone, {"kind": "gain", "gain_db": 900.0}]).to_dict()
    found = origin_of(row, info)
    assert (found.cause, found.path, found.sample) == ("augmentation", "augmentation/gain.py", None)
    data, label = torch.from_numpy(row)[None, None], torch.zeros(1, dtype=torch.int64)
    case = SimpleNamespace(dump={"data": data}, files=[info], replay=SimpleNamespace(data=data), label=lambda: label)
    case.base, case.small, tried = SimpleNamespace(finite=False), None, []
    case.replay.run = lambda data: tried.append(data) or SimpleNamespace(finite=True)
    finding = SimpleNamespace(rows=[0], files=[{"path": found.path}], columns=[0], source=None)
    (fix,) = for_augmentation(case, finding)
    assert fix["verdict"] == "verified" and fix["action"] == "none" and "augmentation/gain.py" in fix["text"]
    expected = apply_draws(x[:8000], [phone])
    assert np.array_equal(tried[0].flatten().numpy(), expected)  # without the gain, but by telephone
