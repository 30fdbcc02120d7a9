"""A page that is one file: its style and script are inlined, and it can neither load nor run anything else."""

import base64
import hashlib
from pathlib import Path

from web.charts import escape

STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def document(title: str, body: str, script: str = "") -> str:
    """A whole page; ``body`` is HTML, ``title`` text. Only its own style and script may act, by their hashes."""
    style, act = (base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in (STYLE, script))
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{act}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}; base-uri 'none'; form-action 'none'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main><h1>{escape(title)}</h1>"
        f"{body}</main>{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def terms(pairs, kind: str) -> str:
    """A description list of (term, HTML), without the empty ones; kind 'place' has two columns, 'facts' is a row."""
    before, after = ("", "") if kind == "place" else ("<div>", "</div>")
    shown = [f"{before}<dt>{term}</dt><dd>{words}</dd>{after}" for term, words in pairs if words]
    return f'<dl class="{kind}">{"".join(shown)}</dl>' if shown else ""


def section(title: str, body: str) -> str:
    """A titled panel, or nothing without a body."""
    return f"<section><h3>{title}</h3>{body}</section>" if body else ""
