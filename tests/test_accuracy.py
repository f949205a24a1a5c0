"""Questions are asked and scored as documented, and no answer is lost or miscounted."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.accuracy import servers
from bench.accuracy.benchmarks import videomme
from bench.accuracy.command import main
from bench.accuracy.plot import panels
from bench.accuracy.questions import HarnessError, Question, read_questions, write_questions
from bench.accuracy.results import read_results
from bench.accuracy.scoring import choose, is_correct, normalize
from bench.accuracy.statistics import Bootstrap, mcnemar, wilson
from bench.accuracy.summary import OVERALL, Summary
from bench.accuracy.table import markdown
from scissor_vllm.loadtest.plot import read_accuracy
from scissor_vllm.settings import DEFAULT_VIDEO_COMPRESSION
from tests.fake_vllm import FakeServer, fake_server

ROOT = Path(__file__).parent.parent
CLIP = ROOT / "scissor_vllm" / "demo" / "clip.mp4"
SKILLS = ("count", "color")
NUM_PER_SKILL = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six questions of each of two skills: a free answer, and a choice; a video each."""
    made = tmp_path / "clips"
    made.mkdir()
    questions = []
    for number in range(2 * NUM_PER_SKILL):
        video = made / f"{number:02}.mp4"
        video.write_bytes(CLIP.read_bytes() + bytes([number]))
        free = number < NUM_PER_SKILL
        questions.append(
            Question(
                id=f"q{number}",
                video=Path(video.name),
                skill=SKILLS[not free],
                text=f"{number}: how many?" if free else f"{number}: which? A red B blue",
                answer="3" if free else "B",
                choices=() if free else ("red", "blue"),
                seed=number,
            )
        )
    write_questions(made, questions)
    return made


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return tmp_path / "out" / "result.json"


@pytest.fixture
def run(folder: Path, result: Path) -> Callable[..., int]:
    """Runs ``python -m bench.accuracy run``."""

    def start(fake: FakeServer, *arguments: str) -> int:
        where = ["--base-url", fake.base_url, "--questions", str(folder), "--output", str(result)]
        return main(["run", *where, *arguments])

    return start


def right(body: dict[str, Any]) -> str:
    """Answer every question correctly."""
    return "three." if "many" in asked(body) else "(B) blue"


def right_above(ratio: float) -> Callable[[dict[str, Any]], str]:
    """Answer all questions correctly from a ratio on, below it only those with even numbers."""

    def answer(body: dict[str, Any]) -> str:
        even = int(asked(body).split(":")[0]) % 2 == 0
        return right(body) if even or body["retention_ratio"] >= ratio else "none"

    return answer


def asked(body: dict[str, Any]) -> str:
    text: str = body["messages"][0]["content"][1]["text"]
    return text


# Scoring


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Red.", "red"),
        ("the red", "red"),
        ("Two", "2"),
        ("12", "twelve"),
        (" top-left ", "top left"),
        ("A", "a"),
        ("don't know", "dont know"),
    ],
)
def test_a_free_answer_is_its_words(answer: str, expected: str) -> None:
    assert is_correct(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"), [("red ball", "red"), ("", "red"), ("21", "1"), ("blue red", "red")]
)
def test_a_free_answer_with_other_words_is_wrong(answer: str, expected: str) -> None:
    assert not is_correct(answer, expected)


COLORS = ("red", "a dark blue car", "dark blue", "green")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. red", "B"),
        ("B) a dark blue car", "B"),
        ("**C**", "C"),
        ("Answer: B", "B"),
        ("The answer is D", "D"),
        ("The correct answer is (D) green.", "D"),
        ("Best option: (C)", "C"),
        ("Option C", "C"),
        ("I think it is B", "B"),
        ("B, because it is blue", "B"),
        ("C\nIt is dark.", "C"),
        ("red", "A"),
        ("The red.", "A"),
        ("A red one", "A"),
        ("dark blue", "C"),
        ("It is dark blue", "C"),
        ("It is a dark blue car", "B"),
    ],
)
def test_a_letter_is_found_however_it_is_written(answer: str, letter: str) -> None:
    assert choose(answer, COLORS) == letter


