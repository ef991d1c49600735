"""Docstrings as the site shows them: formulas as in the pages of docs/, $ and $$; an example is code, not a note."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r"^( +[\w, ]+: )>", r"\1\\>", text, flags=re.MULTILINE)  # "> 0" is no quotation
            text = re.sub(r":math:`([^`]+)`", lambda m: f"${' '.join(m[1].split())}$", text)
            text = re.sub(
                r"^\.\. math::(.*(?:\n[ \t]+\S.*)*)",
                lambda m: f"$$\n{' '.join(m[1].split())}\n$$",
                text,
                flags=re.MULTILINE,
            )
            obj.docstring.value = text
