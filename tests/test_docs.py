"""Names, flags, metrics, results and links in the README and the docs are correct."""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from scissor_vllm.cli.options import add_page_options, add_retention_options
from scissor_vllm.compression import METHODS
from scissor_vllm.metrics import METRICS, Reason
from scissor_vllm.models import MODELS
from scissor_vllm.settings import (
    DEFAULT_FEATURE_CACHE_GB,
    DEFAULT_FRAME_CACHE_GB,
    DEFAULT_MAX_VIDEO_TOKENS,
    DEFAULT_MIN_RETENTION_RATIO,
    DEFAULT_RETENTION_RATIO,
    DEFAULT_TOWER_FP8_MAX_RATIO,
    DEFAULT_TOWER_MERGING_MAX_RATIO,
    DEFAULT_TOWER_MERGING_THRESHOLD,
    DEFAULT_VIDEO_COMPRESSION,
)
from tests.test_readme import PAGES, README, ROOT

DOCS = ROOT / "docs"
HOME = "https://github.com/scissor-vllm/scissor-vllm"
RAW = "https://raw.githubusercontent.com/scissor-vllm/scissor-vllm/main/"
DEFAULTS = {
    "--default-retention-ratio": DEFAULT_RETENTION_RATIO,
    "--min-retention-ratio": DEFAULT_MIN_RETENTION_RATIO,
    "--auto-retention-ratio": "none",
    "--target-ttft-ms": "none",
    "--default-max-retained-video-tokens": "none",
    "--allow-compress-images": "off",
    "--max-video-tokens": DEFAULT_MAX_VIDEO_TOKENS,
    "--video-compression": f"`{DEFAULT_VIDEO_COMPRESSION}`",
    "--video-frame-cache-gb": f"{DEFAULT_FRAME_CACHE_GB:g}",
    "--video-feature-cache-gb": f"{DEFAULT_FEATURE_CACHE_GB:g}",
    "--web-page": "off",
    "--tower-merging-max-ratio": f"{DEFAULT_TOWER_MERGING_MAX_RATIO} for LLaVA-OneVision, else 0",
    "--tower-merging-threshold": f"{DEFAULT_TOWER_MERGING_THRESHOLD:g}",
    "--tower-fp8-max-ratio": f"{DEFAULT_TOWER_FP8_MAX_RATIO} for LLaVA-OneVision on Hopper GPUs, "
    "else 0",
}


def own_flags() -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    add_retention_options(parser)
    add_page_options(parser)
    return {flag for action in parser._actions for flag in action.option_strings}


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    named = re.findall(r"(?:scissor_vllm|bench|deploy|tests|docs)/[\w./-]+\w", page.read_text())
    for name in named:
        if not name.startswith(("build/", "docs/latest")):
            assert (ROOT / name).exists(), name