@pytest.mark.parametrize(
    "answer", ["", "E", "A or B", "A, B", "red or green", "a car", "(A) or (B)", "no idea"]
)
def test_an_answer_that_names_no_choice_or_several_is_none(answer: str) -> None:
    assert choose(answer, COLORS) is None


def test_a_letter_that_is_a_choice_of_its_own_is_the_letter_of_the_option() -> None:
    assert choose("B", ("K", "A", "B", "C")) == "B"
    assert choose("7", ("3", "7")) == "B"
    assert choose("seven", ("3", "7")) == "B"


@given(st.sampled_from("ABCD"), st.sampled_from(["{}", "({})", "{}.", "{}:", "Answer: {}", "{})"]))
def test_every_letter_is_read_in_every_form(letter: str, form: str) -> None:
    assert choose(form.format(letter), COLORS) == letter


@given(st.text())
def test_any_text_can_be_scored(text: str) -> None:
    assert choose(text, COLORS) in {*"ABCD", None}
    assert normalize(normalize(text)) == normalize(text)


# Statistics


def test_wilson_is_the_published_interval() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    interval = wilson(81, 263)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)
    interval = wilson(0, 20)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.0, 0.1611)
    assert wilson(20, 20).low < 1.0 == wilson(20, 20).high
    assert math.isnan(wilson(0, 0).value)


def test_mcnemar_is_the_two_sided_binomial_test() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(10, 0) == mcnemar(0, 10) == 2 / 2**10
    assert mcnemar(1, 7) == pytest.approx(2 * 9 / 2**8)
    assert 0 <= mcnemar(2000, 1000) < 1e-50


def test_skills_weigh_the_same_however_many_questions_they_have() -> None:
    skills = ["a"] * 90 + ["b"] * 10
    correct = np.array([1.0] * 90 + [0.0] * 10)
    assert Bootstrap(range(100), skills).mean(correct).value == 0.5


def test_an_interval_is_as_wide_as_the_spread_of_sets_like_it() -> None:
    rng = np.random.default_rng(0)
    skills = ["a"] * 100 + ["b"] * 50
    chance = np.array([0.9] * 100 + [0.6] * 50)
    bootstrap = Bootstrap(range(150), skills, num_resamples=4000)
    covered = 0
    for _ in range(200):
        drawn = bootstrap.mean((rng.random(150) < chance).astype(float))
        covered += drawn.low <= 0.75 <= drawn.high
    assert 0.90 <= covered / 200 <= 0.99


def test_the_bootstrap_resamples_videos_with_all_of_their_questions() -> None:
    correct = np.tile([1.0, 0.0], 40).repeat(5)
    together = Bootstrap(np.arange(80).repeat(5).tolist(), ["a"] * 400).mean(correct)
    alone = Bootstrap(range(400), ["a"] * 400).mean(correct)
    assert together.high - together.low == pytest.approx(5**0.5 * (alone.high - alone.low), rel=0.1)


def test_videos_with_several_skills_are_drawn_among_themselves() -> None:
    videos = np.arange(60).repeat(2).tolist()
    skills = ["a", "b"] * 60
    correct = np.array([float(video % 3 == 0) for video in videos])
    mean = Bootstrap(videos, skills).mean(correct)
    assert mean.value == pytest.approx(1 / 3)
    expected = 2 * 1.96 * (1 / 3 * 2 / 3 / 60) ** 0.5
    assert mean.high - mean.low == pytest.approx(expected, rel=0.15)


def test_a_paired_difference_has_a_narrower_interval_than_two_means() -> None:
    rng = np.random.default_rng(1)
    first = (rng.random(300) < 0.5).astype(float)
    second = first.copy()
    second[first.nonzero()[0][:9]] = 0.0
    bootstrap = Bootstrap(range(300), ["a"] * 300)
    difference = bootstrap.difference(first, second)
    assert difference.value == pytest.approx(0.03)
    assert 0 < difference.low < difference.high < 0.06
    assert bootstrap.mean(first).low < bootstrap.mean(second).high
    assert bootstrap.ratio(second, first).high < 1


def test_the_same_seed_gives_the_same_interval() -> None:
    correct, skills = np.array([1.0, 0.0] * 30), ["a"] * 20 + ["b"] * 40
    intervals = [
        Bootstrap(range(60), skills, num_resamples=100, seed=seed).mean(correct)
        for seed in (0, 0, 1)
    ]
    assert intervals[0] == intervals[1] != intervals[2]


