"""`plan` and `doctor` on the command line, and caps as people write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import flashinfer
from flashinfer import cli, engine, machine, pack
from flashinfer.backend import APART, open_backend
from flashinfer.cli import main
from flashinfer.config import Cap, Rates
from flashinfer.engine import Model
from flashinfer.errors import CapTooLargeError, CapTooSmallError
from flashinfer.machine import MemoryLimit, memory_cap
from flashinfer.memory import Plan
from flashinfer.units import GIB, MIB, parse_cap_size
from tests.checkpoints import make_llama

QUICK = ["--seconds", "0.001"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    pack(make_llama(root / "checkpoint", hidden_act="silu"), root / "store")
    return root / "store"


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("flashinfer.bench.basis.BUFFER", MIB)
    monkeypatch.setattr("flashinfer.bench.basis.ENOUGH", MIB)
    return tmp_path


def test_plan_json_is_the_plan_of_the_engine(store: Path, no_cache: Path, capsys) -> None:
    assert main(["plan", str(store), "--weight-memory", "600kB", "--context", "32", *QUICK, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    with Model.open(store, Cap(weight_memory=600_000), context=32) as model:
        same = [name for name in Plan.__dataclass_fields__ if name not in ("baseline", "resident")]
        assert {n: said["plan"][n] for n in same} == {n: model.plan.to_json()[n] for n in same}
        assert said["plan"]["resident"] == sorted(model.plan.resident)
    assert said["schema_version"] == 1
    assert said["cap"] == said["plan"]["cap"] == 600_000
    assert said["prediction"]["tokens_per_second"] > 0
    assert said["prediction"]["prompt_tokens"] == 31
    assert said["prediction"]["firing"]["density"] == 1
    rows = said["other_caps"]
    assert [row["cap"] for row in rows] == sorted(row["cap"] for row in rows)
    assert rows[0]["plan"] is None
    assert rows[0]["cap"] < rows[0]["floor"]
    assert rows[-1]["prediction"]["flash_bytes"] < 1000
    assert list(no_cache.rglob("*.json"))


def test_plan_prints_where_every_byte_goes(store: Path, capsys) -> None:
    assert main(["plan", str(store), "--memory", "60%", *QUICK]) == 0
    out = capsys.readouterr().out
    for text in ("resident matrices", "neuron slots", "keys and values", "free", "bounded by", "<- asked", "ceiling",
                 "below the floor", "first token", "every one is needed"):  # fmt: skip
        assert text in out


def test_plan_prints_where_every_byte_of_a_device_goes(store: Path, capsys, monkeypatch) -> None:
    """`cuda` is the CPU here, with memory of its own."""
    monkeypatch.setattr("flashinfer.bench.promise.open_backend", lambda _, *others: open_backend(APART, *others))
    monkeypatch.setattr("flashinfer.bench.basis.device_name", lambda device: f"the card {device}")
    arguments = ["plan", str(store), "--weight-memory", "100MB", "--device", "cuda", "--vram", "900kB", *QUICK]
    assert main([*arguments, "--context", "32"]) == 0
    out = capsys.readouterr().out
    for text in (
        "device memory 879 KiB",
        "weights on their way",
        "copied to the device",
        "from its memory",
        "copies to it",
    ):
        assert text in out
    assert main([*arguments, "--context", "32", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    device = said["plan"]["device"]
    assert device["resident"]
    assert device["total"] <= device["cap"] == 900_000
    assert said["plan"]["kv_cache"] == 0
    assert said["prediction"]["pcie_bytes"] == said["prediction"]["dram_bytes"] > 0
    assert said["prediction"]["vram_bytes"] > said["prediction"]["pcie_bytes"]
    assert said["basis"]["rates"]["pcie"] not in (Rates().pcie, 0)


@pytest.mark.parametrize("command", ["plan", "generate -p abc", "chat", "bench generate", "eval --text a.txt"])
def test_vram_without_a_device_is_one_line(command: str, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("Once upon a time there was a clock maker who lived by the sea. " * 40)
    monkeypatch.chdir(tmp_path)
    pack(Path(flashinfer.__file__).parent / "_demo", tmp_path / "demo.flash")
    capsys.readouterr()
    name, *options = command.replace("bench generate", "bench-generate").split()
    more = ["--chat-template", "vicuna"] if name == "chat" else []
    assert main([*name.split("-"), "demo.flash", *options, *more, "--vram", "1GiB"]) == 1
    out, err = capsys.readouterr()
    said = "--vram bounds a device's own memory, and the CPU has none; leave it out, or add --device cuda"
    assert err == f"flashinfer: error: {said}\n"
    assert not out
    assert main([*name.split("-"), "demo.flash", *options, *more, "--vram", "much"]) == 2
    assert "--vram" in capsys.readouterr().err


def test_assumed_sparsity_is_labelled(tmp_path: Path, capsys) -> None:
    pack(make_llama(tmp_path / "checkpoint"), tmp_path / "store")
    assert main(["plan", str(tmp_path / "store"), "--weight-memory", "600kB", *QUICK]) == 0
    assert "assumed, not measured: 10% fire" in capsys.readouterr().out


def test_what_was_measured_is_not_measured_again(store: Path, monkeypatch, capsys) -> None:
    arguments = ["plan", str(store), "--weight-memory", "600kB", "--json"]
    assert main([*arguments, *QUICK]) == 0
    first = json.loads(capsys.readouterr().out)["basis"]
    monkeypatch.setattr("flashinfer.bench.basis.measure_rates", lambda *_, **__: pytest.fail("measured again"))
    assert main([*arguments, *QUICK]) == 0
    assert json.loads(capsys.readouterr().out)["basis"]["rates"] == first["rates"]
    with pytest.raises(pytest.fail.Exception):
        main([*arguments, *QUICK, "--remeasure"])


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--memory", "4 potatoes"], 2, "is not a size"),
        (["--memory", "0"], 2, "holds nothing"),
        (["--memory", "0%"], 2, "no share"),
        (["--memory", "120%"], 2, "at most 100%"),
        (["--weight-memory", "50%"], 2, "only --memory"),
        (["--weight-memory", "1B"], 1, "below the floor of"),
        (["--memory", "1MiB"], 1, "below the floor of"),
        (["--memory", "999TiB"], 1, "this process may use"),
        (["--weight-memory", "1GiB", "--context", "100000"], 1, "context"),
        (["--memory", "1GiB", "--weight-memory", "1GiB"], 2, "not both"),
    ],
)
def test_caps_that_cannot_be(store: Path, options: list[str], status: int, message: str, capsys) -> None:
    assert main(["plan", str(store), *options, *QUICK]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


# -- caps


def test_shares_of_the_usable_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_memory", lambda: 8 * GIB)
    assert memory_cap("50%") == memory_cap("4GiB") == memory_cap(4 * GIB) == 4 * GIB
    assert memory_cap(" 12.5 % ") == GIB
    with pytest.raises(CapTooLargeError, match=r"may use 8\.00 GiB") as e:
        memory_cap("9GiB")
    assert e.value.usable == 8 * GIB


@pytest.mark.parametrize("text", ["", "%", "-1%", "1e9%", "4 potatoes", "0.0GB", "-4GiB", "nan", "50%%", "5 0%"])
def test_nonsense_is_no_cap(text: str) -> None:
    with pytest.raises(ValueError):
        parse_cap_size(text, GIB)


def test_a_cgroup_below_the_floor_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = MemoryLimit(Path("memory.max"), 2, 64 * MIB, None)
    monkeypatch.setattr(machine, "memory_limits", lambda: [limit])
    with pytest.raises(CapTooSmallError, match=r"may use 64\.0 MiB .the limit in memory\.max") as e:
        Model.open(store)
    assert e.value.floor > 64 * MIB
    assert "\n" not in str(e.value)
    with pytest.raises(CapTooLargeError, match=r"memory\.max"):
        memory_cap("1GiB")


def test_limits_of_both_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, (name, used) in machine._LIMIT_FILES.items():
        folder = tmp_path / f"v{version}" / "a" / "b"
        folder.mkdir(parents=True)
        (folder / name).write_text("max\n" if version == 2 else f"{1 << 63}\n")
        (folder.parent / name).write_text(f"{version * GIB}\n")
        (folder.parent / used).write_text("7\n")
        monkeypatch.setattr(machine, f"_V{version}", tmp_path / f"v{version}")
    own = tmp_path / "cgroup"
    own.write_text("4:memory:/a/b\n2:cpu:/\n0::/a/b\n")
    monkeypatch.setattr(machine, "_OWN_CGROUP", own)
    assert [(x.version, x.bytes, x.used) for x in machine.memory_limits()] == [(1, GIB, 7), (2, 2 * GIB, 7)]
    own.unlink()
    assert machine.memory_limits() == []


# -- generate and doctor


def test_a_model_predicts_itself(store: Path) -> None:
    with Model.open(store, Cap(weight_memory=450_000), context=32) as model:
        found = model.predict(engine.DiskCurve(), engine.Rates(), prompt_tokens=8)
    assert found.prompt_tokens == 8
    assert found.flash_bytes > 0


def test_doctor(store: Path, capsys) -> None:
    assert main(["doctor", str(store)]) == 0
    out = capsys.readouterr().out
    for name in ("system", "processor", "memory", "filesystem", "direct reads", "disk curve", "GPU"):
        assert f" {name} " in out
    assert main(["doctor", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {c["status"] for c in checks} <= {"ok", "warn"}
    assert "doctor" in cli.COMMANDS
