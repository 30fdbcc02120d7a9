"""A local web page: compare two recordings, enroll speakers, identify one; with the scores, waveforms and log-mels.

python serve.py --initial_model exps/demo/model/model_best.model                      # then open http://127.0.0.1:8000
python serve.py --initial_model exps/demo/model/model_best.model --store speakers.npz --port 8123

It listens on this machine alone unless --host says otherwise. Nothing leaves it: no telemetry, no fonts or scripts from
elsewhere. FastAPI, not Gradio: three requests and one page need no framework of widgets, and limits on what is
uploaded can be enforced before it is read.
"""

import base64
import contextlib
import functools
import ipaddress
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path

from corpus.audio import MIN_SECONDS
from errors import UsageError
from scoring.identification import identify as identify_in
from scoring.verification import add_store_argument, add_verifier_arguments, verifier_from
from settings.command_line import Parser, need, run
from speaker_model import add_model_arguments, model_from

PAGE = Path(__file__).resolve().parent / "web"
MAX_SECONDS = 300.0
MOST_CHANNELS = 8
LONGEST_NAME = 255  # letters of an uploaded file's name, as file systems allow
RATES = (4000, 192000)  # Hz: an absurd rate makes the filter that resamples it absurd too
FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3", "AIFF", "W64", "RF64", "AU", "CAF")
PICTURE_COLUMNS = 400  # of a waveform or log-mel picture, however long the recording
SECURITY = {
    "Content-Security-Policy": "default-src 'self'; media-src blob:; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class TooLarge(Exception):
    """A request body above the limit."""


class Guard:
    """ASGI middleware: a limit on the body before it is read, no requests of other sites, safe headers.

    A page of another site may send forms here although it cannot read the answers, and a name that it controls may be
    made to point to the address of this machine: both are refused by the Host and Origin headers.
    """

    def __init__(self, app, hosts: set[str], limit: int):
        self.app, self.hosts, self.limit = app, hosts, limit

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, size = {}, 0
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))

        async def counted():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.limit:
                raise TooLarge
            return message

        async def safe(message):
            if message["type"] == "http.response.start":
                safer = [(name.lower().encode(), value.encode()) for name, value in SECURITY.items()]
                message = {**message, "headers": [*message["headers"], *safer]}
            await send(message)

        async def within(message):  # what is said of a body that was cut off is of no use
            if size <= self.limit:
                await safe(message)

        async def refuse(status, text):
            await drain(receive, 4 * self.limit)
            await answer(safe, scope, status, text)

        host = ", ".join(headers.get("host", []))
        others = [origin for origin in headers.get("origin", []) if origin.split("://", 1)[-1] != host]
        length = headers.get("content-length", ["0"])[-1]
        if not is_own(host, self.hosts):
            await refuse(421, f"this server is not '{host}'; serve.py --allow_host NAME lets it be called so")
        elif others or (scope["path"] != "/" and headers.get("sec-fetch-site", ["none"])[0] == "cross-site"):
            await refuse(403, f"requests of '{', '.join(others) or 'other sites'}' are refused")
        elif not length.isdigit() or int(length) > self.limit:
            await refuse(413, f"more than {self.limit >> 20} MB")
        else:
            with contextlib.suppress(TooLarge):
                await self.app(scope, counted, within)
            if size > self.limit:
                await refuse(413, f"more than {self.limit >> 20} MB")


async def drain(receive, most: int):
    """Read and forget up to ``most`` bytes of a body: who is cut off while sending sees a reset, not the answer."""
    while most > 0:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body"):
            return
        most -= len(message.get("body", b""))


async def answer(send, scope, status: int, text: str):
    """Send a JSON complaint."""
    from starlette.responses import JSONResponse

    await JSONResponse({"detail": text}, status)(scope, None, send)


class VerificationService:
    """A verifier and the file of enrolled speakers, as the requests use them."""

    def __init__(self, verifier, store_path: str):
        self.verifier, self.model, self.store_path = verifier, verifier.model, store_path
        self.busy = threading.Lock()  # one recording at a time: cores and memory are shared

    def store(self):
        """The enrolled speakers; nobody if there is no file yet."""
        from storage.speaker_store import SpeakerStore

        return SpeakerStore.open(self.store_path, self.model.identity, self.model.dimension, True, self.model.vad)

    def embed_upload(self, upload):
        """Embed an upload -> (Utterance, what the page draws); HTTPException 422 if it gives no embedding."""
        from fastapi import HTTPException

        from storage.speaker_store import Utterance

        name = Path(upload.filename or "recording").name
        if len(name) > LONGEST_NAME:
            raise HTTPException(422, f"the name of a recording has at most {LONGEST_NAME} letters, got {len(name)}")
        try:
            with self.busy:
                rate = self.model.sample_rate
                crop = read_upload(upload.file, self.model.config.channel, rate)
                embedding, acoustics = self.model.hear(crop, MIN_SECONDS)
                utterance = Utterance(embedding, len(crop.x) / rate, name, acoustics)
                drawn = describe(crop.x, rate, log_mel(crop.x, rate))
                return utterance, {**drawn, "caution": self.verifier.unlike(utterance)}
        except (ValueError, UsageError) as error:
            raise HTTPException(422, f"{name}: {error}") from error

    def change(self, what):
        """Let ``what`` change the enrolled speakers, with their file locked."""
        from storage.speaker_store import locked

        with locked(self.store_path):
            store = self.store()
            what(store)
            store.save()


