"""A chat template run within limits: Jinja's sandbox, in a process of its own that has little memory and time.

Templates are programs from files that are not trusted. The sandbox keeps them from the machine; only limits keep a
template from never ending, or from filling memory within one multiplication. The process reads a job as JSON and writes
an answer; it imports this file alone, Jinja and the standard library. What a template sees is what `transformers`
shows it: tools and documents are None, ``{% generation %}`` is its body.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

LONGEST = 2**24  # characters that a template may write
LONGEST_ERROR = 500  # characters of its own words in an error
MEMORY = 2**30  # bytes of address space
SECONDS = 5  # of computing
Chat = list[dict[str, str]]  # what was said in turn: role and content of each message
WALL_SECONDS = 30  # where the machine is busy, or has no limit of computing
CHILD = (
    "import sys, json, runpy; job = json.load(sys.stdin); sys.path[:] = job['path']; "
    "runpy.run_path(job['file'])['answer'](job)"
)


class GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks what a trainer counts; the text is that of its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def rendered(template: str, chats: list[Chat], special: dict[str, str], answering: bool = True) -> list[str]:
    """What the template makes of each chat, run here, without limits of time and memory.

    special: tokens by name; answering: whether the model's answer is to begin at the end. ValueError: the template
    cannot be compiled, fails, or writes more than ``LONGEST``.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    given: dict[str, Any] = {"tools": None, "documents": None, **special, "add_generation_prompt": answering}
    texts = []
    try:
        compiled = environment.from_string(template)
        for messages in chats:
            parts, size = [], 0
            for part in compiled.generate(given, messages=messages):
                size += len(part)
                if size > LONGEST:
                    raise ValueError(f"it writes more than {LONGEST:,} characters")
                parts.append(part)
            texts.append("".join(parts))
    except MemoryError:
        raise ValueError("the chat template fails: it needs too much memory") from None
    except Exception as error:  # a template may raise anything
        words = str(error)[:LONGEST_ERROR] or type(error).__name__
        raise ValueError(f"the chat template fails: {words}") from error
    return texts


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message)[:LONGEST_ERROR])


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter of this name writes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def run(template: str, chats: list[Chat], special: dict[str, str]) -> list[str]:
    """As ``rendered``, of chats to be answered, in a process with ``MEMORY`` bytes and ``SECONDS`` of computing.
    ValueError: past them too."""
    path = [entry for entry in sys.path if isinstance(entry, str)]
    said = sum(len(message["content"]) for messages in chats for message in messages)
    limits = {"memory": MEMORY + 16 * said, "seconds": SECONDS}
    given = {"template": template, "chats": chats, "special": special}
    job = json.dumps({"path": path, "file": __file__, **limits, **given})
    try:
        ran = subprocess.run(
            [sys.executable or "python3", "-I", "-S", "-c", CHILD],
            input=job.encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"the chat template fails: it did not end within {WALL_SECONDS} seconds") from None
    except OSError as error:
        raise ValueError(f"the chat template cannot be run: {error}") from error
    try:
        answer = json.loads(ran.stdout)
    except ValueError:
        raise ValueError(f"the chat template fails: {_why(ran)}") from None
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["texts"]


def _why(ran: subprocess.CompletedProcess[bytes]) -> str:
    """Why the process gave no answer."""
    last = ran.stderr.decode(errors="replace").strip().rpartition("\n")[2][:LONGEST_ERROR]
    if ran.returncode < 0 and not last:
        return f"it did not end within {SECONDS} seconds of computing"
    return last or f"its process ended with {ran.returncode}"


def answer(job: dict[str, Any]) -> None:
    """The process's own side: limits, then the job, then what came of it as JSON on standard output."""
    _limit(job["memory"], job["seconds"])
    try:
        found = json.dumps({"texts": rendered(job["template"], job["chats"], job["special"])})
    except ValueError as error:
        found = json.dumps({"error": str(error)})
    except MemoryError:
        found = json.dumps({"error": "the chat template fails: it needs too much memory"})
    sys.stdout.write(found)


def _limit(memory: int, seconds: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has none; the time of the clock is limited there
        return
    for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(what, (most, resource.getrlimit(what)[1]))
        except (OSError, ValueError):  # a stricter one holds already, or the system has none of this kind
            continue
