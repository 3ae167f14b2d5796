"""Fill in a template of a page that needs no other file and no network."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).with_name("templates")


def render_template(name: str, script_name: str | None, **values: Any) -> str:
    """Render a template with the style sheet, and a script if any, inside.

    Every text is escaped, and the page may load and run only what is in it.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    script = (TEMPLATES / script_name).read_text(encoding="utf-8") if script_name else ""
    script_source = f"'{_hash(script)}'" if script_name else "'none'"
    policy = (
        "default-src 'none'",
        "img-src data:",
        f"style-src '{_hash(style)}'",
        f"script-src {script_source}",
        "base-uri 'none'",
        "form-action 'none'",
    )
    return environment.get_template(name).render(
        **values, style=Markup(style), script=Markup(script), policy="; ".join(policy)
    )


def _hash(content: str) -> str:
    """The source expression of an inline style sheet or script in a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