def test_unanswered_questions_are_in_no_mean() -> None:
    correct = np.array([1.0, math.nan, 0.0, math.nan])
    bootstrap = Bootstrap(range(4), ["a", "a", "a", "b"])
    assert bootstrap.mean(correct).value == 0.5
    assert math.isnan(bootstrap.mean(np.full(4, math.nan)).value)


# Questions


def test_questions_about_one_video_are_side_by_side(tmp_path: Path) -> None:
    order = ["x", "y", "x", "z", "y"]
    questions = [Question(f"{n}", Path(f"{v}.mp4"), "s", "t", "a") for n, v in enumerate(order)]
    write_questions(tmp_path, questions)
    assert [q.video.stem for q in read_questions(tmp_path)] == ["x", "x", "y", "y", "z"]


def test_so_many_questions_of_each_skill_are_taken(folder: Path) -> None:
    taken = read_questions(folder, num_per_skill=2)
    assert Counter(question.skill for question in taken) == dict.fromkeys(SKILLS, 2)


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ([], "got no question"),
        (["{"], "questions.jsonl:1 must be a JSON object"),
        (['{"id": "1", "video": "a", "skill": "s", "text": "t"}'], "KeyError"),
        (['{"id": "1", "video": "a", "skill": "s", "text": "t", "answer": "b"}'] * 2, "twice"),
        (
            [
                '{"id": "1", "video": "a", "skill": "s", "text": "t", "answer": "C", '
                '"choices": ["x", "y"]}'
            ],
            "must be a letter of AB, got 'C'",
        ),
    ],
)
def test_a_file_that_holds_no_questions_is_named(
    tmp_path: Path, lines: list[str], named: str
) -> None:
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    with pytest.raises(HarnessError, match=named):
        read_questions(tmp_path)


# Asking


def test_every_question_is_asked_at_every_ratio_and_recorded(
    run: Callable[..., int], result: Path, folder: Path
) -> None:
    with fake_server(answer=right_above(0.25), token_seconds=0.1) as fake:
        status = run(fake, "--retention-ratio", "1.0", "0.25", "0.1", "--concurrency", "3")
    assert status == 0
    assert fake.most_in_flight == 3
    assert Counter(fake.ratios) == dict.fromkeys((1.0, 0.25, 0.1), 12)
    assert len(set(fake.videos)) == 12
    assert all(body["temperature"] == 0 for body in fake.bodies)
    (measured,) = read_results(result).runs
    assert len(measured.answers) == 36
    answer = measured.answers["q1", 0.1]
    assert (answer.text, answer.correct, answer.error) == ("none", False, None)
    assert (answer.num_video_tokens, answer.num_retained_tokens) == (100, 10)
    assert answer.prompt_tokens == 30
    assert answer.seconds > 0
    content = json.loads(result.read_text())
    assert content["questions"]["items"][3]["expected"] == "3"
    assert content["questions"]["items"][3]["seed"] == 3
    assert content["runs"][0]["environment"]["num_cpus"] >= 1
    assert content["runs"][0]["settings"] == {"max_tokens": 16, "temperature": 0}
    assert sorted(path.name for path in result.parent.iterdir()) == ["result.csv", "result.json"]


