"""Tables of runs: columns by many names, what is missing worked out aloud, and one clear line for each bad table."""

import csv
import json

import numpy as np
import pytest
from commands import refused

from gptjax.config import SCHEMA, TrainConfig
from gptjax.config.section import InputError, leaves
from gptjax.model.counts import parameters
from gptjax.scaling.rows import read_rows
from gptjax.scaling.table import read_table


def loss(n, d):
    return 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28


GRID = [(n, c / 6 / n) for c in (1e17, 1e18, 1e19) for n in np.geomspace(0.5, 2, 4) * (c / 1e17) ** 0.5 * 2e7]
GOOD = [{"params": n, "tokens": d, "val_loss": loss(n, d)} for n, d in GRID]


def write(path, rows, header=None):
    header = header or list(rows[0])
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([row.values() if isinstance(row, dict) else row for row in rows])
    return path


@pytest.mark.parametrize("names", [("N", "D", "Loss"), ("n_params", "training tokens", "eval-loss"),
                                   ("Parameters", "tokens", "final_loss")])  # fmt: skip
def test_columns_go_by_any_usual_name(tmp_path, names):
    table = read_table([write(tmp_path / "t.csv", [tuple(row.values()) for row in GOOD], names)])
    assert np.allclose(table.parameters, [n for n, _ in GRID]) and np.allclose(table.tokens, [d for _, d in GRID])
    assert np.allclose(table.loss, [row["val_loss"] for row in GOOD]) and len(table.names) == len(GRID)


def test_a_csv_and_its_jsonl_are_the_same_table(tmp_path):
    a = read_table([write(tmp_path / "t.csv", GOOD)])
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in GOOD) + "\n")
    b = read_table([tmp_path / "t.jsonl"])
    assert np.array_equal(a.loss, b.loss) and np.array_equal(a.flops, b.flops) and a.sha256 != b.sha256


def test_missing_tokens_or_flops_are_worked_out_aloud(tmp_path):
    by_tokens = read_table([write(tmp_path / "t.csv", GOOD)])
    rows = [(n, 6 * n * d, loss(n, d)) for n, d in GRID]
    by_flops = read_table([write(tmp_path / "c.csv", rows, ("N", "compute", "loss"))])
    assert np.allclose(by_tokens.flops, by_flops.flops) and np.allclose(by_tokens.tokens, by_flops.tokens)
    assert any("C = 6 N D" in note for note in by_tokens.notes)
    assert any("D = C / (6 N)" in note for note in by_flops.notes)


def test_points_of_the_same_flops_are_a_budget_where_no_column_says_so(tmp_path):
    table = read_table([write(tmp_path / "t.csv", GOOD)])
    assert np.allclose(table.budgets, [1e17, 1e18, 1e19]) and any("no column of budgets" in n for n in table.notes)
    assert len(table.up_to(1e18)) == 8 and len(table.up_to(9e17)) == 4


def test_runs_at_flops_everywhere_are_no_budget(tmp_path):
    rows = [(1e8, 1e9 * 1.01**i, 3.0) for i in range(20)]
    assert not len(read_table([write(tmp_path / "t.csv", rows, ("N", "D", "loss"))]).budgets)


def test_a_budget_is_let_in_by_its_own_number(tmp_path):
    rows = [row | {"budget": 1.2345678e18} for row in GOOD]  # kept as 1.23457e18
    assert len(read_table([write(tmp_path / "t.csv", rows)]).up_to(1.2345678e18)) == len(GOOD)


def test_copies_odd_units_and_rows_left_out_are_said(tmp_path):
    notes = read_table([write(tmp_path / "t.csv", [*GOOD, GOOD[3]])]).notes
    assert any(note.startswith("1 rows repeat another's") for note in notes)
    rows = [row | {"flops": 6e-15 * row["params"] * row["tokens"]} for row in GOOD]
    table = read_table([write(tmp_path / "t.csv", rows)], where=["tokens<1e9"])
    assert any("other units" in note for note in table.notes)
    assert any(note == f"--where left out {12 - len(table)} of 12 rows" for note in table.notes)
    assert not any("repeat" in note or "left out" in note for note in read_table([tmp_path / "t.csv"]).notes)


