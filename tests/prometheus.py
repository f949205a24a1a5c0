"""A real Prometheus for tests: from the ``PATH``, or from Debian's package.

The package is unpacked under ``$XDG_CACHE_HOME/scissor_vllm``, without root and without
installation.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[1]


DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "scissor-vllm.json"
CONFIG = DEPLOY / "prometheus" / "prometheus.yml"

PACKAGE = "prometheus"
DOWNLOAD_SECONDS = 300
START_SECONDS = 60
SCRAPE_SECONDS = 1
NUM_STEPS = 120
"""Number of points of a line."""


class PrometheusError(Exception):
    """Prometheus is missing or does not answer."""


# --- a Prometheus ---------------------------------------------------------------------------------


def find_prometheus(program: str = "prometheus") -> Path:
    """Return the path of "prometheus" or "promtool", downloaded if it is missing.

    Raises:
        PrometheusError: the program is missing and could not be downloaded.
    """
    if path := present_prometheus(program):
        return path
    root = _cache()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        programs = _download(Path(folder))
        for path in (programs / "prometheus", programs / "promtool"):
            path.replace(root / path.name)
    return root / program


def present_prometheus(program: str) -> Path | None:
    """Return the path of a program that needs no download, None without one."""
    if path := shutil.which(program):
        return Path(path)
    kept = _cache() / program
    return kept if kept.exists() else None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scissor_vllm"


def _download(folder: Path) -> Path:
    """Return the folder of the programs of Debian's package, unpacked into a folder."""
    for tool in ("apt-get", "dpkg"):
        if not shutil.which(tool):
            raise PrometheusError(
                f"no prometheus in the PATH, and no {tool} to get Debian's package: install "
                "Prometheus from https://prometheus.io/download"
            )
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    apt_options = ("-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={folder}")
    # Most images have no lists of apt. They are fetched into a folder beside the system's.
    attempts: tuple[Sequence[Sequence[str]], ...] = (
        [("apt-get", "download", PACKAGE)],
        [("apt-get", *apt_options, "update"), ("apt-get", *apt_options, "download", PACKAGE)],
    )
    for commands in attempts:
        runs = [_run(command, folder) for command in commands]
        package = next(folder.glob(f"{PACKAGE}_*.deb"), None)
        if package is not None:
            _run(("dpkg", "-x", str(package), str(folder)), folder)
            return folder / "usr" / "bin"
    raise PrometheusError(
        f"no prometheus in the PATH, and apt-get could not download Debian's: {runs[-1].strip()}"
    )


def _run(command: Sequence[str], folder: Path) -> str:
    """Return a command's error message."""
    try:
        run = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]} took longer than {DOWNLOAD_SECONDS} s"
    return run.stderr


@contextmanager
def scraping(program: Path, base_url: str) -> Iterator[str]:
    """Yield the URL of a Prometheus that scrapes a server with the configuration of ``deploy/``.

    Raises:
        PrometheusError: it does not start.
    """
    config = yaml.safe_load(CONFIG.read_text())
    config["global"]["scrape_interval"] = f"{SCRAPE_SECONDS}s"
    del config["rule_files"]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [urllib.parse.urlsplit(base_url).netloc]}]
    with socket.socket() as free, tempfile.TemporaryDirectory() as name:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        folder = Path(name)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        log = folder / "log"
        command = [
            str(program),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, f"http://{address}", log)
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(30)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise PrometheusError(f"Prometheus did not start:\n{log.read_text()[-2000:]}")


# --- queries --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One series of a panel."""

    legend: str
    labels: dict[str, str]
    times: list[float]
    """Seconds since the epoch."""
    values: list[float]
    """NaN where a quotient has no denominator."""


@dataclass(frozen=True)
class Span:
    """The time range of a query."""

    start: float
    end: float

    @property
    def step(self) -> float:
        """Seconds between two points."""
        return max(SCRAPE_SECONDS, (self.end - self.start) / NUM_STEPS)

    def filled(self, query: str) -> str:
        """Return a query with Grafana's variables replaced: all models and instances."""
        rate = max(4 * SCRAPE_SECONDS, self.step + SCRAPE_SECONDS, (self.end - self.start) / 10)
        query = query.replace("$__rate_interval", f"{rate:.0f}s")
        query = query.replace("$model", ".*").replace("$instance", ".+")
        return query.replace("$__range", f"{self.end - self.start:.0f}s")


def load_panels() -> list[dict[str, Any]]:
    """Return the dashboard's panels, rows included."""
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return panels


def ask(url: str, panel: dict[str, Any], span: Span) -> list[Line]:
    """Return Prometheus' answers to a panel's queries.

    Raises:
        PrometheusError: Prometheus refuses a query.
    """
    return [line for target in panel.get("targets", ()) for line in ask_target(url, target, span)]


def ask_target(url: str, target: dict[str, Any], span: Span) -> list[Line]:
    """Return the answer to one query: over the range, or at its end for an instant query."""
    query = span.filled(target["expr"])
    if target.get("instant"):
        series = _get(url, "query", query=query, time=span.end)
        answers = [(one_series["metric"], [one_series["value"]]) for one_series in series]
    else:
        times = {"start": span.start, "end": span.end, "step": span.step}
        series = _get(url, "query_range", query=query, **times)
        answers = [(one_series["metric"], one_series["values"]) for one_series in series]
    return [
        Line(
            legend=_filled_in(target["legendFormat"], labels),
            labels=labels,
            times=[float(when) for when, _ in points],
            values=[float(value) for _, value in points],
        )
        for labels, points in answers
    ]


def _filled_in(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda name: labels.get(name[1], ""), legend)


def _get(url: str, route: str, **parameters: object) -> list[dict[str, Any]]:
    address = f"{url}/api/v1/{route}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(address, timeout=30) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        message = error.read().decode()
        raise PrometheusError(f"{parameters['query']}: {message}") from error
    except OSError as error:
        raise PrometheusError(f"Prometheus at {url} does not answer: {error}") from error
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


def buckets(lines: list[Line]) -> tuple[list[str], list[float]]:
    """Return a histogram's buckets that are not empty, with the count of each alone."""
    ordered = sorted(lines, key=lambda line: float(line.labels["le"]))
    totals = [0.0, *(line.values[-1] for line in ordered)]
    counts = [after - before for before, after in pairwise(totals)]
    held = [(line.legend, count) for line, count in zip(ordered, counts, strict=True) if count > 0]
    return [name for name, _ in held], [count for _, count in held]
