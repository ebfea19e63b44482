"""The benchmarks' own arithmetic, checks and pages: what decides whether a published figure can be believed."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bench import report
from bench.__main__ import SUITES, main, make_parser
from bench.rows import Results, Row, load_all
from bench.shapes import Workload, default_grid, grid
from bench.timing import Call, Spread, WallTimer, shuffled_rounds
from cuflash import configs
from cuflash.plan import DeviceInfo
from tests.cpu.test_functional import HostLaunches

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


def test_bytes_are_no_speedup():
    """Not even beside times, as those of a training step are."""
    peak = [replace(timed(name, 1e-3, measure="peak"), unit="MiB") for name in ("cuflash", "a")]
    rows = [timed("cuflash", 1e-3), timed("a", 2e-3), *peak]
    times, bytes_ = report.comparison_table(rows).splitlines()[2:]
    assert times.endswith("| 2.00 |")
    assert bytes_.endswith("| 1.00 MiB | 1.00 MiB | - |")
    (line,) = report.ratio_table([Results("step", CONTEXT, {}, rows)]).splitlines()[2:]
    assert line.startswith("| forward |")
    assert report.ratio_table([Results("memory", CONTEXT, {}, peak)]) == ""


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
    assert parser.parse_args(["tune"]).measure == "forward"
    assert parser.parse_args(["tune", "--measure", "backward"]).measure == "backward"
    with pytest.raises(SystemExit):
        parser.parse_args(["tune", "--measure", "step"])
    assert "none of float16, bfloat16, float32" in capsys.readouterr().err


def test_every_suite_takes_the_options_that_it_is_given():
    pytest.importorskip("torch")
    parser = make_parser()
    for name, suite in SUITES.items():
        asked = parser.parse_args([name])
        options = importlib.import_module(f"bench.{suite.module}").Options
        assert options(**{option: getattr(asked, option) for option in suite.options}).num_rounds() > 0


def test_each_measure_of_tune_has_a_file(tmp_path, monkeypatch):
    from bench import context

    tune, _ = tune_modules()
    monkeypatch.setenv("CUFLASH_KERNEL", "auto")  # which `main` sets
    monkeypatch.setattr(context, "collect", lambda _: CONTEXT)
    monkeypatch.setattr(tune, "run", lambda options: [timed("cuflash", 1e-3, measure=options.measure)])
    for measure in ("forward", "backward"):
        assert main(["tune", "--measure", measure, "--out", str(tmp_path)]) == 0
    assert [path.name for path in sorted(tmp_path.glob("*.json"))] == ["tune-backward.json", "tune-forward.json"]
    assert [run.rows[0].measure for run in load_all(tmp_path)] == ["backward", "forward"]


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


OPTIONS = (
    "bias",
    "ALiBi",
    "softcap",
    "window",
    "documents",
    "block-sparse",
    "block mask",
    "dropout",
    "grouped dropout",
)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_to_cuflash_what_their_functions_say(name):
    check, *_ = modules()
    options = importlib.import_module("bench.options")
    (option,) = (option for option in options.OPTIONS if option.name == name)
    workload = option.adapt(Workload("float32", 1, 4, 1100, 8))
    bound = option.bind(workload, "cpu")
    inputs = check.Inputs.random(workload, "cpu")
    result = options._ours(bound).forward_backward(workload, inputs)()
    assert options.reference(workload, bound, inputs).error("forward+backward", result) <= 1
    assert options.reference(workload, options.Bound({}), inputs).error("forward+backward", result) > 1


def test_rows_that_see_nothing_are_zero():
    check, _, _ = modules()
    workload = Workload("float32", 1, 1, 6, 8, True, seqlen_k=2)
    inputs = check.Inputs.random(workload, "cpu")
    exact = check.dense(workload, inputs.q[0], inputs.k[0, 0], inputs.v[0, 0], inputs.d_out[0])
    assert float(exact["out"][0, :4].abs().max()) == float(exact["d_q"][0, :4].abs().max()) == 0.0
    assert all(bool(tensor.isfinite().all()) for tensor in exact.values())


def test_providers_say_what_they_do_not_serve(monkeypatch):
    _, providers, _ = modules()
    known = providers.PROVIDERS
    assert known["cuflash"].unsupported(Workload("float32", 1, 4, 5, 333, True, 2, 9)) is None
    assert known["sdpa-fa2"].unsupported(FULL) is None
    monkeypatch.setattr(providers, "installed", {"flash-attn-4": "4.0"}.get)
    assert known["fa4"].unsupported(FULL) is None
    assert "float32" in known["fa4"].unsupported(replace(FULL, dtype="float32"))
    monkeypatch.setattr(providers, "installed", {}.get)
    assert known["fa4"].unsupported(FULL) == "flash-attn-4 is not installed"
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


MEASURES = ("forward", "backward")


def tune_modules():
    """The suite that sweeps tiles and what it knows of them, which import PyTorch."""
    pytest.importorskip("torch")
    from bench import tiles, tune

    return tune, tiles


def tiles_of(measure, head_dim=64, head_dim_v=64):
    _, tiles = tune_modules()
    return tiles.TILES[measure](head_dim, head_dim_v)


def present_tiles(measure, pair):
    """Tiles of the table."""
    if measure == "forward":
        return [tile for tile, _ in configs.forward_wgmma_configs("bf16", *pair, True)]
    return [configs.backward_wgmma_config("bf16", *pair, False)]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("pair", configs.HEAD_DIM_PAIRS)
def test_candidates_fit_the_device_and_begin_with_the_present_tiles(pair, measure):
    tiles = tiles_of(measure, *pair)
    candidates, present = tiles.candidates(), present_tiles(measure, pair)
    assert candidates[: len(present)] == present == tiles.present()
    assert {*candidates} == {*present, *tiles.others()}
    assert list(tiles.by_name().values()) == candidates
    assert all(configs.feasible(tile, 90) for tile in candidates)


@pytest.mark.parametrize("pair", configs.HEAD_DIM_PAIRS)
def test_forward_candidates_have_the_most_stages_that_fit(pair):
    _, module = tune_modules()
    tiles = module.ForwardTiles(*pair)
    others = [*tiles.others()]
    assert {64, 128} <= {tile.block_m for tile in others} <= {64, 128, 192}
    for tile in others:
        assert tiles.registers(tile) <= module.FORWARD_REGISTERS[tile.block_m]
        assert not (tile.ping_pong and tile.block_m == 64)
    expected = set()
    for shape in {replace(tile, num_stages=4) for tile in others}:
        fitting = [tile for n in (4, 3, 2) if configs.feasible(tile := replace(shape, num_stages=n), 90)]
        expected |= {*fitting[:2]}
    assert {*others} == expected


@pytest.mark.parametrize("pair", configs.HEAD_DIM_PAIRS)
def test_backward_candidates_are_what_the_kernel_computes(pair):
    _, module = tune_modules()
    tiles = module.BackwardTiles(*pair)
    others = [*tiles.others()]
    assert others
    for tile in others:
        assert tiles.registers(tile) <= module.BACKWARD_REGISTERS
        assert (tile.kv_stages, tile.num_stages, tile.block_m % 16) in {(kv, q, 0) for kv in (1, 2) for q in (2, 3)}
        if tile.by_role:  # the second warpgroup has columns of d_q from 64 on
            assert tile.head_dim > 64
            assert not tile.overlap
        else:  # 64 rows of d_q for each warpgroup, or 64 columns
            assert tile.block_m == 128 or 64 < tile.head_dim <= 128
        assert tile.kv_stages == 2 or not tile.overlap  # steps overlap across tiles of keys
    both = {replace(tile, overlap=not tile.overlap) for tile in others if not tile.by_role and tile.kv_stages == 2}
    assert both <= {*others}
    assert bool(both) == (pair[0] <= 128)


def test_register_estimates_count_what_a_thread_holds():
    tile = configs.ForwardWgmmaConfig("bf16", "tma", 192, 128, 128, 96)
    scores, weights, out = 96 * 64 // 128, 96 * 64 // 2 // 128, 128 * 64 // 128
    assert tiles_of("forward").registers(tile) == scores + weights + out + 32
    by_role = configs.BackwardWgmmaConfig("bf16", "tma", 192, 128, 48, 64)
    assert tiles_of("backward").registers(by_role) == 192 * 64 // 128 + 2 * (48 * 64 // 128) + 32
    by_keys = replace(by_role, block_n=128)
    assert tiles_of("backward").registers(by_keys) == (192 + 128) * 64 // 128 + 2 * (48 * 64 // 128) + 32


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("pair", configs.HEAD_DIM_PAIRS)
def test_register_estimates_admit_the_present_tiles(pair, measure):
    _, module = tune_modules()
    tiles = tiles_of(measure, *pair)
    for tile in tiles.present():
        limit = module.FORWARD_REGISTERS[tile.block_m] if measure == "forward" else module.BACKWARD_REGISTERS
        assert tiles.registers(tile) <= limit


def test_head_dims_are_those_of_kernels():
    tune, _ = tune_modules()
    assert tune.select_pairs(()) == list(configs.HEAD_DIM_PAIRS)
    assert tune.select_pairs((192, 64)) == [(64, 64), (192, 128), (192, 192)]
    with pytest.raises(ValueError, match="head_dim 80; known: "):
        tune.select_pairs((64, 80))


def present_entry(measure, pair):
    """What the table says of a pair of head dims, put together from its tiles."""
    tiles = present_tiles(measure, pair)
    if measure == "backward":
        (tile,) = tiles
        return tile.block_m, tile.block_n, tile.kv_stages, tile.num_stages, tile.overlap
    costs = [cost for _, cost in configs.forward_wgmma_configs("bf16", *pair, True)]
    rows = ((t.block_m, t.num_stages, t.q_stages, t.ping_pong, cost) for t, cost in zip(tiles, costs, strict=True))
    return tiles[0].block_n, tuple(rows)


@pytest.mark.parametrize(
    ("measure", "winners", "longest"),
    [
        (
            "forward",
            {
                (64, 64): (144, ((128, 4, 1, False, 1.01), (64, 4, 1, False, 0.6))),
                (96, 96): (96, ((128, 4, 2, True, 1.01),)),
            },
            (128, tuple((block_m, 4, 2, False, 0.79) for block_m in (192, 128, 64))),
        ),
        (
            "backward",
            {(64, 64): ((80, 112, 1, 2, False), (96, 64, 2, 3, True)), (96, 96): ((112, 64, 1, 3, False),)},
            ((128, 128, 2, 3, False), (128, 128, 2, 3, False)),
        ),
    ],
)
def test_winners_become_entries_of_the_table_and_nothing_else_changes(measure, winners, longest):
    tune, _ = tune_modules()
    name = tiles_of(measure).table
    text = tune.TABLE_FILE.read_text(encoding="utf-8")
    present = {pair: present_entry(measure, pair) for pair in configs.HEAD_DIM_PAIRS}
    assert tune.rewritten(text, name, {}) == tune.rewritten(text, name, present) == text
    changed = tune.rewritten(text, name, winners)
    lines = zip(text.splitlines(), changed.splitlines(), strict=True)
    assert [after for before, after in lines if before != after] == tune.table_lines(winners)
    assert tune.rewritten(changed, name, present) == text
    assert max(map(len, tune.table_lines({(192, 128): longest}))) <= 120
    with pytest.raises(ValueError, match=f"no literal {name}"):
        tune.rewritten("_FORWARD_16BIT = {\n}\n", name, {})


def test_ranking_is_by_geometric_mean_of_those_timed_everywhere():
    tune, _ = tune_modules()
    rows = [timed(tune.YARDSTICK, 4e-3), timed("cuflash-a", 2e-3), timed("cuflash-b", 8e-3), timed("cuflash-c", 1e-3)]
    rows += [timed("cuflash-a", 2e-3, CAUSAL), timed("cuflash-b", 1e-4, CAUSAL)]  # the yardstick declines
    ranked = tune.ranking(rows)
    assert list(ranked) == ["cuflash-b", "cuflash-a"]
    assert ranked["cuflash-a"] == pytest.approx({FULL: 2.0, CAUSAL: 0.05})
    assert ranked["cuflash-b"] == pytest.approx({FULL: 0.5, CAUSAL: 1.0})
    assert tune.ranking([]) == {}


def forward_tile(block_m, block_n, num_stages):
    return configs.ForwardWgmmaConfig("bf16", "tma", 64, 64, block_m, block_n, num_stages, 1, block_m > 64)


@pytest.fixture
def entry_of(monkeypatch):
    """The entry that tiles become, given their times by workload in units of 1 ms."""
    tune, module = tune_modules()

    def entry(measure, times):
        tiles = tiles_of(measure)
        rows = [timed(tune.YARDSTICK, 1e-3, workload) for workload in times]
        for workload, case in times.items():
            rows += [timed(tiles.name(tile), 1e-3 * value, workload) for tile, value in case.items()]
        candidates = list(dict.fromkeys(tile for case in times.values() for tile in case))
        monkeypatch.setattr(module.TILES[measure], "candidates", lambda _: candidates)
        return tiles.entry(tune.ranking(rows))

    return entry


LONG, LONG_CAUSAL = (replace(workload, seqlen_q=4096, seqlen_k=4096) for workload in (FULL, CAUSAL))


def test_forward_entry_has_the_winner_and_the_fastest_smaller_tiles_of_its_block_n(entry_of):
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
    full = {forward_tile(*tile): value for tile, value in full.items()}
    fastest = forward_tile(128, 96, 2)  # by the mean over workloads
    causal = full | {fastest: 1.0, forward_tile(64, 96, 3): 2.0}
    costs = (1.0, 0.86, 0.5)  # 1.29 * 128 / 192, 1.5 * 64 / 192
    shapes = ((192, 2, 1, True), (128, 2, 1, True), (64, 4, 1, False))
    expected = tuple((*shape, cost) for shape, cost in zip(shapes, costs, strict=True))
    times = {FULL: full, LONG: full, CAUSAL: causal, LONG_CAUSAL: causal}
    assert entry_of("forward", times) == (96, expected)
    # Cost is the ratio on the longest full workload, whatever the others say.
    assert entry_of("forward", times | {FULL: full | {fastest: 1.29 * 1.1}}) == (96, expected)


def test_forward_entry_has_no_row_above_its_first_and_none_without_a_tile(entry_of):
    times = {(128, 96, 2): 1.0, (192, 96, 2): 1.5, (192, 128, 2): 1.6, (64, 128, 4): 2.0}
    times = {forward_tile(*tile): value for tile, value in times.items()}
    assert entry_of("forward", {FULL: times}) == (96, ((128, 2, 1, True, 1.0),))
    assert entry_of("forward", {FULL: {forward_tile(64, 128, 4): 1.0}}) is None
    assert entry_of("forward", {}) is None


def test_backward_entry_is_the_best_tile(entry_of):
    first, deep, other = (128, 128, 1, 2, True), (128, 128, 2, 2, True), (64, 64, 2, 3, False)

    def times(*values):
        tiles = (configs.BackwardWgmmaConfig("bf16", "tma", 64, 64, *row) for row in (first, deep, other))
        return dict(zip(tiles, values, strict=True))

    # By the mean over the workloads.
    assert entry_of("backward", {FULL: times(1.0, 0.9, 1.0), LONG: times(1.0, 1.2, 2.0)}) == first
    assert entry_of("backward", {FULL: times(1.0, 0.8, 1.0), LONG: times(1.0, 1.2, 2.0)}) == deep
    assert entry_of("backward", {}) is None


def test_summary_shows_the_best_and_the_present_tiles():
    tune, _ = tune_modules()
    tiles = tiles_of("forward", 128, 128)
    present = tiles.present()
    others = tiles.candidates()[len(present) :]
    ordered = [present[0], *others, *present[1:]]
    rows = [timed(tiles.name(tile), 1e-3 * (1 + place)) for place, tile in enumerate(ordered)]
    lines = tune.summary(tiles, tune.ranking([*rows, timed(tune.YARDSTICK, 1e-3)])).splitlines()
    assert lines[2] == "| tile | score | 128 full |"
    names = [tiles.name(tile).removeprefix("cuflash-") for tile in ordered]
    assert lines[4] == f"| {names[0]} (present) | 1.000 | 1.000 |"
    assert lines[5] == f"| {names[1]} | 0.500 | 0.500 |"
    assert len(lines) == 4 + tune.BEST + len(present) - 1
    assert lines[-1].startswith(f"| {names[-1]} (present) |")


@pytest.fixture
def host_launches(monkeypatch):
    """Launches that are NumPy; by `change` of a configuration and a problem, other problems than those asked for."""
    torch = pytest.importorskip("torch")
    _, module = tune_modules()
    launches = HostLaunches()

    def install(change):
        def forward(problem, device_id, *strides, plan):
            return launches.ForwardCall(change(plan.config, problem), device_id, *strides)

        def backward(problem, device_id, *strides, plans):
            return launches.BackwardCall(change(plans[1].config, problem), device_id, *strides)

        monkeypatch.setattr(module, "ForwardCall", forward)
        monkeypatch.setattr(module, "BackwardCall", backward)
        monkeypatch.setattr(module.DeviceInfo, "current", DeviceInfo.of_arch)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 90)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
        return launches.log

    return install


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("head_dim_v", [32, 64])
def test_sweep_times_only_tiles_that_neither_spill_nor_err(head_dim_v, measure, host_launches, monkeypatch, capsys):
    tune, _ = tune_modules()
    from bench import shapes

    tiles = tiles_of(measure, 64, head_dim_v)
    compete = dict(zip(("right", "spilling", "wrong", "broken"), tiles_of(measure).candidates(), strict=False))
    names = {key: tiles.name(tile) for key, tile in compete.items()}

    def change(config, problem):
        assert config != compete["spilling"]
        if config == compete["broken"]:
            raise RuntimeError("no such kernel")
        return replace(problem, scale=2 * problem.scale) if config == compete["wrong"] else problem

    log = host_launches(change)
    monkeypatch.setattr(type(tiles), "candidates", lambda _: list(compete.values()))
    monkeypatch.setattr(tune, "local_bytes", lambda _: dict.fromkeys(names.values(), 0) | {names["spilling"]: 8})
    monkeypatch.setattr(tune, "DTYPE", "float16")  # NumPy knows no bfloat16
    monkeypatch.setattr(tune, "YARDSTICK", "sdpa-math")
    monkeypatch.setattr(tune, "SMALL", (1, 2, 24))
    monkeypatch.setattr(shapes, "NUM_TOKENS", 32)
    monkeypatch.setattr(shapes, "HIDDEN_SIZE", 128)
    rows = tune.sweep(tiles, (32,), WallTimer(), 2, device="cpu")
    first = {row.provider: row.status for row in rows if row.measure == tune.FIRST and not row.is_causal}
    assert first == dict(zip(names.values(), ("ok", "skipped", "wrong", "failed"), strict=True))
    later = [row for row in rows if row.measure != tune.FIRST]
    assert [row.provider for row in later] == [names["right"], "sdpa-math"] * 2
    assert all(row.median > 0 and row.measure.startswith(measure) for row in later)
    assert all((row.tflops is None) == (head_dim_v != 64) for row in later)
    assert list(tune.ranking(rows)) == [names["right"]]
    assert {*log} == {(measure, 90, 7)}
    assert capsys.readouterr().out.startswith(f"{names['right']} on float16 1x2x24x64 full\n")
