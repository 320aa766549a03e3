"""What the doctor finds and says: cards, the machine, the server; every finding that is not ok has a remedy."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from fake_gateway import INVITE, FakeGateway, serve

from rankup import signing
from rankup.errors import DeniedError, SetupError, UnreachableError
from rankup.finding import Finding, Grade
from rankup.protocol import Enrolled, RoundState, RoundView, Standing
from rankup.recipe import Recipe
from rankup.settings import WorkerSettings
from worker import cards, doctor, identity, links, machine_probe, server_probe
from worker.cards import Card, TorchBuild, verdict_on_cards
from worker.limits import Limits, Readings
from worker.links import Links

GIB = 1024**3
RTX = Card("NVIDIA GeForce RTX 3060", 12 * GIB, 11 * GIB, "580.95.05", (8, 6))
PASCAL = Card("NVIDIA GeForce GTX 1080", 8 * GIB, 8 * GIB, "580.95.05", (6, 1))
CU130, CU126, CPU = TorchBuild("2.13.0+cu130", (13, 0)), TorchBuild("2.13.0+cu126", (12, 6)), TorchBuild("2.13.0+cpu")
NOW = datetime(2026, 5, 4, 12, 0).astimezone()

# -- cards -------------------------------------------------------------------------------------------------------------

VERDICTS: dict[str, tuple[tuple[object, ...], Grade, str]] = {
    "a card, its driver and torch fit": (("auto", [RTX], 0, CU130, (13, 0), 1), Grade.OK, "RTX 3060, 12.0 GiB (11.0"),
    "a newer driver": (("auto", [RTX], 0, CU126, (13, 0), 1), Grade.OK, "torch 2.13.0+cu126"),
    "an older driver of the same CUDA": (("auto", [RTX], 0, CU126, (12, 2), 1), Grade.OK, "CUDA up to 12.2"),
    "a driver that is too old": (("auto", [RTX], 0, CU130, (12, 8), 1), Grade.FAIL, "needs a driver for CUDA 13"),
    "a card that CUDA 13 has dropped": (("auto", [PASCAL], 0, CU130, (13, 0), 1), Grade.FAIL, "capability 6.1"),
    "and that CUDA 12 has not": (("auto", [PASCAL], 0, CU126, (13, 0), 1), Grade.OK, "GTX 1080"),
    "the other card": (("cuda:1", [PASCAL, RTX], 1, CU130, (13, 0), 2), Grade.OK, "1: NVIDIA GeForce RTX 3060"),
    "torch without CUDA": (("auto", [RTX], 0, CPU, (13, 0), 1), Grade.WARN, "it would train on the processor"),
    "torch without CUDA, but the card is asked for": (("cuda", [RTX], 0, CPU, (13, 0), 1), Grade.FAIL, "without CUDA"),
    "no torch": (("auto", [RTX], 0, None, (13, 0), 1), Grade.OK, "RTX 3060"),
    "a driver that does not tell": (("auto", [RTX], 0, CU130, None, 1), Grade.OK, "RTX 3060"),
    "no card": (("auto", [], 0, CPU, None, 0), Grade.OK, "no NVIDIA card"),
    "another maker's": (("auto", [], 0, TorchBuild("2.13.0", None, "ROCm"), None, 0), Grade.OK, "built for ROCm"),
    "a card without a driver": (("auto", [], 0, CPU, None, 1), Grade.WARN, "driver does not answer"),
    "a card without a driver that is asked for": (("cuda", [], 0, CPU, None, 1), Grade.FAIL, "driver does not answer"),
    "no card, but one is asked for": (("cuda", [], 0, CPU, None, 0), Grade.FAIL, "no card"),
    "a number too high": (("cuda:2", [RTX], 2, CU130, (13, 0), 1), Grade.FAIL, "there are 1 cards"),
    "the processor is asked for": (("cpu", [RTX], 0, CPU, (13, 0), 1), Grade.OK, "not used"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_a_card_its_driver_and_torch_are_judged_together(name: str) -> None:
    arguments, grade, words = VERDICTS[name]
    finding = verdict_on_cards(*arguments)  # type: ignore[arg-type]
    assert (finding.grade, words in finding.found) == (grade, True), finding
    assert bool(finding.remedy) == (grade is not Grade.OK)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("NVIDIA GeForce RTX 3060, 12288, 11264, 580.95.05, 8.6\n", [RTX]),
        ("NVIDIA GeForce RTX 3060, 12288, 11264, 580.95.05\n", [Card(RTX.name, 12 * GIB, 11 * GIB, RTX.driver)]),
        ("H100, 80GB HBM3, 81920, [N/A], 570.1, 9.0\n", [Card("H100, 80GB HBM3", 80 * GIB, None, "570.1", (9, 0))]),
        ("Unable to determine the device handle\n", []),
        ("A, B, C, D, E\n", []),
        ("", []),
    ],
)
def test_what_nvidia_smi_says_of_cards_is_read(text: str, found: list[Card]) -> None:
    assert cards.parse_cards(text) == found


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", CU130),
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", CPU),
        ("__version__ = '2.4.0'\ncuda = None\nhip = '6.1'\n", TorchBuild("2.4.0", None, "ROCm")),
        ("cuda = '13.0'\n", None),
        ("", None),
    ],
)
def test_what_torch_was_built_for_is_read_without_importing_it(text: str, build: TorchBuild | None) -> None:
    assert cards.parse_torch_version(text) == build


def test_the_installed_torch_says_what_it_was_built_for() -> None:
    import importlib.metadata

    found = cards.torch_build()
    assert found is not None
    assert found.version.partition("+")[0] == importlib.metadata.version("torch").partition("+")[0]


def test_cards_on_the_bus_are_counted_and_other_devices_are_not(tmp_path: Path) -> None:
    for name, vendor, kind in (("a", "0x10de", "0x030000"), ("b", "0x10de", "0x040300"), ("c", "0x8086", "0x030000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    (tmp_path / "gone").mkdir()
    assert (cards.silent_cards(tmp_path), cards.silent_cards(tmp_path / "none")) == (1, 0)


# -- the machine -------------------------------------------------------------------------------------------------------

FINDINGS: dict[str, tuple[Callable[[], Finding | None], Grade, str]] = {
    "libraries": (lambda: machine_probe.python_finding([], {"trl": "1.16"}, {}), Grade.OK, "trl 1.16"),
    "libraries missing": (lambda: machine_probe.python_finding(["peft", "trl"], {}, {}), Grade.FAIL, "peft, trl"),
    "extras missing": (lambda: machine_probe.python_finding([], {}, {"psutil": "battery"}), Grade.OK, "no battery"),
    "memory": (lambda: machine_probe.memory_finding(16 * GIB, 9 * GIB), Grade.OK, "16.0 GiB, 9.0 free"),
    "little memory": (lambda: machine_probe.memory_finding(3 * GIB, None), Grade.WARN, "3.0 GiB"),
    "unknown memory": (lambda: machine_probe.memory_finding(0, None), Grade.WARN, "cannot be read"),
    "threads": (lambda: machine_probe.threads_finding(0, 8, 10), Grade.OK, "8 of 8, niceness 10"),
    "too many threads": (lambda: machine_probe.threads_finding(9, 8, 10), Grade.WARN, "9 of 8"),
    "disk": (lambda: machine_probe.disk_finding(90 * GIB, 50 * GIB, Path("/x"), writable=True), Grade.OK, "90.0 GiB"),
    "little disk": (
        lambda: machine_probe.disk_finding(4 * GIB, 50 * GIB, Path("/x"), writable=True),
        Grade.WARN,
        "4.0 GiB free",
    ),
    "no disk": (lambda: machine_probe.disk_finding(GIB // 4, GIB, Path("/x"), writable=True), Grade.FAIL, "0.2 GiB"),
    "somebody else's disk": (
        lambda: machine_probe.disk_finding(90 * GIB, GIB, Path("/x"), writable=False),
        Grade.FAIL,
        "cannot be written",
    ),
    "mains": (lambda: machine_probe.power_finding(False, allowed=False), Grade.OK, "plugged in"),
    "battery": (lambda: machine_probe.power_finding(True, allowed=False), Grade.WARN, "on its battery"),
    "battery, allowed": (lambda: machine_probe.power_finding(True, allowed=True), Grade.OK, "you allow"),
    "no battery": (lambda: machine_probe.power_finding(None, allowed=False), Grade.OK, "no battery"),
    "free to work": (
        lambda: machine_probe.limits_finding(Limits(nice=3), Readings(NOW, unread=("no idle",)), None, None),
        Grade.OK,
        "it may work now (nice); no idle",
    ),
    "paused": (
        lambda: machine_probe.limits_finding(Limits(), Readings(NOW), "steam is running", "steam is running"),
        Grade.WARN,
        "paused now: steam is running",
    ),
    "over its megabytes": (
        lambda: machine_probe.limits_finding(Limits(), Readings(NOW), None, "900 MB were transferred"),
        Grade.WARN,
        "no transfers now: 900 MB",
    ),
    "a processor": (lambda: machine_probe.device_finding("auto", "cpu", CPU), Grade.OK, "trains on the processor"),
    "another device": (lambda: machine_probe.device_finding("mps", "mps", CPU, "Linux"), Grade.FAIL, "mps was"),
    "an Apple": (lambda: machine_probe.device_finding("auto", "mps", CPU, "Darwin"), Grade.OK, "trains on mps"),
    "an XPU": (lambda: machine_probe.device_finding("xpu", "xpu", TorchBuild("2", None, "XPU")), Grade.OK, "xpu"),
    "a torch without XPU": (lambda: machine_probe.device_finding("xpu", "xpu", CPU), Grade.FAIL, "xpu was asked for"),
    "the server's time": (lambda: server_probe.clock_finding(1.0), Grade.OK, "as the server's"),
    "no time": (lambda: server_probe.clock_finding(None), Grade.OK, "does not tell"),
    "minutes apart": (lambda: server_probe.clock_finding(-301.0), Grade.WARN, "301 s ahead of"),
    "hours apart": (lambda: server_probe.clock_finding(4000.0), Grade.FAIL, "4000 s behind"),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_a_check_says_what_it_found_and_what_to_do(name: str) -> None:
    make, grade, words = FINDINGS[name]
    finding = make()
    assert finding is not None
    assert (finding.grade, words in finding.found) == (grade, True), finding
    assert bool(finding.remedy) == (grade is not Grade.OK)


def test_missing_libraries_are_named() -> None:
    assert machine_probe.missing_libraries(lambda name: None if name in ("trl", "peft") else object()) == [
        "peft",
        "trl",
    ]


def test_a_machine_alone_is_examined_in_a_moment_and_left_as_it_was(tmp_path: Path) -> None:
    home = tmp_path / "not yet there"
    began = time.process_time()
    found = doctor.examine(WorkerSettings(home=home, device="xpu"))
    assert time.process_time() - began < 1.0
    assert [finding.check for finding in found.failed] == ["device"]
    assert {"python", "graphics", "memory", "threads", "disk", "power", "limits"} < {f.check for f in found.findings}
    assert all(finding.remedy for finding in found.findings if finding.grade is not Grade.OK)
    assert not home.exists()


def test_limits_that_cannot_be_used_are_a_failure_with_the_line_to_mend(tmp_path: Path) -> None:
    (tmp_path / "limits.yaml").write_text("nise: 3\n")
    found = doctor.examine(WorkerSettings(home=tmp_path))
    assert [(finding.check, "nise" in finding.found) for finding in found.failed] == [("settings", True)]


# -- the server --------------------------------------------------------------------------------------------------------


def closed_port() -> str:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


def settle(home: Path, fake: FakeGateway, url: str) -> None:
    """As a worker that has joined before."""
    folder = identity.open_folder(home, url)
    key = signing.public_key_hex(identity.load_or_create_key(folder))
    fake.tokens["t"] = key
    given = Enrolled(worker_id=signing.worker_id_of(key), token="t", publisher_key=fake.publisher_key)
    identity.save_identity(folder, url, "ada", given)


def quiet(limits: Limits, *, gpu: bool, transferred_bytes: int) -> Readings:
    """A machine that nobody uses."""
    return Readings(NOW, idle_s=9e9, gpu=gpu, transferred_bytes=transferred_bytes)


def look(home: Path, url: str, *, joining: bool = True, invite: str = INVITE) -> dict[str, Finding]:
    found = doctor.examine(WorkerSettings(home=home, timeout_s=2.0), url, invite=invite, joining=joining, sense=quiet)
    return {finding.check: finding for finding in found.findings}


def test_a_stranger_is_told_what_joining_takes(tmp_path: Path) -> None:
    with serve(FakeGateway()) as fake:
        assert look(tmp_path, fake.url)["member"].found == "not joined yet, with an invite"
        assert look(tmp_path, fake.url, invite="")["member"].grade is Grade.FAIL
        assert look(tmp_path, fake.url, invite="", joining=False)["member"].grade is Grade.WARN


@pytest.mark.parametrize(
    ("standing", "grade", "words"),
    [
        (Standing.MEMBER, Grade.OK, "joined as ada"),
        (Standing.WAITING, Grade.WARN, "waits for approval"),
        (Standing.BANNED, Grade.FAIL, "banned"),
    ],
)
def test_a_member_is_told_what_the_organiser_says(tmp_path: Path, standing: Standing, grade: Grade, words: str) -> None:
    with serve(FakeGateway()) as fake:
        settle(tmp_path, fake, fake.url)
        fake.standing = standing
        found = look(tmp_path, fake.url)["member"]
        fake.forget_tokens()
        forgotten = look(tmp_path, fake.url)["member"]
    assert (found.grade, words in found.found) == (grade, True)
    assert (forgotten.grade, "will be replaced" in forgotten.found) == (Grade.OK, True)


def test_a_server_that_is_away_ends_a_first_visit_and_is_waited_for_by_a_member(tmp_path: Path) -> None:
    url = closed_port()
    assert look(tmp_path, url)["server"].grade is Grade.FAIL
    settle(tmp_path, FakeGateway(), url)
    found = look(tmp_path, url)["server"]
    assert (found.grade, "waits for it, up to 72 h" in found.found) == (Grade.WARN, True)
    assert look(tmp_path, url, joining=False)["server"].grade is Grade.FAIL


def test_a_link_is_measured_once_a_day_by_who_joins_and_each_time_by_who_asks(tmp_path: Path) -> None:
    with serve(FakeGateway()) as fake:
        first = look(tmp_path, fake.url)["links"].found
        once = len(fake.measured)
        again = look(tmp_path, fake.url)["links"].found
        assert once == len(fake.measured) > 0
        look(tmp_path, fake.url, joining=False)
        assert len(fake.measured) > once
    assert first.startswith("up ")
    assert again == f"{first} (measured 0 min ago)"
    assert sum(size for way, size in fake.measured[:once] if way == "up") <= 1.1 * 1024**2
    assert '"up":' in (tmp_path / "traffic.json").read_text()


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ("max_bytes_sec_up: 500000", "up 500 kB/s, down unknown (the limits that you set)"),
        ("daily_xfer_limit_mb: 0.000001", "not measured: no transfers now"),
    ],
)
def test_nothing_is_measured_where_the_limits_speak_against_it(tmp_path: Path, limits: str, words: str) -> None:
    (tmp_path / "limits.yaml").write_text(limits)
    (tmp_path / "traffic.json").write_text(f'{{"date":"{time.strftime("%Y-%m-%d")}","up":9,"down":9}}')
    with serve(FakeGateway()) as fake:
        assert look(tmp_path, fake.url)["links"].found == words
    assert fake.measured == []


def test_an_old_server_without_the_route_leaves_the_link_unknown_and_nothing_fails(tmp_path: Path) -> None:
    class Broken:
        def link_up(self, data: bytes) -> object:
            raise UnreachableError("no such route")

        def link_down(self, size_bytes: int) -> int:
            return size_bytes

    found = links.measure(Broken())  # type: ignore[arg-type]
    assert (found.up, found.trouble) == (None, "no such route")


@pytest.mark.parametrize(
    ("check", "error"), [("server", UnreachableError), ("member", DeniedError), ("disk", SetupError)]
)
def test_a_failure_ends_the_join_with_its_remedy(check: str, error: type[Exception]) -> None:
    found = doctor.Examination((Finding("memory", Grade.WARN, "w", "w"), Finding(check, Grade.FAIL, "why", "mend it")))
    with pytest.raises(error, match="why") as caught:
        found.require_fit()
    assert caught.value.remedy == "mend it"  # type: ignore[attr-defined]
    doctor.Examination(found.findings[:1]).require_fit()


def test_the_plan_is_for_a_round_that_is_open(tmp_path: Path) -> None:
    with serve(FakeGateway()) as fake:
        nothing = doctor.examine(WorkerSettings(home=tmp_path), fake.url, sense=quiet).plan
        fake.rounds = [open_round()]
        some = doctor.examine(WorkerSettings(home=tmp_path), fake.url, sense=quiet).plan
    assert nothing is not None
    assert (nothing.task, nothing.waits.startswith("no round is open")) == (None, True)
    assert some is not None
    assert some.task is not None
    assert some.task.round_id == "tiny-r0001-aaaaaa"
    assert "what the base costs is not known" in some.task.memory.trouble  # the fake serves no versions


def open_round() -> RoundView:
    return RoundView(
        round_id="tiny-r0001-aaaaaa",
        model="tiny",
        dataset="pydocs",
        state=RoundState.OPEN,
        index=0,
        repeat=1,
        base_version=0,
        base_manifest="3b" * 32,
        recipe=Recipe(rank=8),
        shards=3,
        quorum=3,
        min_contributions=1,
        deadline_at=time.time() + 86_400,
        opened_at=time.time(),
        free=3,
        lease_target_s=1200.0,
        delta_bytes=71_680,
        shard_bytes=1000,
    )


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Links(up=1.5e6, down=48e3), "up 1.5 MB/s, down 48 kB/s"),
        (Links(), "up unknown, down unknown"),
    ],
)
def test_links_in_words(found: Links, words: str) -> None:
    assert server_probe.links_words(found) == words
