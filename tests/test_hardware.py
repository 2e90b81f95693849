"""The table of chips: names of devices, speeds that hold together, its age, prices of a file, platforms."""

import datetime
import sys

import pytest
from commands import refused

from gptjax.diagnostics.doctor import machine
from gptjax.diagnostics.plan.prices import Prices, read_prices
from gptjax.runtime import hardware
from gptjax.runtime.hardware import CHIPS, NODES, SLICES, chip_of, topology
from gptjax.runtime.process import expected_platform


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 5090", "rtx 5090"),
        ("NVIDIA GeForce RTX 5070 Ti", "rtx 5070 ti"),
        ("AMD Instinct MI300X VF", "mi300x"),
        ("AMD Instinct MI325X", "mi325x"),
        ("AMD Instinct MI355X", "mi355x"),
        ("TPU7x", "tpu7x"),
        ("TPU v6 lite", "tpu v6"),
    ],
)
def test_a_device_kind_names_its_chip(kind, name):
    assert chip_of(kind) is CHIPS[name]
    assert chip_of(f"{kind} Laptop GPU") is None


def test_speeds_are_of_dense_products():
    """From Ampere on TF32 is half as fast as bfloat16. A B200 has 2.25 PFLOP/s, and twice that with sparsity."""
    for name, chip in CHIPS.items():
        if chip.cuda and not chip.torus and "tpu" not in name and name not in ("v100", "t4"):
            assert chip.bfloat16 / chip.float32 == pytest.approx(2, rel=0.02), name
    assert CHIPS["b200"].bfloat16 == 2.25e15 and CHIPS["mi355x"].bfloat16 == pytest.approx(2.5e15, rel=0.01)
    assert CHIPS["tpu7x"].bfloat16 * CHIPS["tpu7x"].devices == 2307e12


@pytest.mark.parametrize("date", ["TABLE_DATE", "PRICE_DATE"])
def test_the_table_is_not_a_year_old(date):
    read = datetime.date.fromisoformat(getattr(hardware, date))
    age = (datetime.date.today() - read).days
    assert age <= 365, f"{date} is {age} days ago: read the data sheets and price lists again, then change the date"


def test_the_devices_of_an_ironwood_chip_share_it():
    cube = topology("tpu7x:2x2x4")
    assert (cube.chips, cube.devices, cube.hosts, cube.libtpu) == (16, 32, 4, "tpu7x:2x2x4")
    assert cube.bandwidth(2) == cube.bandwidth(4) == cube.chip.link < cube.bandwidth(32)
    assert topology("gb200:72").hosts == 1 and topology("b200:16").hosts == 2


@pytest.mark.parametrize("text", ['{"b200": 5.5, "tpu7x": "9"}', "b200,5.5\ntpu7x,9\n\n"])
def test_prices_of_a_file_go_before_the_table(tmp_path, text):
    path = tmp_path / "prices"
    path.write_text(text)
    prices = read_prices(str(path))
    assert prices.by_kind == {"b200": 5.5, "tpu7x": 9.0} and str(path) in prices.sentence
    assert topology("b200:8", prices.by_kind).chip.price == 5.5
    assert topology("h100:8", prices.by_kind).chip.price == topology("h100:8").chip.price > 0
    assert hardware.PRICE_DATE in Prices().sentence


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "can't be read"),
        ('{"b200": 5.5', "Expecting"),
        ('{"b20": 5.5}', "did you mean b200?"),
        ("b200,cheap", "'cheap', which is no price"),
        ('{"b200": -1}', "-1, which is no price"),
        ('{"b200": [1]}', "[1], which is no price"),
        ("b200;5.5", "wanted JSON"),
        ("b200,1,2", "wanted JSON"),
        ("{}", "no prices in it"),
        ("", "no prices in it"),
    ],
)
def test_a_file_of_no_prices_is_refused_in_one_line(tmp_path, capsys, text, says):
    path = tmp_path / "prices.csv"
    if text is not None:
        path.write_text(text)
    line = refused(capsys, "plan", "gpt2", "--topology", "b200:8", "--compiles", "0", "--prices", path)
    assert f"--prices {path}" in line and says in line and "dollars an hour" in line


def test_every_kind_has_what_a_plan_needs():
    for kind in (*SLICES, *NODES[:-1]):
        chip = hardware.CHIPS[hardware.ALIASES.get(kind, kind)]
        assert chip.memory and chip.bandwidth and chip.link, kind


def test_windows_is_told_of_wsl2(capsys, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert "WSL2" in refused(capsys, "doctor")


def test_doctor_knows_that_wsl2_has_a_gpu(tmp_path, monkeypatch):
    """Windows lends its GPU as /dev/dxg, with a libcuda of its own; jax runs on a CPU here."""
    for file in ("dev/dxg", "usr/lib/wsl/lib/libcuda.so.1"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    monkeypatch.setattr(machine, "expected_platform", lambda: expected_platform({}, tmp_path))
    finding = machine.devices()
    assert finding.level == "PROBLEM" and "this machine has a gpu" in finding.text and "jax[cuda12]" in finding.advice