def test_rows_are_called_by_their_line_where_they_have_no_name(tmp_path):
    table = read_table([write(tmp_path / "t.csv", GOOD)], where=["tokens>=1e9"])
    assert table.names[0] == f"line {2 + next(i for i, row in enumerate(GOOD) if row['tokens'] >= 1e9)}"


def test_conditions_choose_rows_by_text_number_and_worked_out_flops(tmp_path):
    rows = [row | {"dataset": "a" if i % 2 else "b", "lr": 0.01 * (i % 3)} for i, row in enumerate(GOOD)]
    path = write(tmp_path / "t.csv", rows)
    assert len(read_table([path], where=["dataset=a"])) == 6 and len(read_table([path], where=["dataset=a, c"])) == 6
    assert len(read_table([path], where=["dataset=a,b", "lr=0.01,0.02"])) == 8
    assert len(read_table([path], where=["dataset!=b", "lr=1e-2"])) == 2
    rows[0]["val_loss"] = "nan"  # of a row that is left out
    path = write(tmp_path / "t.csv", rows)
    assert len(read_table([path], where=["val_loss!=nan"])) == 11
    assert np.all(read_table([path], where=["dataset=a", "flops>=1e18"]).flops > 9e17)
    assert np.all(read_table([path], where=["dataset=a", "tokens<1e9"]).tokens < 1e9)


def test_named_columns_and_the_count_of_parameters_are_taken(tmp_path):
    rows = [row | {"params_no_embed": row["params"] / 2, "bpb": row["val_loss"] / 3} for row in GOOD]
    path = write(tmp_path / "t.csv", rows)
    table = read_table([path], columns=["loss=bpb"], count="non-embedding")
    assert np.allclose(table.parameters, [n / 2 for n, _ in GRID])
    assert np.allclose(table.loss, [row["val_loss"] / 3 for row in GOOD])


def changed(row, **values):
    return [*GOOD[:row], GOOD[row] | values, *GOOD[row + 1 :]]


def columns(*names):
    return [{k: row[k] for k in names} for row in GOOD]


# A name, the rows (or the text of the file), and what the one line must say: what, got, wanted, what to do.
BAD = [
    ("no loss", columns("params", "tokens"), ["no column of loss", "params, tokens", "--columns loss=COLUMN"]),
    ("no size", columns("tokens", "val_loss"), ["no column of parameters", "wanted parameters, params"]),
    ("no tokens", columns("params", "val_loss"), ["no column of tokens or flops", "--columns tokens=COLUMN"]),
    ("a NaN", changed(2, val_loss="nan"), ["t.csv:4", "loss (column val_loss) is 'nan'", "above 0", "--where"]),
    ("an infinity", changed(2, val_loss="inf"), ["t.csv:4", "'inf'", "wanted a number above 0"]),
    ("a negative loss", changed(0, val_loss=-2.5), ["t.csv:2", "'-2.5'", "wanted a number above 0"]),
    ("an empty cell", changed(5, val_loss=""), ["t.csv:7", "is empty"]),
    ("no parameters", changed(1, params=0), ["t.csv:3", "parameters (column params) is '0'"]),
    ("negative tokens", changed(1, tokens=-1e9), ["t.csv:3", "tokens is '-1000000000.0'"]),
    ("a huge size", changed(1, params=1e306), ["t.csv:3", "is '1e+306'", "to 1e+100", "--where"]),
    ("a tiny number", changed(1, tokens=1e-306), ["t.csv:3", "is '1e-306'", "from 1e-100"]),
    ("a text", changed(3, tokens="20B"), ["t.csv:5", "tokens is '20B'", "wanted a number"]),
    ("an empty file", "", ["the file is empty", "wanted a header"]),
    ("nothing but commas", ",,\n,,\n", ["every cell is empty"]),
    ("a header alone", "N,D,loss\n", ["a header and no rows"]),
    ("a column twice", "N,D,loss,loss\n1,2,3,4\n", ["t.csv:1", "'loss' is there 2 times", "rename or remove"]),
    ("two losses", "N,D,loss,val_loss\n1,2,3,4\n", ["loss and val_loss", "--columns loss=loss"]),
    ("a short row", "N,D,loss\n1,2,3\n1,2\n", ["t.csv:3", "2 cells", "3 columns"]),
    ("an open quote", 'N,D,loss\n1,2,"3\n', ["t.csv:2", "not CSV"]),
    ("bytes", b"\xff\xfe\x00N,D", ["not a text in UTF-8"]),
    ("few points", GOOD[:4], ["4 point(s) for the 5 parameters of chinchilla", "add runs"]),
    ("one budget", [GOOD[0]] * 2 + GOOD[:4], ["one budget", "at least 2 budgets"]),
    ("one size", [GOOD[0] | {"tokens": 1e9 * i} for i in range(1, 9)], ["1 different sizes", "at least 3"]),
    ("one horizon", [GOOD[0] | {"params": 1e7 * i} for i in range(1, 9)], ["1 different token counts"]),
]  # fmt: skip


