"""What the documents name exists: files and headings behind their links, commands and their options, and every option
of the server is in the reference.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click
import pytest
import typer
import yaml

from progidiff.cli.main import app
from progidiff.server.options import ServerOptions

ROOT = Path(__file__).parents[1]

LINK = re.compile(
    r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)"  # [text](target "title")
    r"|<img[^>]*\ssrc=\"([^\"]+)\""
)


def list_pages() -> list[Path]:
    """Markdown files that git keeps, or would."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split("\0")
    # The README of a version is written by the program and read where the version lies.
    return [ROOT / name for name in listed if name and not name.startswith("tests/data/")]


def strip_code(text: str) -> str:
    """Without what is shown as code."""
    text = re.sub(r"^( *)(`{3,}|~{3,})[^\n]*\n.*?^\1\2[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "``", text)


def list_anchors(text: str) -> set[str]:
    """What links after '#' may name: headings as GitHub and mkdocs write them, and explicit ids."""
    anchors: dict[str, int] = {}
    found = set(re.findall(r"<a\s+(?:id|name)=\"([^\"]+)\"", text)) | set(re.findall(r"\{#([\w-]+)\}", text))
    fenced = re.sub(r"^( *)(`{3,}|~{3,})[^\n]*\n.*?^\1\2[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", fenced, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        count = anchors.get(slug, 0)
        anchors[slug] = count + 1
        found |= {slug if not count else f"{slug}-{count}", re.sub(r"-{2,}", "-", slug)}
    return found


def find_broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    broken = []
    for groups in LINK.findall(strip_code(page.read_text(encoding="utf-8"))):
        target = unquote(groups[0] or groups[1])
        if re.match(r"[a-z][a-z0-9+.-]*:", target, flags=re.IGNORECASE) or target.startswith("//"):
            continue
        name, _, anchor = target.partition("#")
        path = page if not name else (page.parent / name).resolve()
        if not path.exists():
            broken.append(f"{target}: there is no such file")
        elif anchor and path.suffix == ".md" and anchor not in list_anchors(path.read_text(encoding="utf-8")):
            broken.append(f"{target}: there is no such heading")
    return broken


def test_there_are_pages_and_links_to_check():
    assert sum(len(LINK.findall(strip_code(page.read_text(encoding="utf-8")))) for page in list_pages()) > 50


@pytest.mark.parametrize("page", list_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    assert not find_broken(page)


def test_a_broken_link_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`\n\n[a](page.md) [b](#one-two) [c](gone.md) [d](#three) [e](https://x.org/gone) `[f](gone.md)`\n"
        '```\n[g](gone.md)\n```\n![h](gone.png) <img src="gone.jpg">\n',
        encoding="utf-8",
    )
    assert [line.split(":")[0] for line in find_broken(page)] == ["gone.md", "#three", "gone.png", "gone.jpg"]


PLACEHOLDER = "PLACEHOLDER"
COMMAND = re.compile(r"(?:^[ \t]*|`)(?:[^\n`]*bin/)?progidiff[ \t]+((?:\\\n|[^\n`|;&#>])+)", flags=re.MULTILINE)
"""A call of the command line, up to a pipe, a comment or the end of what is shown as code."""


def list_calls(text: str) -> list[list[str]]:
    """The words after `progidiff` in blocks of code and between backticks; what stands between < and > is one word."""
    text = re.sub(r"<[a-zA-Z][^<>\n]*>", PLACEHOLDER, text)
    fences = re.findall(r"^ *`{3}(?:yaml|python)?\n(.*?)^ *`{3}", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"(?<!`)`[^`\n]+`(?!`)", text)
    return [words.replace("\\\n", " ").split() for code in [*fences, *spans] for words in COMMAND.findall(code)]


def explain(call: list[str]) -> str:
    """What is wrong with a call: a command or an option that there is not; empty if nothing is."""
    command: click.Command = typer.main.get_command(app)
    words = list(call)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        if words[0] == PLACEHOLDER:
            return ""
        if words[0] not in command.commands:
            return f"progidiff {' '.join(call)}: there is no command '{words[0]}'"
        command = command.commands[words.pop(0)]
    known = {name for option in command.params for name in option.opts} | {"-h", "--help"}
    strange = [word for word in words if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]
    return f"progidiff {' '.join(call)}: there is no option {strange}" if strange else ""


def test_commands_and_their_options_exist():
    calls = [(page.name, call) for page in list_pages() for call in list_calls(page.read_text(encoding="utf-8"))]
    assert len(calls) > 60
    assert not [f"{page}: {wrong}" for page, call in calls if (wrong := explain(call))]


def test_messages_name_commands_that_exist():
    named = [
        (path.name, words.split())
        for path in (ROOT / "lib").rglob("*.py")
        for words in re.findall(r"`progidiff ([a-z][^`{\n\"]*)`", path.read_text(encoding="utf-8"))
    ]
    assert len(named) > 30
    assert not [f"{name}: {wrong}" for name, call in named if (wrong := explain(call))]


def test_a_command_that_is_not_there_is_found():
    text = "```\n.venv/bin/progidiff users ad anna   # adds\nprogidiff serve --studdies x\n```\nor `progidiff gone`"
    calls = list_calls(text)
    assert calls == [["users", "ad", "anna"], ["serve", "--studdies", "x"], ["gone"]]
    assert [bool(explain(call)) for call in [*calls, ["adapters", "list"]]] == [True, True, True, False]


CLUSTER = ROOT / "packaging" / "cluster"


def read_manifests(name: str) -> dict[str, dict[str, Any]]:
    """Kind -> what a file for Kubernetes asks for."""
    return {part["kind"]: part for part in yaml.safe_load_all((CLUSTER / name).read_text(encoding="utf-8"))}


def check_pod(pod: dict[str, Any]) -> dict[str, Any]:
    """Every mount has a volume, and asked is what is allowed. Returns the container."""
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["resources"]["limits"] == container["resources"]["requests"]
    return container


def test_the_job_for_ray_runs_a_command_that_exists_on_pods_that_see_the_studies():
    job = read_manifests("rayjob.yaml")["RayJob"]["spec"]
    words = job["entrypoint"].split()
    assert words[0] == "progidiff"
    assert not explain(words[1:])
    assert "--ray" in words
    cluster = job["rayClusterSpec"]
    groups = cluster["workerGroupSpecs"]
    containers = [check_pod(group["template"]["spec"]) for group in (cluster["headGroupSpec"], *groups)]
    studies = words[words.index("--studies") + 1]
    for container in containers:
        assert studies in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert container["image"] == containers[0]["image"]
    assert all("nvidia.com/gpu" in container["resources"]["limits"] for container in containers[1:])


def test_the_training_job_starts_as_many_processes_as_it_has_gpus_and_they_find_each_other():
    from torch.distributed.run import get_args_parser

    manifests = read_manifests("training.yaml")
    service, job = manifests["Service"], manifests["Job"]
    pod = job["spec"]["template"]["spec"]
    container = check_pod(pod)
    assert container["command"][0] == "torchrun"
    started = get_args_parser().parse_args([*container["command"][1:], *container["args"]])
    assert (started.module, started.training_script) == (True, "progidiff.cli")
    assert not explain(started.training_script_args)
    assert int(started.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert started.nproc_per_node == container["resources"]["limits"]["nvidia.com/gpu"]
    name, port = job["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert started.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:{port}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    words = started.training_script_args
    for option in ("--studies", "--model"):
        place = words[words.index(option) + 1]
        assert any(place == path or place.startswith(f"{path}/") for path in mounted)


def test_every_option_of_the_server_is_in_the_reference():
    page = (ROOT / "docs" / "reference" / "options.md").read_text(encoding="utf-8")
    table = page.partition("## Of one request")[0]
    assert not [field.name for field in dataclasses.fields(ServerOptions) if not re.search(rf"`{field.name}\b", table)]
