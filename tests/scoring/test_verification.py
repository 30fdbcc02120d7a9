"""verify.py, enroll.py and identify.py through the command line, and the local page in headless Chromium."""

import contextlib
import http.client
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import soundfile
from programs import ROOT

import enroll
import identify
import serve
import verify
from scoring.backend import Backend
from scoring.calibration import LogisticCalibration
from scoring.enrollment import enrollment_weights
from scoring.identification import speaker_posterior
from scoring.verification import embed_recording, percent
from settings.command_line import run
from speaker_model import load_model
from storage.files import save_atomically
from storage.speaker_store import SpeakerStore

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def wav(data):
    """Recordings (speaker, number) of the tiny voices."""
    speakers = sorted(p for p in (data / "wav").iterdir() if p.is_dir())
    files = [sorted(p.rglob("*.flac")) for p in speakers]
    return lambda speaker, number: str(files[speaker][number])


@pytest.fixture
def model(settings, tools, tmp_path):
    """A checkpoint of an untrained tiny model that carries its configuration."""

    path = tmp_path / "model_best.model"
    save_atomically(tools.build(settings).state.capture(), path)
    return str(path)


def call(script, capsys, *words):
    status = run(script.main, [str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_verify_scores_decides_and_calibrates(model, wav, capsys, tmp_path):
    network = load_model(model)
    expected = cosine(network.embed_file(wav(0, 0)), network.embed_file(wav(1, 0)))
    words = (verify, capsys, wav(0, 0), wav(1, 0), "--initial_model", model)
    status, out, _ = call(*words)
    assert status == 0 and f"score {expected:.4f} (not calibrated)" in out and "no decision: give --threshold" in out
    found = json.loads(call(*words, "--threshold", expected - 1e-3, "--json")[1])
    assert found["score"] == pytest.approx(expected, abs=1e-6) and found["same"] is True and found["llr"] is None
    assert json.loads(call(*words, "--threshold", expected + 1e-3, "--json")[1])["same"] is False
    (tmp_path / "model_best.threshold").write_text(f"{expected - 0.01:.6f}")  # what training leaves
    assert "same speaker: score" in call(*words)[1]
    calibration = LogisticCalibration([20.0], -10.0)
    Backend(calibration=calibration, prior=0.2, identity=network.identity).save(tmp_path / "model_best.calibration")
    found = json.loads(call(*words, "--json")[1])
    llr = 20 * expected - 10
    assert found["llr"] == pytest.approx(llr, abs=1e-4) and found["threshold"] == pytest.approx(np.log(4))
    assert found["probability"] == pytest.approx(0.2 * np.exp(llr) / (0.2 * np.exp(llr) + 0.8), rel=1e-4)
    assert found["same"] is bool(llr >= np.log(4))
    assert "threshold 1.3863 (Bayes, prior 20 %)" in call(*words)[1]
    assert json.loads(call(*words, "--threshold", 0.5, "--json")[1])["threshold_from"] == "--threshold"
    found = json.loads(call(*words, "--prior", 0.5, "--json")[1])
    assert found["probability"] == pytest.approx(1 / (1 + np.exp(-llr)), rel=1e-4) and found["threshold"] == 0
    Backend(calibration=calibration, identity="ab" * 32).save(tmp_path / "other.npz")
    status, _, error = call(*words, "--backend", tmp_path / "other.npz")
    assert status == 2 and error.count("\n") == 1 and "another model" in error


def test_a_calibration_of_crops_says_that_it_is(model, wav, capsys, tmp_path):
    header = Backend(calibration=LogisticCalibration([20.0], -10.0), identity=load_model(model).identity).header()
    words = (verify, capsys, wav(0, 0), wav(1, 0), "--initial_model", model)
    for frames, said in ((0, 0), (300, 1)):
        text = json.dumps({**header, "eval_frames": frames, "num_eval": 10})
        (tmp_path / "model_best.calibration").write_text(text)
        status, _, error = call(*words)
        assert status == 0 and error.count("learnt on the scores of crops of 3 s (eval_frames)") == said
        Backend.load(tmp_path / "model_best.calibration").save(tmp_path / "again.npz")
        assert len(Backend.load(tmp_path / "again.npz").cautions) == said
    (tmp_path / "model_best.calibration").write_text(json.dumps({**header, "score": "euclidean"}))
    status, _, error = call(*words)
    assert status == 2 and "for score 'euclidean'" in error and "--backend that score.py" in error


def test_a_threshold_that_no_pair_reaches_is_warned_of(model, wav, capsys, tmp_path):
    identity = load_model(model).identity
    Backend(calibration=LogisticCalibration([2.0], -1.0), prior=0.2, identity=identity).save(tmp_path / "weak.npz")
    words = (verify, capsys, wav(0, 0), wav(0, 0), "--initial_model", model, "--backend", tmp_path / "weak.npz")
    status, out, error = call(*words)
    assert status == 0 and "different speakers" in out
    assert "warning: no pair reaches the threshold 1.3863 (Bayes, prior 20 %)" in error and "which have 1.0000" in error
    for way in (("--prior", 0.3), ("--threshold", 0.9)):
        status, out, error = call(*words, *way)
        assert "no pair reaches" not in error and "same speaker" in out
    Backend(calibration=LogisticCalibration([2.0], -1.0), mean=np.zeros(12, np.float32)).save(tmp_path / "mean.npz")
    found = Backend.load(tmp_path / "mean.npz")
    assert found.highest == 1.0 and Backend().highest == 1.0
    assert Backend(calibration=LogisticCalibration([2.0, 1.0], 0.0, 0.5, ("score", "log_duration_min"))).highest is None


def test_a_decision_over_many_is_warned_of_by_what_it_takes_and_not_by_the_threshold_of_a_pair(
    model, wav, capsys, tmp_path
):
    """A recording and itself have 1: at prior 0.5 that names one of one, and nobody of three (log 3 is above it)."""
    Backend(calibration=LogisticCalibration([2.0], -1.0), prior=0.2).save(tmp_path / "weak.npz")
    more = ("--initial_model", model, "--store", tmp_path / "speakers.npz")
    weak = (*more, "--backend", tmp_path / "weak.npz")
    assert call(enroll, capsys, "ann", wav(0, 0), *more)[0] == 0
    status, out, error = call(identify, capsys, wav(0, 0), *weak)
    assert status == 0 and "\nspeaker: ann\n" in out and error == ""
    for number, name in enumerate(("bob", "carl"), 1):
        assert call(enroll, capsys, name, wav(number, 0), *more)[0] == 0
    status, _, error = call(identify, capsys, wav(0, 0), *weak)
    assert status == 0 and error.startswith("warning: nobody of 3 can be named at prior 50 %: that takes")
    assert f"above {math.log(3):.4f}, and a recording and itself have 1.0000" in error and error.count("\n") == 1
    assert call(identify, capsys, wav(0, 0), *weak, "--prior", 0.6)[2] == ""
    assert "no pair reaches the threshold 1.5000" in call(identify, capsys, wav(0, 0), *weak, "--threshold", 1.5)[2]


def test_nobody_is_enrolled_as_nobody(model, wav, capsys, tmp_path, monkeypatch):
    more = ("--initial_model", model, "--store", tmp_path / "speakers.npz")
    for name in ("nobody", "silence"):
        status, _, error = call(enroll, capsys, name, wav(0, 0), *more)
        assert status == 2 and f"name: '{name}' means" in error and error.count("\n") == 1
    monkeypatch.setattr("storage.speaker_store.check_name", lambda name: None)  # a store of before
    assert call(enroll, capsys, "nobody", wav(0, 0), *more)[0] == 0
    Backend(calibration=LogisticCalibration([2.0], -1.0)).save(tmp_path / "weak.npz")
    status, out, error = call(identify, capsys, "--along", wav(0, 0), *more, "--backend", tmp_path / "weak.npz")
    assert status == 2 and out == "" and "speakers.npz: somebody is enrolled as 'nobody'" in error
    assert call(enroll, capsys, "nobody", "--remove", *more[2:])[0] == 0


def test_durations_reach_a_calibration_that_asks_for_them(model, wav, capsys, tmp_path):
    names = ("score", "log_duration_min", "log_duration_max")
    enrolled, test = (soundfile.info(wav(i, 0)).duration for i in (0, 1))
    _, known, _ = Backend().score_trials(np.ones((1, 2)), np.ones((1, 2)), [[0, 0]], None, [enrolled], [test])
    names = [name for name in known if name.startswith("log_duration")]
    Backend(calibration=LogisticCalibration([1.0] * len(names), 0.0, names=names)).save(tmp_path / "durations.npz")
    words = (verify, capsys, wav(0, 0), wav(1, 0), "--initial_model", model, "--backend", tmp_path / "durations.npz")
    found = json.loads(call(*words, "--json")[1])
    assert found["llr"] == pytest.approx(np.log(enrolled) + np.log(test), abs=1e-3)


def test_a_folder_of_people_is_enrolled_with_one_model(model, wav, capsys, tmp_path, monkeypatch):
    people = tmp_path / "my people"
    for name, speaker in (("Anna Müller", 0), ("Борис", 1)):
        (people / name / "mon").mkdir(parents=True)
        for i in range(2):
            shutil.copy(wav(speaker, i), people / name / "mon" / f"{i} ü.flac")
    soundfile.write(people / "Борис" / "silent.wav", np.zeros(16000), 16000)
    bad = ("eve",) if os.name == "nt" else ("eve", "a\nb")
    for name in bad:
        (people / name).mkdir()
        shutil.copy(people / "Борис" / "silent.wav", people / name / "only.wav")
    for name in (".git", "dan", "ed"):
        (people / name).mkdir()
    more = ("--initial_model", model, "--store", tmp_path / "s.npz")
    status, out, error = call(enroll, capsys, "--dir", people, *more)
    assert "--dir: left out: 2 folders without a recording: 'dan', 'ed'\n" in error
    assert status == 1 and f"4 recordings of 2 people enrolled, {1 + len(bad)} recordings left out, 2 in all" in out
    assert "without a usable recording: eve" in error
    assert f"{people / 'Борис' / 'silent.wav'}: " in error and "left out: name: 'a\\nb' is empty" in error
    (people / "Борис" / "silent.wav").unlink()
    for name in bad:
        shutil.rmtree(people / name)
    (people / "cy").mkdir()
    shutil.copy(wav(2, 0), people / "cy")
    assert "1 recording of 1 person enrolled, 3 in all" in call(enroll, capsys, "--dir", people, *more)[1]
    listed = call(enroll, capsys, "--list", *more[2:])[1].splitlines()
    assert listed == ["Anna Müller  2 recordings", f"{'Борис'}  2 recordings", "cy  1 recording"]
    assert "5 recordings of 3 people enrolled" in call(enroll, capsys, "--dir", people, "--replace", *more)[1]
    (people / "cy" / "more.flac").write_bytes(Path(wav(2, 1)).read_bytes())

    def meanwhile(model, path):  # another command enrolls the same recording
        utterance = embed_recording(model, path)
        store = SpeakerStore.open(tmp_path / "s.npz", model.identity, model.dimension)
        store.add("cy", [utterance])
        store.save()
        return utterance

    monkeypatch.setattr(enroll, "embed_recording", meanwhile)
    status, out, _ = call(enroll, capsys, "--dir", people, *more)
    assert status == 0 and "0 recordings of 0 people enrolled, 3 in all" in out
    wrong = {("ann", "--dir", people): "--dir takes no name", ("--dir", tmp_path / "x"): "no such folder"}
    for words, said in wrong.items():
        status, _, error = call(enroll, capsys, *words, *more)
        assert status == 2 and said in error


def test_enroll_identify_and_verify_a_claim(model, wav, capsys, tmp_path):
    more = ("--initial_model", model, "--store", tmp_path / "speakers.npz")
    assert "with 2 recordings, 1 speaker" in call(enroll, capsys, "ann", wav(0, 0), wav(0, 1), *more)[1]
    assert "2 speakers in all" in call(enroll, capsys, "bob", wav(1, 0), *more)[1]
    status, _, error = call(enroll, capsys, "bob", wav(1, 0), *more)
    assert status == 2 and "already enrolled with it" in error
    assert call(enroll, capsys, "--list", *more)[1] == "ann  2 recordings\nbob  1 recording\n"
    network = load_model(model)
    unit = np.stack([x / np.linalg.norm(x) for x in (network.embed_file(wav(0, i)) for i in (0, 1))])
    weights = enrollment_weights([network.hear_file(wav(0, i))[1] for i in (0, 1)])
    test = network.embed_file(wav(1, 0))
    found = json.loads(call(identify, capsys, wav(1, 0), *more, "--threshold", 0.5, "--json")[1])
    assert [row["name"] for row in found["speakers"]] == ["bob", "ann"] and found["speaker"] == "bob"
    assert found["speakers"][0]["score"] == pytest.approx(1, abs=1e-6)
    assert found["speakers"][1]["score"] == pytest.approx(cosine(weights @ unit, test), abs=1e-5)
    out = call(identify, capsys, wav(1, 0), *more, "--threshold", 1.1)[1]
    assert "speaker: nobody who is enrolled; the nearest is bob\ndifferent speakers: score" in out
    assert "< threshold 1.1000 (--threshold)" in out
    found = json.loads(call(verify, capsys, wav(1, 0), "--speaker", "bob", *more, "--json")[1])
    assert found["score"] == pytest.approx(1, abs=1e-6)
    status, _, error = call(verify, capsys, wav(1, 0), "--speaker", "eve", *more)
    assert status == 2 and "'eve' is not enrolled; enrolled: ann, bob" in error
    assert "'ann' removed, 1 speaker left" in call(enroll, capsys, "ann", "--remove", *more)[1]
    store = more[2:]  # to look and to forget takes no model, and the store stays that model's
    assert call(enroll, capsys, "eve", wav(1, 1), *more)[0] == 0
    assert "'eve' removed" in call(enroll, capsys, "eve", "--remove", *store)[1]
    assert call(enroll, capsys, "--list", *store)[1] == "bob  1 recording\n"
    assert json.loads(call(identify, capsys, wav(1, 0), *more, "--json")[1])["speakers"][0]["name"] == "bob"
    status, _, error = call(enroll, capsys, "ann", wav(0, 0), *store)
    assert status == 2 and error == "enroll.py: --initial_model CKPT is needed to enroll\n"


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        (verify, ["{a}"], "takes 2 recordings, got 1"),
        (verify, ["{a}", "none.wav"], "no such file: 'none.wav'"),
        (verify, ["{a}", "{a}", "--prior", "2"], "--prior: must lie between 0 and 1"),
        (verify, ["{a}", "{a}", "--threshold", "nan"], "--threshold: must be a finite number"),
        (verify, ["{a}", "{a}", "--backend", "none.npz"], "none.npz: cannot be read"),
        (verify, ["{a}", "--speaker", "-ann"], "or as a path ./-ann"),
        (verify, ["{a}", "-b.wav"], "goes after all flags, behind '--': -- -b.wav"),
        (enroll, [], "needs the name of a speaker"),
        (enroll, ["ann"], "needs recordings of 'ann'"),
        (enroll, ["ann", "{a}", "--remove"], "--remove takes a name alone"),
        (identify, ["{a}"], "no such file: 'speakers.npz'; enroll.py makes it"),
        (identify, ["{a}", "--along", "--rttm", "{a}"], "--rttm: '{a}' is read by this command and would be lost"),
        (identify, ["{a}", "--top", "0"], "--top: must be at least 1"),
        (serve, ["--port", "99999"], "--port: must be 0 to 65535, got 99999"),
        (serve, ["--max_mb", "0"], "--max_mb: must be above 0 and at most 1000, got 0"),
    ],
)
def test_bad_usage_is_one_line(script, words, said, model, wav, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.format(a=wav(0, 0)) for word in words]
    status, out, error = call(script, capsys, *words, "--initial_model", model)
    assert (status, out, error.count("\n")) == (2, "", 1) and said.replace("{a}", wav(0, 0)) in error, error