@pytest.mark.parametrize("rows, words", [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_a_bad_table_gets_one_clear_line(rows, words, tmp_path, capsys):
    path = tmp_path / "t.csv"
    if isinstance(rows, list):
        write(path, rows)
    else:
        path.write_bytes(rows.encode() if isinstance(rows, str) else rows)
    err = refused(capsys, "fit", path, "--out", tmp_path / "out")
    assert err.startswith(f"gptjax: {path}") and all(word in err for word in words), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args, words", [
    (["--where", "dataset=rpj"], ["has no column 'dataset'", "params, tokens"]),
    (["--where", "params"], ["wanted COLUMN=VALUE (or VALUE,VALUE)"]),
    (["--where", "params>many"], ["'many' is not a number"]),
    (["--where", "tokens<1"], ["none of 12 rows", "change it"]),
    (["--columns", "loss"], ["wanted FIELD=COLUMN"]),
    (["--columns", "loss=bpb"], ["has no column 'bpb'"]),
    (["--columns", "loss=val_loss", "loss=tokens"], ["names loss twice"]),
    (["--count", "non-embedding"], ["no column of parameters_non_embedding", "--count total"]),
    (["--max-flops", "1e9"], ["max_flops=1e+09", "all 12 points"]),
    (["--bootstraps", "3"], ["bootstraps=3"]),
    (["--level", "95"], ["level=95.0", "above 0 and below 1"]),
    (["--law", "zipf"], ["zipf"]),
])  # fmt: skip
def test_settings_that_do_not_fit_the_table_are_refused(args, words, tmp_path, capsys):
    path = write(tmp_path / "t.csv", GOOD)
    err = refused(capsys, "fit", path, "--out", tmp_path / "out", *args)
    assert all(word in err for word in words), err


def test_what_is_no_table_is_refused(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "t.jsonl").write_text('{"N": 1}\n{"N": 2\n')
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "twice.jsonl").write_text('{"N": 1, "N": 2}\n')
    cases = [(["nowhere.csv"], "no such file or folder"), (["folder"], "neither table.csv nor config.json"),
             (["t.jsonl"], "t.jsonl:2: not JSON"), (["list.jsonl"], "list.jsonl:1: list, not an object"),
             (["twice.jsonl"], "'N' is there 2 times"), (["t.jsonl", "folder"], "not the folder of a run"),
             ([], "TABLE is missing")]  # fmt: skip
    for names, word in cases:
        assert word in refused(capsys, "fit", *(tmp_path / name for name in names), "--out", tmp_path / "out")


