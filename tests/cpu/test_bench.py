"""The benchmarks' own arithmetic, checks and pages: what decides whether a published figure can be believed."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from bench import report
from bench.__main__ import SUITES, make_parser
from bench.rows import Results, Row, load_all
from bench.shapes import Workload, default_grid, grid
from bench.timing import Call, Spread, WallTimer, shuffled_rounds
from cuflash import configs

CONTEXT = {
    "date": "2030-01-02 03:04 UTC",
    "commit": "abc",
    "gpu": "Some GPU",
    "cpu": "Some CPU",
    "cores": 2,
    "cuda": "13.0",
}
FULL = Workload("bfloat16", 2, 4, 128, 64)
CAUSAL = replace(FULL, is_causal=True)


def timed(provider: str, seconds: float, workload: Workload = FULL, measure: str = "forward") -> Row:
    return Row.of("forward", measure, provider, workload).measured(Spread(seconds, seconds, seconds), "ms")


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 5), (3, 7), (7, 3), (1, 1)])
def test_flops_count_visible_pairs(is_causal, seqlen_q, seqlen_k):
    workload = Workload("float16", 2, 6, seqlen_q, 16, is_causal, num_heads_kv=3, seqlen_k=seqlen_k)
    mask = np.tril(np.ones((seqlen_q, seqlen_k)), seqlen_k - seqlen_q if is_causal else seqlen_k)
    pairs = 2 * 6 * int(mask.sum())
    assert workload.flops("forward") == 4 * 16 * pairs
    assert workload.flops("backward") == 10 * 16 * pairs
    assert workload.flops("forward+backward") == 14 * 16 * pairs
    assert workload.flops("call") is None


def test_grid_keeps_hidden_size_and_tokens():
    workloads = grid("bfloat16", (64, 128), (1024, 16384))
    assert len(workloads) == len(set(workloads)) == 8
    assert {workload.num_heads * workload.head_dim for workload in workloads} == {2048}
    assert {workload.batch * workload.seqlen_q for workload in workloads} == {16384}


def test_default_grid_narrows_to_what_is_asked_for():
    assert {w.seqlen_q for w in default_grid("bfloat16", (), (), quick=True)} == {2048, 8192}
    assert {w.head_dim for w in default_grid("bfloat16", (), (), quick=False)} == {64, 128, 256}
    assert {(w.head_dim, w.seqlen_q) for w in default_grid("float32", (80,), (96,), quick=False)} == {(80, 96)}


# --- timing ---------------------------------------------------------------------------------------


def test_spread_is_median_and_percentiles():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == Spread(3.5, 2.0, 5.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_every_round_holds_everybody_once():
    rounds = shuffled_rounds(["a", "b", "c"], 20)
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert rounds == shuffled_rounds(["a", "b", "c"], 20)


def test_wall_timer_interleaves_and_drops_its_warm_up():
    seen = []

    def call(name):
        return Call(lambda: (seen.append(name),))

    spreads = WallTimer(repeats=2)({"a": call("a"), "b": call("b")}, 3)
    assert set(spreads) == {"a", "b"}
    assert all(0 < spread.p20 <= spread.median <= spread.p80 for spread in spreads.values())
    rounds = [seen[start : start + 4] for start in range(0, len(seen), 4)]
    assert len(rounds) == 1 + 3  # the first warms up
    assert all(sorted(names) == ["a", "a", "b", "b"] for names in rounds)


# --- rows -----------------------------------------------------------------------------------------


def test_measured_row_has_unit_and_rate():
    row = timed("cuflash", 2e-3)
    assert (row.median, row.unit) == (2.0, "ms")
    assert row.tflops == pytest.approx(FULL.flops("forward") / 2e-3 / 1e12)
    assert row.workload == FULL


@pytest.mark.parametrize(
    ("error", "status"), [(0.0, "ok"), (1.0, "ok"), (1.01, "wrong"), (math.inf, "wrong"), (math.nan, "wrong")]
)
def test_only_errors_within_the_allowed_one_are_right(error, status):
    row = Row.of("forward", "forward", "cuflash", FULL).checked(error)
    assert (row.status, row.is_bad) == (status, status == "wrong")


def test_results_survive_the_file(tmp_path):
    rows = [
        timed("cuflash", 1.5e-3),
        replace(timed("sdpa-fa2", 1e-3, CAUSAL), median=None, status="skipped", note='a, "b"'),
    ]
    run = Results("forward", CONTEXT, {"quick": True}, rows)
    path = run.save(tmp_path / "device")
    (loaded,) = load_all(tmp_path)
    assert (loaded.suite, loaded.context, loaded.options) == ("forward", CONTEXT, {"quick": True})
    assert loaded.rows[0].tflops == pytest.approx(rows[0].tflops, rel=1e-4)
    assert loaded.rows[1] == replace(rows[1], tflops=loaded.rows[1].tflops)
    lines = path.with_suffix(".csv").read_text().splitlines()
    assert lines[0].startswith("suite,measure,provider,dtype")
    assert len(lines) == 3
    assert json.loads(path.read_text())["rows"][0]["provider"] == "cuflash"


# --- report ---------------------------------------------------------------------------------------


def test_geometric_mean():
    assert report.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_speedup_is_their_time_over_ours():
    case = {row.provider: row for row in (timed("cuflash", 2e-3), timed("a", 3e-3), timed("b", 1e-3))}
    assert report.speedup(case, "a") == pytest.approx(1.5)
    assert report.speedup(case, report.BEST) == pytest.approx(0.5)
    assert report.speedup(case, "absent") is None
    del case["cuflash"]
    assert report.speedup(case, "a") is None


def test_another_way_to_call_cuflash_is_no_peer():
    case = {row.provider: row for row in (timed("cuflash", 2e-3), timed("cuflash-cupy", 1e-3))}
    assert report.speedup(case, report.BEST) is None


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.01234, "0.0123"), (1.0, "1.00"), (56.78, "56.8"), (1234.5, "1234")]
)
def test_significant_digits(value, text):
    assert report.significant(value) == text


def sample_run() -> Results:
    skipped = replace(Row.of("forward", "forward", "b", CAUSAL), status="skipped", note="serves no causal mask")
    wrong = Row.of("forward", "forward", "c", FULL).checked(math.nan)
    rows = [timed("cuflash", 1e-3), timed("b", 2e-3), wrong, timed("cuflash", 1e-3, CAUSAL), skipped]
    return Results("forward", CONTEXT, {}, rows)


def test_tables_say_who_is_missing_and_who_is_wrong():
    page = report.full_report([sample_run()], {})
    lines = page.splitlines()
    full = next(line for line in lines if line.startswith("| forward | bfloat16 2x4x128x64 full"))
    causal = next(line for line in lines if line.startswith("| forward | bfloat16 2x4x128x64 causal"))
    assert full.endswith("| **wrong** | 2.00 |")
    assert causal.endswith("| - | - | - |")
    assert "* b: skipped, serves no causal mask" in lines
    assert "| forward | bfloat16 | b | 1 | 2.00 | 2.00 to 2.00 |" in lines
    assert "Some GPU, CUDA 13.0, commit abc; 2030-01-02." in lines
    widths = {line.count("|") for line in lines if line.startswith("| forward | bfloat16 2x4")}
    assert len(widths) == 1


def test_ratio_table_has_a_best_peer_where_there_are_several():
    rows = [timed("cuflash", 1e-3), timed("a", 2e-3), timed("b", 4e-3), timed("c", 3e-3, CAUSAL)]
    rows.append(timed("cuflash", 1e-3, CAUSAL))
    lines = report.ratio_table([Results("forward", CONTEXT, {}, rows)]).splitlines()
    assert lines[2] == "| forward | bfloat16 | best peer | 2 | 2.45 | 2.00 to 3.00 |"
    assert [line.split(" | ")[2] for line in lines[3:]] == ["a", "b", "c"]
    assert report.ratio_table([Results("host", CONTEXT, {}, rows[:1])]) == ""


def test_fill_replaces_the_block_and_nothing_else():
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.fill(page, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.fill(report.fill(page, "new"), "new") == report.fill(page, "new")
    with pytest.raises(ValueError, match="performance:begin"):
        report.fill("no marks", "new")


def test_report_writes_page_plot_and_block(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{report.BEGIN}\n{report.END}\n")
    results = tmp_path / "bench" / "results"
    assert report.write(results, readme) == 1
    sample_run().save(results / "some-gpu")
    cpu_row = replace(timed("cuflash", 0.2), suite="cpu")
    Results("cpu", CONTEXT, {}, [cpu_row, replace(cpu_row, provider="torch")]).save(results / "some-cpu")
    assert report.write(results, readme) == 0
    block = readme.read_text()
    assert "### Some GPU\n" in block
    assert "### Some CPU, 2 cores\n" in block
    assert "[bench/results/README.md](bench/results/README.md)" in block
    assert "| forward | bfloat16 | b | 1 | 2.00 | 2.00 to 2.00 |" in block
    if (results / "some-gpu.png").exists():  # matplotlib is optional
        assert "(bench/results/some-gpu.png)" in block
    assert not (results / "some-cpu-2-cores.png").exists()
    report.write(results, readme)
    assert readme.read_text() == block


# --- command line ---------------------------------------------------------------------------------


def test_every_suite_parses_its_options_and_refuses_others(capsys):
    parser = make_parser()
    asked = parser.parse_args(["forward", "--dims", "64,128", "--dtype", "float16", "--providers", "cuflash,sdpa"])
    assert (asked.dims, asked.lens, asked.dtype) == ((64, 128), (), ("float16",))
    assert asked.providers == ("cuflash", "sdpa")
    for name, suite in SUITES.items():
        assert parser.parse_args([name]).command == name
        if "lens" not in suite.options:
            with pytest.raises(SystemExit):
                parser.parse_args([name, "--lens", "1024"])
    with pytest.raises(SystemExit):
        parser.parse_args(["forward", "--dtype", "int8"])
    assert parser.parse_args(["tune", "--write"]).write
    assert not parser.parse_args(["tune"]).write
    assert "none of float16, bfloat16, float32" in capsys.readouterr().err


def test_every_suite_takes_the_options_that_it_is_given():
    pytest.importorskip("torch")
    parser = make_parser()
    for name, suite in SUITES.items():
        asked = parser.parse_args([name])
        options = importlib.import_module(f"bench.{suite.module}").Options
        assert options(**{option: getattr(asked, option) for option in suite.options}).num_rounds() > 0


# --- answers and contestants, which need PyTorch -----------------------------------------------------


def modules():
    """The modules that import PyTorch, which is optional."""
    pytest.importorskip("torch")
    from bench import check, providers, runner

    return check, providers, runner


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_reference_agrees_with_pytorch_and_catches_a_mistake(dtype, is_causal, monkeypatch):
    check, providers, _ = modules()
    monkeypatch.setattr(check, "CHUNK_ELEMENTS", 4 * 48 * 7)  # several chunks, the last one short
    workload = Workload(dtype, 2, 4, 48, 16, is_causal, num_heads_kv=2)
    inputs = check.Inputs.random(workload, "cpu")
    reference = check.Reference(workload, inputs)
    result = providers.PROVIDERS["sdpa-math"].forward_backward(workload, inputs)()
    assert reference.error("forward+backward", result) <= 1
    assert reference.error("forward", result[:1]) <= 1
    for damaged in range(4):
        wrong = [tensor.clone() for tensor in result]
        wrong[damaged][-1, -1, -1, -1] += 0.5
        assert reference.error("forward+backward", wrong) > 1
        wrong[damaged][-1, -1, -1, -1] = math.nan
        assert math.isnan(reference.error("forward+backward", wrong))


def test_rows_that_see_nothing_are_zero():
    check, _, _ = modules()
    workload = Workload("float32", 1, 1, 6, 8, True, seqlen_k=2)
    inputs = check.Inputs.random(workload, "cpu")
    exact = check.dense(workload, inputs.q[0], inputs.k[0, 0], inputs.v[0, 0], inputs.d_out[0])
    assert float(exact["out"][0, :4].abs().max()) == float(exact["d_q"][0, :4].abs().max()) == 0.0
    assert all(bool(tensor.isfinite().all()) for tensor in exact.values())


def test_providers_say_what_they_do_not_serve():
    _, providers, _ = modules()
    known = providers.PROVIDERS
    assert known["cuflash"].unsupported(Workload("float32", 1, 4, 5, 333, True, 2, 9)) is None
    assert known["sdpa-fa2"].unsupported(FULL) is None
    assert "float32" in known["sdpa-fa2"].unsupported(replace(FULL, dtype="float32"))
    assert "257" in known["sdpa-cudnn"].unsupported(replace(FULL, head_dim=257))
    assert "grouped" in known["sdpa-efficient"].unsupported(replace(FULL, num_heads_kv=2))
    assert "top-left" in known["sdpa"].unsupported(replace(CAUSAL, seqlen_k=256))
    with pytest.raises(ValueError, match=r"unknown provider nobody; known: cuflash, "):
        providers.select(["cuflash", "nobody"])


def test_run_case_skips_checks_then_times(capsys):
    _, _, runner = modules()

    def refuse():
        raise RuntimeError("No available kernel. Aborting execution.")

    def answer(value):
        return lambda: Call(lambda: (value,))

    candidates = [
        runner.Candidate("cuflash", answer(0.5)),
        runner.Candidate("off", answer(2.0)),
        runner.Candidate("unable", answer(0.0), "serves nothing"),
        runner.Candidate("declines", refuse),
        runner.Candidate("cuflash-other", refuse),
    ]
    case = runner.Case("forward", "forward", FULL, "us")
    timer = WallTimer()
    rows = {row.provider: row for row in runner.run_case(case, candidates, lambda _, call: call()[0], timer, 2)}
    assert [rows[name].status for name in rows] == ["ok", "wrong", "skipped", "skipped", "failed"]
    assert list(rows) == [candidate.name for candidate in candidates]
    assert rows["cuflash"].median > 0
    assert rows["cuflash"].error == 0.5
    assert rows["off"].median is None
    assert "2" in rows["off"].note
    assert rows["unable"].note == "serves nothing"
    assert "No available kernel" in rows["declines"].note
    assert rows["cuflash-other"].is_bad
    assert "cuflash-other" in capsys.readouterr().out


def test_transformer_block_is_right_and_differentiable(monkeypatch):
    _, providers, _ = modules()
    from bench import step

    monkeypatch.setattr(step, "HIDDEN_SIZE", 32)
    monkeypatch.setattr(step, "CHECKED_TOKENS", (2, 24))
    workload = Workload("float32", 2, 4, 24, 8, True)
    assert step.check_step(workload, providers.PROVIDERS["sdpa-math"], "cpu") <= 1
    backwards = replace(providers.PROVIDERS["sdpa-math"], bind=lambda _: lambda q, k, v: q + k + v)
    assert step.check_step(workload, backwards, "cpu") > 1


@pytest.mark.parametrize("name", ["torch", "numpy", "cuflash"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_cpu_contestants_are_right(name, is_causal):
    check, _, _ = modules()
    import torch

    from bench import cpu

    workload = Workload("float32", 1, 2, 40, 16, is_causal)
    inputs = check.Inputs.random(workload, "cpu")
    reference = check.Reference(workload, inputs)
    for measure in cpu.MEASURES:
        result = cpu.PROVIDERS[name](measure, workload, inputs)()
        assert reference.error(measure, [torch.as_tensor(array) for array in result]) <= 1


# --- tiles ----------------------------------------------------------------------------------------


def tune_module():
    """The suite that sweeps tiles, which imports PyTorch."""
    pytest.importorskip("torch")
    from bench import tune

    return tune


@pytest.mark.parametrize("pair", configs.HEAD_DIM_PAIRS)
def test_candidates_fit_the_device_and_begin_with_the_present_tiles(pair):
    tune = tune_module()
    tiles = tune.candidates(*pair)
    present = [tile for tile, _ in configs.forward_wgmma_configs("bf16", *pair, True)]
    assert tiles[: len(present)] == present == tune.present(*pair)
    others = tiles[len(present) :]
    assert {64, 128} <= {tile.block_m for tile in others} <= {64, 128, 192}
    assert len({tune.name(tile) for tile in tiles}) == len(tiles)
    for tile in others:
        assert configs.feasible(tile, 90)
        assert tune.registers(tile) <= tune.CONSUMER_REGISTERS[tile.block_m]
        assert not (tile.ping_pong and tile.block_m == 64)
    expected = set()
    for shape in {replace(tile, num_stages=4) for tile in others}:
        fitting = [tile for n in (4, 3, 2) if configs.feasible(tile := replace(shape, num_stages=n), 90)]
        expected |= {*fitting[:2]}
    assert {*others} == expected - {*present}


def test_register_estimate_counts_scores_weights_and_output():
    tune = tune_module()
    tile = configs.ForwardWgmmaConfig("bf16", "tma", 192, 128, 128, 96)
    assert tune.registers(tile) == 96 * 64 // 128 + 96 * 64 // 2 // 128 + 128 * 64 // 128 + 32


@pytest.mark.parametrize("pair", configs.HEAD_DIM_PAIRS)
def test_register_estimate_admits_the_present_tiles(pair):
    tune = tune_module()
    for tile in tune.present(*pair):
        assert tune.registers(tile) <= tune.CONSUMER_REGISTERS[tile.block_m]


def test_head_dims_are_those_of_kernels():
    tune = tune_module()
    assert tune.select_pairs(()) == list(configs.HEAD_DIM_PAIRS)
    assert tune.select_pairs((192, 64)) == [(64, 64), (192, 128), (192, 192)]
    with pytest.raises(ValueError, match="head_dim 80; known: "):
        tune.select_pairs((64, 80))


def test_winners_become_entries_of_the_table_and_nothing_else_changes():
    tune = tune_module()
    text = tune.TABLE_FILE.read_text(encoding="utf-8")
    present = {}
    for pair in configs.HEAD_DIM_PAIRS:
        tiles = configs.forward_wgmma_configs("bf16", *pair, True)
        rows = tuple((t.block_m, t.num_stages, t.q_stages, t.ping_pong, cost) for t, cost in tiles)
        present[pair] = tiles[0][0].block_n, rows
    assert tune.rewritten(text, {}) == tune.rewritten(text, present) == text
    winners = {
        (64, 64): (144, ((128, 4, 1, False, 1.0), (64, 4, 1, False, 0.6))),
        (96, 96): (96, ((128, 4, 2, True, 1.0),)),
    }
    changed = tune.rewritten(text, winners)
    lines = zip(text.splitlines(), changed.splitlines(), strict=True)
    assert [after for before, after in lines if before != after] == [
        "    (64, 64): (144, ((128, 4, 1, False, 1.0), (64, 4, 1, False, 0.6))),",
        "    (96, 96): (96, ((128, 4, 2, True, 1.0),)),",
    ]
    longest = {(192, 128): (128, tuple((block_m, 4, 2, False, 0.79) for block_m in (192, 128, 64)))}
    assert max(map(len, tune.table_lines(longest))) <= 120
    with pytest.raises(ValueError, match="no literal"):
        tune.rewritten("_FORWARD_16BIT = {\n}\n", {})


def test_ranking_is_by_geometric_mean_of_those_timed_everywhere():
    tune = tune_module()
    rows = [timed(tune.YARDSTICK, 4e-3), timed("cuflash-a", 2e-3), timed("cuflash-b", 8e-3), timed("cuflash-c", 1e-3)]
    rows += [timed("cuflash-a", 2e-3, CAUSAL), timed("cuflash-b", 1e-4, CAUSAL)]  # the yardstick declines
    ranked = tune.ranking(rows)
    assert list(ranked) == ["cuflash-b", "cuflash-a"]
    assert ranked["cuflash-a"] == pytest.approx({FULL: 2.0, CAUSAL: 0.05})
    assert ranked["cuflash-b"] == pytest.approx({FULL: 0.5, CAUSAL: 1.0})
    assert tune.ranking([]) == {}


def tile_rows(tune, times, workload):
    """Rows of tiles (block_m, block_n, num_stages) on a workload, in units of 1 ms."""
    rows = [timed(tune.name(tune_tile(*tile)), 1e-3 * value, workload) for tile, value in times.items()]
    return [*rows, timed(tune.YARDSTICK, 1e-3, workload)]


def tune_tile(block_m, block_n, num_stages):
    return configs.ForwardWgmmaConfig("bf16", "tma", 64, 64, block_m, block_n, num_stages, 1, block_m > 64)


def test_entry_has_the_winner_and_the_fastest_smaller_tiles_of_its_block_n():
    tune = tune_module()
    full = {
        (64, 128, 4): 0.5,  # the fastest of all, but not to be first
        (192, 96, 2): 1.0,
        (192, 96, 3): 1.1,
        (128, 128, 2): 1.2,
        (128, 96, 3): 1.2,
        (128, 96, 2): 1.29,
        (64, 96, 4): 1.5,
        (64, 96, 3): 1.6,
    }
    causal = full | {(128, 96, 2): 1.0, (64, 96, 3): 2.0}  # the first of them is faster by the mean over cells
    long = replace(FULL, seqlen_q=4096, seqlen_k=4096)
    rows = [row for workload in (FULL, long) for row in tile_rows(tune, full, workload)]
    rows += [row for workload in (CAUSAL, replace(long, is_causal=True)) for row in tile_rows(tune, causal, workload)]
    tiles = [tune_tile(*tile) for tile in full]
    costs = (1.0, 0.86, 0.5)  # 1.29 * 128 / 192, 1.5 * 64 / 192
    shapes = ((192, 2, 1, True), (128, 2, 1, True), (64, 4, 1, False))
    expected = tuple((*shape, cost) for shape, cost in zip(shapes, costs, strict=True))
    assert tune.entry(tune.ranking(rows), tiles) == (96, expected)
    # Cost is the ratio on the longest full workload, whatever the others say.
    rows = [
        replace(row, median=row.median * 1.1) if "-128x96-s2" in row.provider and row.workload == FULL else row
        for row in rows
    ]
    assert tune.entry(tune.ranking(rows), tiles) == (96, expected)


def test_entry_has_no_row_above_its_first_and_none_without_a_tile():
    tune = tune_module()
    times = {(128, 96, 2): 1.0, (192, 96, 2): 1.5, (192, 128, 2): 1.6, (64, 128, 4): 2.0}
    tiles = [tune_tile(*tile) for tile in times]
    ranked = tune.ranking(tile_rows(tune, times, FULL))
    assert tune.entry(ranked, tiles) == (96, ((128, 2, 1, True, 1.0),))
    assert tune.entry(tune.ranking(tile_rows(tune, {(64, 128, 4): 1.0}, FULL)), tiles) is None
    assert tune.entry({}, tiles) is None


def test_summary_shows_the_best_and_the_present_tiles():
    tune = tune_module()
    present = tune.present(128, 128)
    others = tune.candidates(128, 128)[len(present) :]
    ordered = [present[0], *others, *present[1:]]
    rows = [timed(tune.name(tile), 1e-3 * (1 + place)) for place, tile in enumerate(ordered)]
    lines = tune.summary(128, 128, tune.ranking([*rows, timed(tune.YARDSTICK, 1e-3)])).splitlines()
    assert lines[2] == "| tile | score | 128 full |"
    names = [tune.name(tile).removeprefix("cuflash-") for tile in ordered]
    assert lines[4] == f"| {names[0]} (present) | 1.000 | 1.000 |"
    assert lines[5] == f"| {names[1]} | 0.500 | 0.500 |"
    assert len(lines) == 4 + tune.BEST + len(present) - 1
    assert lines[-1].startswith(f"| {names[-1]} (present) |")


@pytest.mark.parametrize("head_dim_v", [32, 64])
def test_sweep_times_only_tiles_that_neither_spill_nor_err(head_dim_v, monkeypatch, capsys):
    tune = tune_module()
    from bench import shapes

    tiles = dict(zip(("right", "spilling", "wrong", "broken"), tune.candidates(64, 64), strict=False))
    names = {key: tune.name(tile) for key, tile in tiles.items()}

    def tile_call(tile, workload, inputs):
        import torch

        assert tile != tiles["spilling"]
        if tile == tiles["broken"]:
            raise RuntimeError("no such kernel")
        factor = 2.0 if tile == tiles["wrong"] else 1.0
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return Call(lambda: (factor * sdpa(inputs.q, inputs.k, inputs.v, is_causal=workload.is_causal),))

    monkeypatch.setattr(tune, "candidates", lambda *_: list(tiles.values()))
    monkeypatch.setattr(tune, "local_bytes", lambda _: dict.fromkeys(names.values(), 0) | {names["spilling"]: 8})
    monkeypatch.setattr(tune, "tile_call", tile_call)
    monkeypatch.setattr(tune, "YARDSTICK", "sdpa-math")
    monkeypatch.setattr(tune, "SMALL", (1, 2, 24))
    monkeypatch.setattr(shapes, "NUM_TOKENS", 32)
    monkeypatch.setattr(shapes, "HIDDEN_SIZE", 128)
    rows = tune.sweep(64, head_dim_v, (32,), WallTimer(), 2, device="cpu")
    first = {row.provider: row.status for row in rows if row.measure == tune.FIRST and not row.is_causal}
    assert first == dict(zip(names.values(), ("ok", "skipped", "wrong", "failed"), strict=True))
    later = [row for row in rows if row.measure != tune.FIRST]
    assert [row.provider for row in later] == [names["right"], "sdpa-math"] * 2
    assert all(row.median > 0 for row in later)
    assert all((row.tflops is None) == (head_dim_v != 64) for row in later)
    assert list(tune.ranking(rows)) == [names["right"]]
    assert capsys.readouterr().out.startswith(f"{names['right']} on bfloat16 1x2x24x64 full\n")