def build_app(verifier, store_path: str, hosts: set[str], max_mb: float):
    """The web application of a verifier (verification.Verifier) and a store of speakers."""
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse

    app = FastAPI(title="Speaker verification", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(UsageError)
    async def complain(request, error):
        text = str(error).encode("utf-8", "backslashreplace").decode()  # it may name a file whose name is not UTF-8
        return JSONResponse({"detail": text}, 400)

    service = VerificationService(verifier, store_path)
    add_page(app, verifier, max_mb)
    add_comparisons(app, service)
    add_speakers(app, service)
    app.add_middleware(Guard, hosts=hosts, limit=int(max_mb * (1 << 20)))
    return app


def add_page(app, verifier, max_mb: float):
    """The page itself, and what it says of the model."""
    from fastapi import HTTPException
    from fastapi.responses import FileResponse

    @app.get("/")
    def page():
        return FileResponse(PAGE / "index.html")

    @app.get("/{name}.{ending}")
    def asset(name: str, ending: str):
        if f"{name}.{ending}" not in ("page.js", "page.css", "recorder.js"):
            raise HTTPException(404, "no such page")
        return FileResponse(PAGE / f"{name}.{ending}")

    @app.get("/api/about")
    def about():
        model = verifier.model
        says = {"model": model.config.model, "dimension": model.dimension, "threshold": verifier.threshold}
        says.update(calibrated=verifier.calibrated, prior=verifier.prior, threshold_moves=verifier.threshold_moves)
        return {**says, "cautions": verifier.cautions, "max_mb": max_mb}


def add_comparisons(app, service: VerificationService):
    """Two recordings, or a recording and everybody who is enrolled."""
    from fastapi import File, HTTPException, UploadFile

    @app.post("/api/compare")
    def compare(first: UploadFile = File(), second: UploadFile = File()):  # noqa: B008 (FastAPI's way to declare fields)
        (a, drawn_a), (b, drawn_b) = service.embed_upload(first), service.embed_upload(second)
        return {"verdict": service.verifier.compare([a], b).values(), "recordings": [drawn_a, drawn_b]}

    @app.post("/api/identify")
    def identify(recording: UploadFile = File()):  # noqa: B008
        store = service.store()
        if not len(store):
            raise HTTPException(400, "nobody is enrolled yet")
        utterance, drawn = service.embed_upload(recording)
        found = identify_in(service.verifier, store, utterance)
        return {**found.values(), "cautions": found.cautions(), "recordings": [drawn]}


def add_speakers(app, service: VerificationService):
    """List, enroll and remove speakers."""
    from fastapi import File, Form, UploadFile

    @app.get("/api/speakers")
    def speakers():
        return [{"name": name, "recordings": len(rows)} for name, rows in sorted(service.store().speakers.items())]

    @app.post("/api/speakers")
    def enroll(name: str = Form(), recordings: list[UploadFile] = File()):  # noqa: B008
        name, heard = name.strip(), [service.embed_upload(upload) for upload in recordings]

        def add(store):
            known = {utterance.source for utterance in store.speakers.get(name, [])}
            store.add(name, [replace(u, source=unused(u.source, known)) for u, _ in heard])

        service.change(add)
        return {"name": name, "recordings": [drawn for _, drawn in heard]}

    @app.delete("/api/speakers/{name:path}")  # a name may hold a slash
    def forget(name: str):
        service.change(lambda store: store.remove(name))
        return {"name": name}


def unused(name: str, known: set[str]) -> str:
    """A source name that is not taken yet: browsers give every recording the same one."""
    number, free = 2, name
    while free in known:
        free, number = f"{name} ({number})", number + 1
    known.add(free)
    return free


def read_upload(file, channel: str = "mix", sample_rate: int = 16000):
    """Decode an uploaded recording -> Excerpt at ``sample_rate``; ValueError says why it is refused.

    Silence of many channels at a high rate is a small file, so the samples are bounded before they are decoded.
    """
    import shutil
    import tempfile

    import numpy as np

    from corpus.audio import AudioError, read_crop

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recording")
        with open(path, "wb") as copy:
            shutil.copyfileobj(file, copy)
        try:
            check_upload(path)
            crop = read_crop(path, channel=channel, sample_rate=sample_rate)
        except AudioError as error:
            raise ValueError(f"not a recording that can be read: {error}; send WAV, FLAC, OGG or MP3") from error
    if not np.isfinite(crop.x).all():
        raise ValueError("holds samples that are NaN or Inf")
    return crop


def check_upload(path):
    """ValueError for a recording of another format, length, rate or number of channels than the page takes."""
    from corpus.decode import Recording

    with Recording(path, convert=False) as recording:  # what comes over the network goes through no further program
        rate, frames = recording.rate, 0
        if recording.format not in FORMATS:
            raise ValueError(f"{recording.format} is not read here; send WAV, FLAC, OGG or MP3")
        if not RATES[0] <= rate <= RATES[1]:
            raise ValueError(f"{rate} Hz; a recording must have {RATES[0]} to {RATES[1]} samples a second")
        if recording.channels > MOST_CHANNELS:
            raise ValueError(f"{recording.channels} channels; a recording must have at most {MOST_CHANNELS}")
        for block in recording.blocks() if recording.counted else ():  # its header does not tell how long it is
            frames += len(block)
            if frames > MAX_SECONDS * rate:
                raise ValueError(f"more than {MAX_SECONDS:g} s; a recording must be at most that long")
        seconds = (frames or recording.frames) / rate
        if not MIN_SECONDS <= seconds <= MAX_SECONDS:
            raise ValueError(f"{seconds:.1f} s; a recording must be {MIN_SECONDS:g} to {MAX_SECONDS:g} s long")


def log_mel(x, rate: int):
    """Log-mel spectrogram (80, frames) of a recording, for the eye: whatever features the model takes."""
    import torch

    from models.frontend import FrontEnd

    with torch.inference_mode():
        return FrontEnd("wespeaker", 80, "none", sample_rate=rate)(torch.from_numpy(x)[None])[0].numpy()


def describe(x, rate: int, features) -> dict:
    """What the page draws: length, the span of the waveform in each column, the features as bytes row by row."""
    import numpy as np

    edges = np.linspace(0, len(x), min(PICTURE_COLUMNS, len(x)) + 1).astype(int)[:-1]
    low, high = np.minimum.reduceat(x, edges), np.maximum.reduceat(x, edges)
    frames = features.shape[1]
    columns = np.linspace(0, frames, min(PICTURE_COLUMNS, frames) + 1).astype(int)[:-1]
    features = np.add.reduceat(features, columns, axis=1) / np.diff([*columns, frames])
    bottom, top = np.percentile(features, (2, 99.5))
    shades = np.clip(255 * (features - bottom) / max(top - bottom, 1e-6), 0, 255).astype(np.uint8)
    return {
        "seconds": len(x) / rate,
        "rate": rate,
        "peak": float(np.abs(x).max()),
        "waveform": [[round(float(a), 4), round(float(b), 4)] for a, b in zip(low, high)],
        "bands": shades.shape[0],
        "frames": shades.shape[1],
        "mel": base64.b64encode(shades.tobytes()).decode(),
    }


def is_own(host: str, names: set[str]) -> bool:
    """Whether a Host header names this server: an IP address, which no other site can call its own, or one of names."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(:\d+)?", host.lower())
    return found is not None and (found[1] in names or is_address(found[1]))


def is_address(host: str) -> bool:
    """Whether it is an IP address, of version 6 also in brackets."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def main(argv) -> int:
    """Run the command line."""
    parser = Parser("serve.py", __doc__.splitlines()[0])
    add_model_arguments(parser)
    add_verifier_arguments(parser)
    add_store_argument(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port (default 8000; 0 takes a free one)")
    parser.add_argument(
        "--allow_host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names of this machine that pages may be asked for by, besides localhost and its IP addresses",
    )
    parser.add_argument("--max_mb", type=float, default=20.0, help="largest request in MB (default 20)")
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port: must be 0 to 65535, got {args.port}")
    if not 0 < args.max_mb <= 1000:
        raise UsageError(f"--max_mb: must be above 0 and at most 1000, got {args.max_mb:g}")
    need("serve.py", "fastapi", "uvicorn", "python_multipart")
    import socket

    import uvicorn

    address = args.host.strip("[]")
    names = {name.lower() for name in ("localhost", address, *args.allow_host)}
    app = build_app(verifier_from(args, model_from), args.store, names, args.max_mb)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, args.port))
            listener.listen(64)  # so that the address that is printed answers at once
        except OSError as error:
            raise UsageError(f"serve.py: cannot listen on {args.host}:{args.port}: {error.strerror}") from error
        shown = f"[{address}]" if ":" in address else address
        print(f"open http://{shown}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
        if address != "localhost" and not (is_address(address) and ipaddress.ip_address(address).is_loopback):
            print(f"warning: {args.host} can be reached from other machines, without a password", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listener])
    return 0


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