def make_run(folder, evaluations, config=None):
    """The folder of a run as training leaves it: settings, and lines of 256 tokens a step."""
    folder.mkdir(parents=True)
    settings = {name: {"value": value, "from": "default"} for name, value in leaves(config or TrainConfig())}
    document = {"schema": SCHEMA, "stage": "pretrain", "recipe": {}, "settings": settings}
    (folder / "config.json").write_text(json.dumps(document))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 41):
            file.write(json.dumps({"step": step, "loss": 5 - step / 20, "tokens": step * 256}) + "\n")
            if step % (40 // evaluations) == 0:
                file.write(json.dumps({"step": step, "eval_loss": 5.5 - step / 20}) + "\n")
        file.write('{"step": 41, "lo')  # a line that is being written


def test_a_run_is_a_row_with_its_curve(tmp_path):
    config = TrainConfig()
    make_run(tmp_path / "a", 8, config)
    make_run(tmp_path / "b", 8)
    table = read_table([tmp_path / "a", tmp_path / "b"])
    assert table.names == ("a", "b") and list(table.tokens) == [40 * 256] * 2 and list(table.loss) == [3.5] * 2
    counted = parameters(config.model, config.tokenizer.vocab_size, config.data.length)
    assert table.parameters[0] == counted["total"]
    curve = table.curves[0]
    assert curve is not None and list(curve.tokens_T) == [1280 * i for i in range(1, 9)]
    assert list(curve.loss_T) == pytest.approx([5.5 - i / 4 for i in range(1, 9)])
    assert read_table([tmp_path / "a"]).names == ("a",)


def test_the_runs_of_a_sweep_that_diverged_are_left_out_and_named(tmp_path):
    rows = ["a,10,100,6000,3.0,runs/a", "b,20,100,12000,inf,runs/b"]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["name,parameters,tokens,flops,loss,run_dir", *rows]))
    made = read_rows([table])
    assert [row.cells["name"] for row in made.rows] == ["a"] and "left out, for they diverged: runs/b" in made.notes
    table.write_text(table.read_text().replace("3.0", "inf"))
    with pytest.raises(InputError, match="every run diverged"):
        read_rows([table])


def test_a_run_that_diverged_is_refused_and_one_that_has_not_ended_is_said(tmp_path):
    make_run(tmp_path / "a", 8, TrainConfig(steps=40))
    make_run(tmp_path / "b", 8, TrainConfig(steps=80))
    notes = read_table([tmp_path / "a", tmp_path / "b"]).notes
    assert [note for note in notes if "not ended" in note] == [
        "1 runs have not ended, so their losses lie high: b at step 40 of 80"
    ]
    path = tmp_path / "b" / "metrics.jsonl"
    path.write_text(path.read_text().rpartition("\n")[0] + '\n{"step": 80, "eval_loss": NaN}\n')
    with pytest.raises(InputError, match="the last evaluation, at step 80"):
        read_table([tmp_path / "a", tmp_path / "b"])


def test_runs_with_few_evaluations_have_curves_of_training_losses(tmp_path):
    make_run(tmp_path / "a", 8)
    make_run(tmp_path / "b", 1)
    table = read_table([tmp_path / "a", tmp_path / "b"])
    for curve in table.curves:
        assert curve is not None and len(curve.loss_T) > 15 and np.all(np.diff(curve.loss_T) < 0)
        assert curve.loss_T[-1] < 3.2  # 5 - 40 / 20 is the last, not the 3.5 of the evaluation
    assert any("training losses" in note for note in table.notes)


def test_a_sweeps_folder_is_its_table_with_the_curves_that_are_there(tmp_path):
    rows = [{"name": f"r{i}", "size": "s", "seed": i % 2, "budget": 6 * n * d, "parameters": n,
             "parameters_non_embedding": n / 2, "tokens": d, "flops": 5.5 * n * d, "loss": loss(n, d),
             "run_dir": f"runs/r{i}"} for i, (n, d) in enumerate(GRID)]  # fmt: skip
    write(tmp_path / "table.csv", rows)
    run = tmp_path / "runs" / "r3"
    run.mkdir(parents=True)
    lines = [{"step": s, "tokens": s * 100, "loss": 3.0, "eval_loss": 3 - s / 10} for s in range(1, 8)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "eva')
    table = read_table([tmp_path])
    assert table.names[3] == "r3" and table.seeds[3] == "1" and len(table.budgets) == 3
    assert [i for i, c in enumerate(table.curves) if c] == [3]
    assert any("11 of 12 run_dirs are not there" in note for note in table.notes)
    assert any("FLOPs of the table: 5.5 N D" in note for note in table.notes)