@pytest.fixture
def server(model, wav, tmp_path):
    """Address of the page, served by the real command on a free port."""
    words = [
        "--initial_model",
        model,
        "--store",
        str(tmp_path / "speakers.npz"),
        "--threshold",
        "0.99999",
        "--port",
        "0",
    ]
    command = [sys.executable, str(ROOT / "serve.py"), *words, "--threads", "1", "--max_mb", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    line = process.stdout.readline()
    assert line.startswith("open http://127.0.0.1:"), line + process.stdout.read()
    yield line.split()[1]
    process.terminate()
    process.wait(20)
    assert process.stdout.read() == ""  # no request raised anything


def post(address, path, fields, **headers):
    """Send a form; fields are (name, file name, bytes). Returns (status, answer, headers)."""
    body = b""
    for name, file, content in fields:
        head = f'--edge\r\nContent-Disposition: form-data; name="{name}"; filename="{file}"\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=edge", **headers}
    chunked = iter([body + b"--edge--\r\n"]) if "Transfer-Encoding" in headers else body + b"--edge--\r\n"
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", path, chunked, headers, encode_chunked="Transfer-Encoding" in headers)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read()), reply.headers


def test_what_the_server_refuses(server, model, wav, tmp_path):
    good = Path(wav(0, 0)).read_bytes()
    pair = [("first", "a.flac", good), ("second", "b.flac", Path(wav(1, 0)).read_bytes())]
    status, answer, headers = post(server, "/api/compare", pair)
    network = load_model(model)
    expected = cosine(network.embed_file(wav(0, 0)), network.embed_file(wav(1, 0)))
    assert status == 200 and answer["verdict"]["score"] == pytest.approx(expected, abs=1e-6)
    assert headers["X-Content-Type-Options"] == "nosniff" and "default-src 'self'" in headers["Content-Security-Policy"]
    assert [len(r["waveform"]) for r in answer["recordings"]] == [400, 400] and answer["recordings"][0]["bands"] == 80
    large = [("first", "a.wav", bytes(2 << 20)), pair[1]]
    assert post(server, "/api/compare", large)[0] == 413
    assert post(server, "/api/compare", large, **{"Transfer-Encoding": "chunked"})[:2] == (
        413,
        {"detail": "more than 1 MB"},
    )
    status, answer, _ = post(server, "/api/compare", [("first", "<b>.txt", b"some text"), pair[1]])
    assert status == 422 and "not a recording that can be read" in answer["detail"]
    assert post(server, "/api/compare", pair, Origin="http://elsewhere.example")[0] == 403
    assert post(server, "/api/compare", pair, Host="elsewhere.example")[0] == 421
    assert post(server, "/api/identify", [("recording", "a.flac", good)])[1]["detail"] == "nobody is enrolled yet"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(server + "/serve.py")
    for name, samples, rate, said in (
        ("long.flac", np.zeros((3000000, 2)), 8000, "375.0 s; a recording must be 0.3 to 300 s long"),
        ("many.wav", np.zeros((8000, 9)), 8000, "9 channels; a recording must have at most 8"),
        ("silent.wav", np.zeros((8000, 2)), 8000, "the wave: silent: all zero"),
        ("fast.flac", np.zeros((300000, 8)), 655350, "655350 Hz; a recording must have 4000 to 192000 samples"),
    ):  # small files that decode to a lot
        soundfile.write(tmp_path / name, samples, rate)
        compact = (tmp_path / name).read_bytes()
        status, answer, _ = post(server, "/api/compare", [("first", name, compact), pair[1]])
        assert (len(compact) < 1 << 20, status) == (True, 422) and f"{name}: {said}" in answer["detail"]
    port = int(server.rsplit(":", 1)[1])
    for wait in (0, 0.05, 0.1):  # clients that ask for much, read nothing and hang up
        with socket.create_connection(("127.0.0.1", port)) as client, contextlib.suppress(OSError):
            client.sendall(b"GET /page.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 400)
            time.sleep(0.3)
            client.shutdown(socket.SHUT_WR)
            time.sleep(wait)
    assert urllib.request.urlopen(server).status == 200
    own = socket.gethostbyname(socket.gethostname())
    if not own.startswith("127."):
        with pytest.raises(OSError), socket.create_connection((own, port), timeout=5):
            pass


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_chromium(server, wav, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    errors = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.goto(server)
        page.get_by_text("ECAPA_TDNN, embeddings of 12; threshold 1.000; not calibrated").wait_for()
        compare_recordings(page, wav)
        enroll_and_identify(page, wav)
        decide_at_two_priors(page)
        identify_at_two_priors(page)
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing to scroll sideways on a phone
        browser.close()
    time.sleep(0.1)
    wanted = "Failed to load resource: the server responded with a status of 422"  # the file that is no audio
    assert [error for error in errors if wanted not in error] == []


def compare_recordings(page, wav):
    """Compare two recordings on the page, and two files that are none."""
    page.click("#compare [type=submit]")
    page.get_by_text("First recording: choose a file or record one first").wait_for()
    slots = page.locator("#compare [type=file]")
    slots.nth(0).set_input_files(wav(0, 0))
    slots.nth(1).set_input_files(wav(0, 0))
    page.click("#compare [type=submit]")
    assert page.locator("#compare .decision").text_content(timeout=60000) == "same speaker"
    assert page.locator("#compare canvas").count() == 4  # a waveform and a log-mel spectrogram each
    drawn = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    assert all(page.locator("#compare canvas").nth(i).evaluate(drawn) > 2 for i in range(4))
    slots.nth(1).set_input_files({"name": "x.wav", "mimeType": "audio/wav", "buffer": b"no audio"})
    page.click("#compare [type=submit]")
    page.get_by_text("x.wav: not a recording that can be read").wait_for(timeout=60000)
    slots.nth(1).set_input_files({"name": "large.wav", "mimeType": "audio/wav", "buffer": bytes(3 << 19)})
    assert page.locator("#compare .result").text_content() == ""  # the complaint was about another file
    page.click("#compare [type=submit]")
    page.get_by_text("MB: more than the 1 MB of a request").wait_for()


def enroll_and_identify(page, wav):
    """Enroll two speakers, one by the microphone, identify one and remove it."""
    page.click("#tab-enroll")
    page.fill("[name=name]", "ann/1")
    page.locator("#enroll [type=file]").set_input_files([wav(0, 0), wav(0, 1)])
    page.click("#enroll [type=submit]")
    page.get_by_text("ann/1 (2 recordings)").wait_for(timeout=60000)
    page.fill("[name=name]", "microphone")
    page.click("#enroll .record")
    page.get_by_text(re.compile(r"Stop \(1 s\)")).wait_for(timeout=60000)
    page.click("#enroll .record")
    page.locator("#enroll audio").wait_for()
    page.click("#enroll [type=submit]")
    page.get_by_text("microphone (1 recording)").wait_for(timeout=60000)
    page.click("#tab-identify")
    page.locator("#identify [type=file]").set_input_files(wav(0, 0))
    page.click("#identify [type=submit]")
    assert page.locator("#identify tbody tr").nth(0).text_content(timeout=60000).startswith("ann")
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#tab-enroll")
    page.get_by_role("button", name="Remove").first.click()
    page.get_by_text("ann/1 (2 recordings)").wait_for(state="detached")


def decide_at_two_priors(page):
    """Look at the scale of a verdict, and move the share of comparisons that are of one speaker."""
    marks = "v => [...scaleOf(v).querySelectorAll('i')].map(i => parseFloat(i.style.left))"
    same = {"score": 0.83, "llr": 9.4, "threshold": 2.94}  # on the log-likelihood ratio
    mark, threshold = page.evaluate(marks, same)
    assert 0 < threshold < mark < 100
    mark, threshold = page.evaluate(marks, {"score": 0.2, "llr": None, "threshold": 0.4})
    assert 0 < mark < threshold < 100
    page.click("#tab-compare")
    assert not page.locator("#prior").is_visible()  # this server's threshold is given, and not calibrated
    verdict = {"score": 0.8, "llr": 1.0, "threshold": 2.94, "threshold_moves": True, "same": False}
    section = "document.querySelector('#compare .result')"
    page.evaluate(f"v => {{ shown.set('compare', [{section}, {{verdict: v}}]); preparePrior(0.05); }}", verdict)
    assert "87 % sure, if 5 % of the comparisons" in page.locator("#compare .result").text_content()
    assert page.locator("#compare .decision").text_content() == "different speakers"
    page.locator("#prior-range").fill("10")  # 50 %
    assert "73 % sure, if 50 % of the comparisons" in page.locator("#compare .result").text_content()
    assert page.locator("#compare .decision").text_content() == "same speaker"


def identify_at_two_priors(page):
    """Show an answer on the page: who is named follows the share of recordings that are of somebody enrolled."""
    page.click("#tab-identify")
    assert "recordings are of somebody who is enrolled?" in page.locator("#prior label").text_content()
    people = [{"name": name, "score": 0.5, "llr": llr} for name, llr in (("ann", 2), ("bob", -1))]
    answer = {"speakers": people, "enrolled": 2, "decided": True, "by_probability": True, "cautions": []}
    answer["evidence"] = math.log((math.exp(2) + math.exp(-1)) / 2)
    section = "document.querySelector('#identify .result')"
    page.evaluate(f"a => {{ shown.set('identify', [{section}, a]); preparePrior(0.05); }}", answer)
    shares, nobody = speaker_posterior([2, -1], 0.5)
    result = page.locator("#identify .result")
    assert f"{percent(shares[0])} sure, if 50 % of the recordings" in result.text_content()
    assert f"enrolled{percent(nobody)}" in result.text_content()
    assert page.locator("#identify .decision.yes").text_content() == "ann"
    page.locator("#prior-range").fill("6")  # 10 %
    assert page.locator("#identify .decision.no").text_content() == "nobody who is enrolled"
    assert f"{percent(speaker_posterior([2, -1], 0.1)[1])} sure that it is nobody" in result.text_content()


def test_a_folder_of_recordings_is_enrolled(model, wav, capsys, tmp_path):
    folder = tmp_path / "Иван Петров"
    for number in range(2):
        (folder / f"{number}").mkdir(parents=True)
        shutil.copy(wav(1, number), folder / f"{number}" / "a.wav")
    store = tmp_path / "people.npz"
    words = ("Иван", str(folder), "--store", str(store), "--initial_model", model)
    status, out, error = call(enroll, capsys, *words)
    assert status == 0 and "'Иван' with 2 recordings, 1 speaker" in out, error
    (tmp_path / "none").mkdir()
    words = ("Eve", str(tmp_path / "none"), *words[2:])
    status, _, error = call(enroll, capsys, *words)
    assert status == 2 and "no recording in the folder" in error