def test_a_failed_request_is_retried_once_and_a_second_failure_is_reported_and_not_scored(
    run: Callable[..., int], result: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    num_tries: Counter[str] = Counter()

    def refuse(body: dict[str, Any]) -> str | None:
        number = asked(body).split(":")[0]
        num_tries[number] += 1
        return "too busy" if number == "2" or (number == "3" and num_tries[number] == 1) else None

    with fake_server(answer=right, refuse=refuse) as fake:
        status = run(fake, "--retention-ratio", "0.5")
    assert status == 1
    assert (num_tries["2"], num_tries["3"], num_tries["4"]) == (2, 2, 1)
    (measured,) = read_results(result).runs
    assert "too busy" in (measured.answers["q2", 0.5].error or "")
    assert measured.answers["q2", 0.5].correct is None
    assert measured.answers["q3", 0.5].correct
    shown = capsys.readouterr().out
    assert "1 of 12 questions have no answer" in shown
    cell = Summary([read_results(result)]).cell(DEFAULT_VIDEO_COMPRESSION, 0.5, "count")
    assert cell is not None
    assert (cell.num_answered, cell.num_failed, cell.accuracy.value) == (5, 1, 1.0)


def test_the_same_command_asks_only_what_is_missing(run: Callable[..., int], result: Path) -> None:
    def refuse(body: dict[str, Any]) -> str | None:
        return "gone" if asked(body).startswith("2:") else None

    with fake_server(answer=right, refuse=refuse) as fake:
        assert run(fake, "--retention-ratio", "0.5") == 1
    with fake_server(answer=right) as fake:
        assert run(fake, "--retention-ratio", "0.5", "1.0") == 0
        assert Counter(fake.ratios) == {0.5: 1, 1.0: 12}
    with fake_server(answer=right) as fake:
        assert run(fake, "--retention-ratio", "0.5", "1.0") == 0
        assert fake.bodies == []


def test_a_killed_run_loses_no_answer(run: Callable[..., int], result: Path) -> None:
    with fake_server(answer=right) as fake:
        run(fake, "--retention-ratio", "0.5")
    whole = read_results(result)
    # A kill leaves no answers in the file, and a journal whose last line is cut.
    answers = list(whole.runs[0].answers.values())
    whole.runs[0].answers = {}
    whole.save()
    for answer in answers[:5]:
        whole.add(whole.runs[0], answer)
    with whole.journal.open("a") as journal:
        journal.write('{"label": "scc", "id": "q')
    assert read_results(result).runs[0].answers == {a.key: a for a in answers[:5]}
    with fake_server(answer=right) as fake:
        assert run(fake, "--retention-ratio", "0.5") == 0
        assert len(fake.bodies) == 7
    assert not whole.journal.exists()
    assert read_results(result).runs[0].answers.keys() == {a.key for a in answers}


def test_a_label_is_not_mixed_with_other_settings_or_questions(
    run: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server(answer=right) as fake:
        assert run(fake, "--retention-ratio", "0.5") == 0
        assert run(fake, "--retention-ratio", "0.5", "--max-tokens", "4") == 1
        assert "max_tokens 16, this is 4" in capsys.readouterr().err
        assert run(fake, "--num-per-skill", "2") == 1
        assert "num_questions 12, these have 4" in capsys.readouterr().err
        lines = (folder / "questions.jsonl").read_text()
        (folder / "questions.jsonl").write_text(lines.replace("how many", "how  many"))
        assert run(fake, "--label", "other") == 1
        assert "fingerprint" in capsys.readouterr().err


def test_a_server_that_does_not_compress_is_refused(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server(compresses=False) as fake:
        assert run(fake) == 1
    assert "start it with `scissor-vllm serve`" in capsys.readouterr().err


def test_a_server_that_keeps_another_number_of_tokens_is_refused(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server(keep=lambda ratio: 60) as fake:
        assert run(fake, "--retention-ratio", "0.5") == 1
    assert "must keep 50 of 100 video tokens at ratio 0.5, it reports 60" in capsys.readouterr().err


def test_a_dead_server_ends_the_run_after_a_few_failures(
    run: Callable[..., int],
    result: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("bench.accuracy.client.GIVE_UP_AFTER", 3)
    monkeypatch.setattr("bench.accuracy.client.RETRY_SECONDS", 0)
    with fake_server(refuse=lambda body: "the engine is dead") as fake:
        assert run(fake, "--concurrency", "1") == 1
        assert len(fake.bodies) == 6
    assert "3 requests in a row failed" in capsys.readouterr().err
    assert len(read_results(result).runs[0].answers) == 3


def test_a_large_video_is_refused_with_the_way_to_send_it(
    run: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server(answer=right) as fake:
        assert run(fake, "--max-video-mb", "0.001") == 1
        assert "--allowed-local-media-path FOLDER and give --local-media" in capsys.readouterr().err
        assert fake.bodies == []
        assert run(fake, "--max-video-mb", "0.001", "--local-media", "--num-per-skill", "1") == 0
    assert set(fake.videos) == {(folder / name).as_uri() for name in ("00.mp4", "06.mp4")}


def test_the_command_line_runs(folder: Path, result: Path) -> None:
    with fake_server(answer=right) as fake:
        where = ["--base-url", fake.base_url, "--questions", str(folder), "--output", str(result)]
        done = subprocess.run(
            [sys.executable, "-m", "bench.accuracy", "run", *where, "--retention-ratio", "0.5"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert "12/12" in done.stderr
    assert f"| {DEFAULT_VIDEO_COMPRESSION} |" in done.stdout


# Methods in turn

FAKE_SERVE = """
import sys, time
sys.path.insert(0, {root!r})
from tests.fake_vllm import fake_server
method = sys.argv[sys.argv.index("--video-compression") + 1]
def answer(body):
    text = body["messages"][0]["content"][1]["text"]
    if method != "scc" and body["retention_ratio"] < 0.5 and int(text.split(":")[0]) % 2:
        return "none"
    return "3" if "many" in text else "B"
open({started!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
if method == "random" and "--refuse" in sys.argv:
    sys.exit("no such method")
with fake_server(port=int(sys.argv[sys.argv.index("--port") + 1]), answer=answer):
    time.sleep(600)
"""


@pytest.fixture
def fake_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces ``scissor-vllm serve``; returns the file with the commands that were started."""
    started, script = tmp_path / "started", tmp_path / "serve.py"
    script.write_text(FAKE_SERVE.format(root=str(ROOT), started=str(started)))
    monkeypatch.setattr(servers, "SERVE", (sys.executable, str(script)))
    return started


def test_methods_are_served_in_turn_compared_and_not_measured_again(
    fake_serve: Path, folder: Path, result: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--questions",
        str(folder),
        "--output",
        str(result),
        "--retention-ratio",
        "1",
        ".1",
    ]
    arguments += ["--methods", "scc", "uniform", "random", "--local-media"]
    assert main(["methods", "--model", "m", *arguments, "--", "--refuse"]) == 1
    told = capsys.readouterr()
    assert "random ended after" in told.err
    assert "no such method" in told.err
    assert "scc is ahead of uniform by more than the interval at every ratio" in told.out
    assert [run.label for run in read_results(result).runs] == ["scc", "uniform"]
    started = fake_serve.read_text().splitlines()
    assert [line.split()[:3] for line in started] == [
        ["m", "--video-compression", method] for method in ("scc", "uniform", "random")
    ]
    assert all(f"--refuse --allowed-local-media-path {folder}" in line for line in started)
    fake_serve.unlink()
    arguments.remove("random")
    assert main(["methods", "--model", "m", *arguments]) == 0
    assert not fake_serve.exists()


def test_a_method_is_not_resumed_with_other_server_flags(
    fake_serve: Path, folder: Path, result: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--questions", str(folder), "--output", str(result), "--methods", "scc"]
    assert main(["methods", *arguments, "--retention-ratio", "1", "--", "--seed=1"]) == 0
    assert main(["methods", *arguments, "--retention-ratio", "0.1", "--", "--seed=2"]) == 1
    assert "serve_options ['--seed=1'], this is ['--seed=2']" in capsys.readouterr().err


# Tables, plots, summary


@pytest.fixture
def two_labels(run: Callable[..., int], result: Path) -> Path:
    """A result file in which `scc` is right from 0.1 on, and `uniform` from 0.5 on."""
    ratios = ("--retention-ratio", "1.0", "0.5", "0.1", "0.05")
    for label, ratio in (("uniform", 0.5), ("scc", 0.1)):
        with fake_server(answer=right_above(ratio)) as fake:
            assert run(fake, "--label", label, *ratios) == 0
    return result


def test_the_table_says_where_a_method_is_ahead_and_where_not(two_labels: Path) -> None:
    text = markdown(Summary([read_results(two_labels)]), "scc")
    assert "scc is NOT ahead of uniform by more than the interval at 0.5 (+0.0" in text
    assert "0.05 (+0.0" in text
    assert "; 6, 0; p 0.031" in text
    assert "| uniform | 100.0 (100.0 to 100.0)" in text


def test_relative_accuracy_is_relative_to_the_same_label_at_ratio_one(two_labels: Path) -> None:
    summary = Summary([read_results(two_labels)])
    relatives = {
        (label, ratio): cell.relative.value
        for label in summary.labels
        for ratio in summary.ratios
        if (cell := summary.cell(label, ratio)) and cell.relative
    }
    assert relatives["uniform", 0.5] == relatives["scc", 0.1] == 1.0
    assert relatives["uniform", 0.1] == relatives["scc", 0.05] == 0.5


def test_common_questions_are_those_that_all_answered_at_all_of_their_ratios(
    two_labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(two_labels.read_text())
    uniform, scc = (run["answers"]["rows"] for run in content["runs"])
    first, second = (item["id"] for item in content["questions"]["items"][:2])
    scc.remove(next(row for row in scc if row[:2] == [first, 0.05]))
    uniform[:] = [row for row in uniform if row[0] != second]
    two_labels.write_text(json.dumps(content))
    counts = {}
    for flags in ((), ("--common",)):
        capsys.readouterr()
        assert main(["table", str(two_labels), "--csv", *flags]) == 0
        rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
        counts[flags] = {row["num_questions"] for row in rows if row["skill"] == OVERALL}
    assert counts == {(): {"12"}, ("--common",): {"10"}}
    scc.clear()
    scc.append(uniform[0])
    uniform[:] = [row for row in uniform if row[0] != first]
    two_labels.write_text(json.dumps(content))
    assert main(["table", str(two_labels), "--common"]) == 1
    assert "no question was answered by all of uniform, scc" in capsys.readouterr().err


def test_the_csv_has_every_cell(two_labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["table", str(two_labels), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 2 * 4 * 3
    row = next(
        row
        for row in rows
        if (row["label"], row["retention_ratio"], row["skill"]) == ("uniform", "0.1", "count")
    )
    assert (row["num_correct"], row["accuracy"], row["retained_tokens"]) == ("3", "0.5", "10.0")
    assert float(row["accuracy_low"]) == pytest.approx(wilson(3, 6).low, abs=1e-6)


def test_the_summary_is_what_the_load_tests_plot_reads(two_labels: Path, tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    assert main(["summary", str(two_labels), "--output", str(path)]) == 0
    entries = read_accuracy(path)
    assert len(entries) == 8
    by_cell = {(e["method"], e["retention_ratio"]): e for e in entries}
    assert by_cell["scc", 0.1]["accuracy"] == 1.0
    assert by_cell["uniform", 0.1]["low"] < 0.5 < by_cell["uniform", 0.1]["high"]


def test_plots_have_a_panel_a_skill_and_a_line_a_label(
    two_labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", str(two_labels), "--output", str(tmp_path / "plots")]) == 0
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["accuracy-by-skill.png", "accuracy-overall.png"]
    figure = panels(Summary([read_results(two_labels)]), [OVERALL, *SKILLS])
    assert [axes.get_title() for axes in figure.axes] == ["mean over skills", *SKILLS]
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert lines.keys() == {"uniform", "scc", "commonest answer"}
        assert list(lines["scc"].get_xdata()) == [1.0, 0.5, 0.1, 0.05]
    scc = next(line for line in figure.axes[0].get_lines() if line.get_label() == "scc")
    assert list(scc.get_ydata()) == [1.0, 1.0, 1.0, 0.5]


def test_only_some_labels_are_shown(two_labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", str(two_labels), "--label", "scc"]) == 0
    entries = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {entry["method"] for entry in entries} == {"scc"}
    assert main(["table", str(two_labels), "--label", "best"]) == 1
    assert "--label must be of uniform, scc, got 'best'" in capsys.readouterr().err


def test_the_commonest_answer_is_counted_by_the_form_of_the_question(
    folder: Path, result: Path
) -> None:
    lines = (folder / "questions.jsonl").read_text().replace('"color"', '"count"')
    (folder / "questions.jsonl").write_text(lines)
    with fake_server(answer=right) as fake:
        where = ["--base-url", fake.base_url, "--questions", str(folder), "--output", str(result)]
        assert main(["run", *where, "--retention-ratio", "0.5"]) == 0
    # All free answers are 3 and all letters B, so constant answers are always right.
    assert Summary([read_results(result)]).commonest_share("count") == 1.0


def test_results_about_other_questions_do_not_compare(
    two_labels: Path, run: Callable[..., int], folder: Path, tmp_path: Path
) -> None:
    other_result = tmp_path / "other.json"
    with fake_server(answer=right) as fake:
        where = [
            "--base-url",
            fake.base_url,
            "--questions",
            str(folder),
            "--output",
            str(other_result),
        ]
        assert main(["run", *where, "--num-per-skill", "3", "--retention-ratio", "0.5"]) == 0
    with pytest.raises(HarnessError, match="only results about the same questions compare"):
        Summary([read_results(two_labels), read_results(other_result)])
    with pytest.raises(HarnessError, match="'uniform' twice"):
        Summary([read_results(two_labels)] * 2)


# Public benchmarks, in the form in which their authors publish them


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def video(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(CLIP.read_bytes())
    return path


def mvbench(folder: Path) -> tuple[Path, Path]:
    from bench.accuracy.benchmarks.mvbench import FOLDERS

    for task in FOLDERS:
        write(folder / "json" / f"{task}.json", [])
    whole = {
        "video": "v.mp4",
        "question": "What direction is the cyan sphere moving?",
        "candidates": ["Down.", "Up.", "Left."],
        "answer": "Up.",
    }
    part = {
        "video": "USNP1.mp4",
        "question": "Which object was taken by the person?",
        "candidates": ["The clothes.", "The pillow.", "The shoe.", "The phone/camera."],
        "answer": "The phone/camera.",
        "start": 1.2999999999999998,
        "end": 15.4,
    }
    write(folder / "json" / "moving_direction.json", [whole])
    write(folder / "json" / "object_interaction.json", [part])
    video(folder / "clevrer/video_validation/v.mp4")
    video(folder / "star/Charades_segment/USNP1_1.2999999999999998_15.4.mp4")
    return folder / "json", folder


def mlvu(folder: Path) -> tuple[Path, Path]:
    from bench.accuracy.benchmarks.mlvu import TASKS

    for task in TASKS:
        write(folder / "json" / f"{task}.json", [])
    plot = {
        "video": "movie101_66.mp4",
        "duration": 246,
        "question": "What color is the main male character in the video?",
        "candidates": ["Yellow", "Red", "Green", "Blue"],
        "answer": "Red",
        "question_type": "plotQA",
    }
    needle = {**plot, "video": "needle_32.mp4", "answer": "Blue", "question_type": "findNeedle"}
    write(folder / "json" / "1_plotQA.json", [plot])
    write(folder / "json" / "2_needle.json", [needle])
    video(folder / "video/1_plotQA/movie101_66.mp4")
    video(folder / "video/2_needle/needle_32.mp4")
    return folder / "json", folder / "video"


def egoschema(folder: Path) -> tuple[Path, Path]:
    uids = [
        "0074f737-11cb-497d-8d07-77c3a8127391",
        "00b9a0de-c59e-49cb-a127-6081e2fb8c8e",
        "001934bb-81bd-4cd8-a574-0472ef3f6678",
    ]
    questions = [
        {
            "q_uid": uid,
            "google_drive_id": "15yGB0TI5zG5usdQZOXn0CrRzkJNB0gMl",
            "question": "What is the overall task?",
            **{f"option {number}": f"C does thing {number}." for number in range(5)},
        }
        for uid in uids
    ]
    write(folder / "questions.json", questions)
    write(folder / "subset_answers.json", {uids[0]: 1, uids[1]: 3})
    for uid in uids[:2]:
        video(folder / "videos" / f"{uid}.mp4")
    return folder, folder / "videos"


def nextqa(folder: Path) -> tuple[Path, Path]:
    write(
        folder / "val.csv",
        "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
        "4010069381,369,640,480,how do the two man play the instrument,1,6,CH,roll the handle,"
        "tap their feet,strum the string,hit with sticks,pat with hand\n"
        "8547321641,327,640,362,how many babies are in the video,3,7,DC,"
        "kitchen,four,two,three,one\n",
    )
    write(folder / "map_vid_vidorID.json", {"4010069381": "1164/4010069381"})
    video(folder / "videos/1164/4010069381.mp4")
    video(folder / "videos/8547321641.mp4")
    return folder / "val.csv", folder / "videos"


VIDEOMME = [
    {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
        "videoID": "fFjv93ACGo8",
        "question_id": f"001-{number}",
        "task_type": "Counting Problem",
        "question": "How many porcelain jars were discovered?",
        "options": ["A. 4.", "B. 9.", "C. 5.", "D. 13."],
        "answer": answer,
    }
    for number, answer in ((1, "B"), (2, "D"))
]


def videomme_parquet(folder: Path) -> tuple[Path, Path]:
    pyarrow = pytest.importorskip("pyarrow", reason="Video-MME is a parquet file")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(VIDEOMME), folder / "test.parquet")
    video(folder / "data" / "fFjv93ACGo8.mp4")
    return folder / "test.parquet", folder / "data"


@pytest.mark.parametrize(
    ("benchmark", "publish", "skills", "first_letter"),
    [
        ("mvbench", mvbench, ["moving_direction", "object_interaction"], "B"),
        ("mlvu", mlvu, ["plotQA", "needle"], "B"),
        ("egoschema", egoschema, ["egoschema", "egoschema"], "B"),
        ("nextqa", nextqa, ["CH", "DC"], "B"),
        ("videomme", videomme_parquet, ["short", "short"], "B"),
    ],
)
def test_a_public_benchmark_is_read_asked_and_scored(
    tmp_path: Path,
    benchmark: str,
    publish: Callable[[Path], tuple[Path, Path]],
    skills: list[str],
    first_letter: str,
) -> None:
    published = tmp_path / "published"
    published.mkdir()
    annotations, videos = publish(published)
    converted, result = tmp_path / "converted", tmp_path / "result.json"
    where = ["--annotations", str(annotations), "--videos", str(videos)]
    assert main(["convert", benchmark, str(converted), *where]) == 0
    questions = read_questions(converted)
    assert [question.skill for question in questions] == skills
    with fake_server(answer=lambda body: first_letter) as fake:
        base = ["--base-url", fake.base_url, "--questions", str(converted)]
        assert main(["run", *base, "--output", str(result), "--retention-ratio", "0.1"]) == 0
        texts = {asked(body) for body in fake.bodies}
    assert texts == {question.text for question in questions}
    assert all(choice in q.text for q in questions for choice in q.choices)
    answers = read_results(result).runs[0].answers
    assert [answers[question.id, 0.1].correct for question in questions] == [True, False]


def test_video_mme_is_asked_as_its_authors_ask() -> None:
    first = videomme.from_rows(VIDEOMME, Path("data"))[0]
    assert first.text == (
        "Select the best answer to the following multiple-choice question based on the video. "
        "Respond with only the letter (A, B, C, or D) of the correct option.\n"
        "How many porcelain jars were discovered?\nA. 4.\nB. 9.\nC. 5.\nD. 13.\n"
        "The best answer is:"
    )
    assert first.choices == ("4.", "9.", "5.", "13.")
    assert first.video == Path("data/fFjv93ACGo8.mp4")


def test_missing_videos_are_told_by_skill_and_left_out_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, videos = mvbench(tmp_path / "published")
    (videos / "clevrer/video_validation/v.mp4").unlink()
    command = ["convert", "mvbench", str(tmp_path / "converted")]
    command += ["--annotations", str(annotations), "--videos", str(videos)]
    assert main(command) == 1
    assert "1 of 2 questions lack their video: 1 of moving_direction" in capsys.readouterr().err
    assert main([*command, "--skip-missing"]) == 0
    assert len(read_questions(tmp_path / "converted")) == 1


@pytest.mark.parametrize(
    ("benchmark", "source"),
    [
        ("mvbench", "OpenGVLab/MVBench"),
        ("mlvu", "MLVU/MVLU"),
        ("egoschema", "github.com/egoschema/EgoSchema"),
        ("nextqa", "github.com/doc-doc/NExT-QA"),
    ],
)
def test_annotations_that_are_not_there_are_named_with_their_source(
    tmp_path: Path, benchmark: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--annotations", str(tmp_path / "none"), "--videos", str(tmp_path)]
    assert main(["convert", benchmark, str(tmp_path / "converted"), *where]) == 1
    assert source in capsys.readouterr().err
