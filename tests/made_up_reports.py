"""Reports made up for tests: rows, content, and a reader that checks the page."""

from __future__ import annotations

import html.parser
import math
import re

import numpy as np

from dynamo_jax.analysis.dynamics import Dynamics, Significance, dynamics
from dynamo_jax.report.content import Line, ReportContent
from dynamo_jax.report.findings import headline
from dynamo_jax.report.page import render

VOID = {"meta", "br", "hr", "img", "link", "input"}


def row(dataset: str, variant: str, nll: float, kind: str = "known", **changes: object) -> dict:
    bits = {"bf16": 16.0, "rtn4": 4.25, "rtn3": 3.25, "rtn2": 2.25}.get(variant, 3.0)
    base = {
        "dataset": dataset,
        "kind": kind,
        "variant": variant,
        "device_bits": bits,
        "bytes_per_token": 1e6 * bits / 16,
        "batch": 1,
        "bytes_per_step": 1e6 * bits / 16,
        "tokens": 10240,
        "nll": nll,
        "perplexity": math.exp(min(nll, 700.0)),
        "reference": None,
        "difference": None,
        "standard_error": None,
    }
    return base | changes


def group(dataset: str, kind: str, step: float = 0.0, error: float = 0.0) -> list[dict]:
    """The rows of one dataset, auto being ``step`` nats a token above the baseline."""
    rows = [row(dataset, "bf16", 2.0, kind)]
    for variant, above in (("rtn4", 0.01), ("rtn3", 0.08), ("rtn2", 0.5), ("baseline", 0.05)):
        paired = {"reference": "bf16", "difference": above, "standard_error": 0.002}
        rows.append(row(dataset, variant, 2.0 + above, kind, **paired))
    paired = {"reference": "baseline", "difference": step, "standard_error": error}
    return [*rows, row(dataset, "auto", 2.05 + step, kind, **paired)]


def made_up_dynamics(names: tuple[str, ...], shape: tuple[int, int, int], one: float | None = None) -> Dynamics:
    """Each dataset has favourite experts; ``one``: the significance of all experts and blocks, if it is to be one."""
    rng = np.random.default_rng(1)
    favourites = {n: rng.lognormal(0, 1, shape[:2]) for n in names}

    def sample(name: str) -> Significance:
        if one is not None:
            return Significance(np.full(shape[:2], one), np.full(shape, one))
        return Significance(favourites[name] * rng.lognormal(0, 0.1, shape[:2]), rng.lognormal(-7, 2, shape))

    return dynamics(
        {n: rng.poisson(100 * f, (8, *shape[:2])) for n, f in favourites.items()},
        {n: sample(n) for n in names},
        {n: (sample(n), sample(n)) for n in names},
    )


def make(
    known: tuple[str, ...] = ("prose", "code"),
    novel: dict[str, tuple[float, float]] | None = None,
    shape: tuple[int, int, int] = (3, 5, 4),
) -> ReportContent:
    """Content with ``novel`` datasets -> (difference, standard error) of their auto rows."""
    novel = {"recipes": (-0.02, 0.002)} if novel is None else novel
    rng = np.random.default_rng(0)
    names = [*known, *novel]
    base = rng.choice([2, 3, 4, 8], shape[:2])
    return ReportContent(
        model="tiny-moe",
        facts={"experts": f"{shape[0]} layers x {shape[1]}", "budget": "3.0 bits a weight"},
        expert_weights=8_000_000,
        rows=[
            *(r for name in known for r in group(name, "known")),
            *(r for name, step in novel.items() for r in group(name, "novel", *step)),
        ],
        significance={n: rng.lognormal(-7, 2, shape[:2]) for n in names},
        block_significance={n: rng.lognormal(-7, 2, shape) for n in names},
        baseline_bits=np.repeat(base[:, :, None], shape[2], axis=2),
        adapted_bits={n: rng.choice([2, 3, 4, 8], shape) for n in novel},
        verdicts={n: (known[0] if known else "none", 1.6 if n in novel else 0.2, n in novel) for n in names},
        dynamics=made_up_dynamics(known, shape),
        command="dynamo-jax demo --bits 3",
        next_steps={"What it holds": "dynamo-jax inspect --model there"},
        timelines={n: made_up_line(n in novel, rng) for n in names},
    )


def made_up_line(novel: bool, rng: np.random.Generator) -> Line:
    score = rng.uniform(0.8, 3.0, 9) if novel else rng.uniform(0.1, 0.9, 9)
    nearest = ["novel" if s > 1 else "prose" for s in score]
    gained = np.where(np.arange(9) > 3, rng.normal(-0.01, 0.01, 9), 0) * novel
    ends = (256 * np.arange(1, 10)).tolist()
    return Line(ends, score.tolist(), nearest, gained.tolist(), [novel and i > 3 for i in range(9)])


class Page(html.parser.HTMLParser):
    """Reads a page, and fails where tags do not balance."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "title"):
            self.words.append(data)

    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def checked(content: ReportContent) -> Page:
    """The page, after the checks that every page must pass: no broken number in a coordinate, no pair of ids."""
    page = Page(render(content))
    numeric = {"x", "y", "width", "height", "x1", "x2", "y1", "y2", "cx", "cy", "viewbox", "points"}
    for tag, name, value in page.attributes:
        if name in numeric:
            assert re.fullmatch(r"[-0-9. ,]+", value or ""), f"{tag} {name}={value!r}"
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = [value for tag, name, value in page.attributes if name == "href"]
    assert {str(link).removeprefix("#") for link in links} <= set(ids)
    return page


def says(content: ReportContent) -> str:
    return " ".join(f.words for f in headline(content))
