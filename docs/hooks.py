"""Hooks of mkdocs: text and pictures that stand outside of docs/, with links that lead there.

`--8<-- "README.md"` includes a file of the repository, `--8<-- "README.md:measured"` what stands
between its markers of that name.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def included(match: "re.Match[str]") -> str:
    """The text that a line names; its links are seen from docs/. Raises ValueError without it."""
    name, _, section = match[1].partition(":")
    text = (ROOT / name).read_text(encoding="utf-8")
    if section:
        start, end = (f"<!-- {edge} {section} -->\n" for edge in ("start", "end"))
        if start not in text or end not in text:
            raise ValueError(f"{name}: got no markers, expected {start.strip()} and {end.strip()}")
        text = text.partition(start)[2].partition(end)[0]
    return text.replace("](docs/", "](")


def on_page_markdown(markdown: str, **others: Any) -> str:
    """Include what lines name; pictures of results are where `on_files` puts them."""
    markdown = re.sub(r'^--8<-- "(.+)"$', included, markdown, flags=re.MULTILINE)
    return markdown.replace("](../benchmarks/results/", "](results/")


def on_files(files: Any, config: Any, **others: Any) -> Any:
    """Add the pictures of `benchmarks/results`, and to the navigation the pages that it lacks."""
    named = repr(config["nav"])
    more = [file.src_uri for file in files.documentation_pages() if file.src_uri not in named]
    if more:
        config["nav"].append({"More": more})
    for path in sorted((*RESULTS.glob("*.png"), *RESULTS.glob("*.svg"))):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files
