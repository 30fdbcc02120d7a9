"""A web server for tests: files by path with ETag and ranges, and paths that misbehave on purpose."""

import contextlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """What is served: ``files`` {path: bytes}, ``moved`` {path: address}, ``cuts`` {path: bytes until the cut, each}.

    ``asked``: (path, Range or "", status) of each request.
    """

    def __init__(self):
        self.files, self.moved, self.cuts, self.asked, self.address = {}, {}, {}, [], ""
        self.tag = '"one"'

    def url(self, path: str) -> str:
        """The address of a path."""
        return f"{self.address}{path}"


def handler(site: Site):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            path, wanted = self.path, self.headers.get("Range", "")
            if path in site.moved:
                return self.answer(path, wanted, 302, b"", Location=site.moved[path])
            if path not in site.files:
                return self.answer(path, wanted, 404, b"none")
            content = site.files[path]
            place = re.fullmatch(r"bytes=(\d+)-", wanted)
            if place and self.headers.get("If-Range", site.tag) == site.tag:
                start = int(place[1])
                if start >= len(content):
                    return self.answer(path, wanted, 416, b"")
                return self.answer(
                    path,
                    wanted,
                    206,
                    content[start:],
                    ETag=site.tag,
                    **{"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"},
                )
            return self.answer(path, wanted, 200, content, ETag=site.tag)

        def answer(self, path, wanted, status, content, **headers):
            site.asked.append((path, wanted, status))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            cuts = site.cuts.get(path)
            with contextlib.suppress(ConnectionError):  # of a client that has seen enough
                self.wfile.write(content[: cuts.pop(0)] if cuts else content)
            self.close_connection = True

    return Handler


@contextlib.contextmanager
def serving():
    """A Site that is served on a free port of this machine."""
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(site))
    site.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