def test_every_file_of_the_package_that_the_architecture_names_is_there() -> None:
    for page in ("architecture.md", "vllm-touch-points.md"):
        rows = re.findall(r"^\|.*\|$", (DOCS / page).read_text(), re.M)
        named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+(?:\.py|/))`", "\n".join(rows))
        assert len(named) > 5
        for name in named:
            places = (ROOT / "scissor_vllm" / name, ROOT / name)
            assert any(place.exists() for place in places), name


def test_the_readmes_links_work_outside_the_repository() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", README.read_text().replace("\n", ""))
    assert len(links) > 8
    for link in links:
        assert link.startswith("https://"), link
        path = None
        if link.startswith(f"{HOME}/blob/main/"):
            path = link.removeprefix(f"{HOME}/blob/main/").split("#")[0]
        elif link.startswith(RAW):
            path = link.removeprefix(RAW)
        elif "githubusercontent" in link or HOME in link:
            pytest.fail(f"{link} names no file of the branch main")
        assert path is None or (ROOT / path).is_file(), link


def test_links_from_other_pages_into_the_repository_lead_to_files() -> None:
    for page in PAGES:
        for path in re.findall(rf"{HOME}/(?:blob|tree)/main/([\w./-]+)", page.read_text()):
            assert (ROOT / path).exists(), (page.name, path)


def test_every_flag_of_ours_is_documented_with_its_default() -> None:
    rows = dict(
        re.findall(r"^\| `(--[\w-]+)` \| ([^|]*) \|", (DOCS / "serving.md").read_text(), re.M)
    )
    assert own_flags() == DEFAULTS.keys()
    for flag, default in DEFAULTS.items():
        assert rows[flag] == str(default), flag


def test_the_readmes_flags_are_those_of_the_docs() -> None:
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| ([^|]*) \|", README.read_text(), re.M))
    shared = rows.keys() & DEFAULTS.keys()
    assert shared
    assert {flag: rows[flag] for flag in shared} == {flag: str(DEFAULTS[flag]) for flag in shared}


def test_every_metric_and_every_reason_is_documented() -> None:
    rows = re.findall(r"^\| (.*?) \|", (DOCS / "metrics.md").read_text(), re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {name.removesuffix("_total") for name in named} == {
        name.removeprefix("scissor_vllm:") for name in METRICS
    }
    errors = re.findall(r"^\| `(\w+)` \| .*\|$", (DOCS / "api.md").read_text(), re.M)
    assert {reason.value for reason in Reason} <= set(errors)


def test_every_method_and_every_model_is_documented() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "methods.md").read_text(), re.M)
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} == set(METHODS)
    pages = [path for path in DOCS.glob("*.md") if path.name in ("compatibility.md", "models.md")]
    models = {name for page in pages for name in re.findall(r"`(\w+)`", page.read_text())}
    assert MODELS.keys() <= models


def test_every_test_that_a_page_names_is_there() -> None:
    tests = {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert name in tests, (page.name, name)


def test_every_kept_result_is_quoted_by_a_page_and_every_quoted_one_is_kept() -> None:
    quoted = {
        name
        for page in DOCS.rglob("*.md")
        for name in re.findall(r"bench/results/([\w.-]+\.json)", page.read_text())
    }
    assert quoted == {path.name for path in (ROOT / "bench" / "results").iterdir()}


def test_every_make_target_that_a_page_names_is_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        named = re.findall(r"(?:^|`)make ([a-z][\w-]*)", page.read_text(), re.M)
        assert set(named) <= targets, (page.name, named)


def test_workflows_and_templates_are_valid() -> None:
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
    assert len(workflows) >= 3
    assert len(forms) >= 2
    for schema, files in (("github-workflows", workflows), ("github-issue-forms", forms)):
        command = ["check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
        run = subprocess.run(
            [sys.executable, "-m", *command, *map(str, files)], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout + run.stderr


def test_pre_commit_and_the_workflows_run_what_make_lint_runs() -> None:
    (recipe,) = re.findall(r"^lint: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    commands = {line.strip().removeprefix("$(BIN)/") for line in recipe.strip().splitlines()}
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = {
        hook["entry"].removeprefix(".venv/bin/").replace(" --force-exclude", "") for hook in hooks
    }
    assert {command.removesuffix(" .") for command in commands} == entries
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    run = [step.get("run") for job in jobs.values() for step in job["steps"]]
    assert {"make lint", "make test", "mkdocs build --strict"} <= set(run)


def test_every_page_is_in_the_navigation() -> None:
    def files(part: object) -> list[str]:
        if isinstance(part, str):
            return [part]
        parts = part.values() if isinstance(part, dict) else part
        return [name for one in parts for name in files(one)]  # type: ignore[attr-defined]

    text = (ROOT / "mkdocs.yml").read_text()
    nav = yaml.safe_load(text[text.index("nav:") :])["nav"]
    assert sorted(files(nav)) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


@pytest.mark.slow
def test_the_docs_are_built_without_a_warning(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "serving" / "index.html").exists()
    page = (tmp_path / "deploy" / "index.html").read_text()
    assert "docker compose" in re.sub(r"<[^>]*>", "", page)
    loads = re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"(https?://[^\"]+)", page)
    assert not [url for url in loads if "scissor-vllm.github.io" not in url]
