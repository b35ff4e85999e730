"""What every page of ours is made with: templates, style and script in one file that asks nothing of the network.

Style and script are inlined. Texts are hostile until shown otherwise: the templates escape them, the embedded JSON
cannot close its own element, and a content security policy lets only the one script run whose hash it names and
forbids every request. Needs neither torch nor ray.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from farspan.jobs.progress import size
from farspan.jobs.report.charts import EXTENT


def render_page(template: str, *, styles: Sequence[str], script: str, data: Any, **values: Any) -> str:
    """A page as text.

    Args:
        template: one that extends `frame.html`.
        styles: CSS files of this folder, in order.
        script: JavaScript file of this folder.
        data: what the script finds in the element `data`; finite numbers only.
        values: what the template asks for.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("farspan.jobs", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "value": value_text}
    here = Path(__file__).parent
    script = (here / script).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        style="\n".join((here / name).read_text(encoding="utf-8") for name in styles),
        script=script,
        script_hash=f"sha256-{digest}",
        data=embedded(data),
        extent=EXTENT,
        written=datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **values,
    )


def embedded(value: Any) -> str:
    """JSON that may stand inside a script element: no character in it can end the element or open another."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def value_text(value: float | None) -> str:
    """Three or four digits, as the pages' scripts print them too."""
    if value is None:
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    power = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, 3 - power) if power >= 0 else 2 - power}f}"
